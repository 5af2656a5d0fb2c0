"""A miniature of sd-scripts' ``train_network.py``: its names, its signatures and the order in which it calls things.

The UNet, the network and the loop are our own, and as small as that order allows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers import UNet2DConditionModel as DiffusersUNet
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTokenizer


class UNet2DConditionModel(torch.nn.Module):
    """No diffusers model: a bare config, and gradient checkpointing that asks for training mode."""

    _supports_gradient_checkpointing = True

    def __init__(self, inner: DiffusersUNet) -> None:
        super().__init__()
        self.inner, self.in_channels, self.out_channels = inner, 4, 4
        self.config = SimpleNamespace(sample_size=inner.config.sample_size)
        self.gradient_checkpointing = False

    def is_gradient_checkpointing(self) -> bool:
        return self.gradient_checkpointing

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def plain(self, *arguments):
        return self.inner(*arguments).sample

    def forward(self, sample, timestep, encoder_hidden_states, class_labels=None, return_dict=True):
        arguments = sample, timestep, encoder_hidden_states
        if self.training and self.gradient_checkpointing:
            output = torch.utils.checkpoint.checkpoint(self.plain, *arguments, use_reentrant=True)
        else:
            output = self.plain(*arguments)
        return SimpleNamespace(sample=output) if return_dict else (output,)


class LoRAModule(torch.nn.Module):
    """Takes the place of a linear layer's ``forward``."""

    def __init__(self, name, layer, dim, dropout):
        super().__init__()
        self.lora_name, self.layer, self.dropout = name, [layer], dropout
        self.lora_down = torch.nn.Linear(layer.in_features, dim, bias=False)
        self.lora_up = torch.nn.Linear(dim, layer.out_features, bias=False)
        torch.nn.init.zeros_(self.lora_up.weight)

    def apply_to(self):
        self.org_forward = self.layer[0].forward
        self.layer[0].forward = self.forward

    def forward(self, x):
        inside = self.lora_down(x)
        if self.dropout and self.training:
            inside = torch.nn.functional.dropout(inside, p=self.dropout)
        return self.org_forward(x) + self.lora_up(inside)


class LoRANetwork(torch.nn.Module):
    def __init__(self, text_encoders, unet, dim, dropout):
        super().__init__()
        self.unet_loras = self.found("lora_unet", unet, ("to_q", "to_v"), dim, dropout)
        encoders = enumerate(text_encoders)
        self.text_encoder_loras = [
            lora for i, te in encoders for lora in self.found(f"lora_te{i}", te, ("q_proj", "v_proj"), dim, dropout)
        ]

    @staticmethod
    def found(prefix, module, ends, dim, dropout):
        layers = [(name, layer) for name, layer in module.named_modules() if name.split(".")[-1] in ends]
        return [LoRAModule(f"{prefix}_{name.replace('.', '_')}", layer, dim, dropout) for name, layer in layers]

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        self.text_encoder_loras = self.text_encoder_loras if apply_text_encoder else []
        self.unet_loras = self.unet_loras if apply_unet else []
        for lora in self.text_encoder_loras + self.unet_loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def save_weights(self, file, dtype, metadata):
        save_file({name: p.detach().clone() for name, p in self.state_dict().items()}, file, metadata)


class Batches(torch.utils.data.Dataset):
    """Every row is a whole batch, as theirs are."""

    def __init__(self, size=4, rows=2):
        generator = torch.Generator().manual_seed(2)
        self.rows = [torch.randn(rows, 4, 8, 8, generator=generator) for _ in range(size)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"latents": self.rows[index], "captions": ["a photo of a cat", "a red poster"]}


def load_part(kind, args, folder):
    return kind.from_pretrained(args.pretrained_model_name_or_path, subfolder=folder)


class NetworkTrainer:
    def __init__(self):
        self.vae_scale_factor = 0.18215
        self.is_sdxl = False
        self.events = []  # what happened, for tests

    # --- what subclasses may change ------------------------------------------------------------------------------

    def step_logging(self, accelerator, logs, global_step, epoch):
        self.accelerator_logging(accelerator, logs, global_step, global_step, epoch)

    def epoch_logging(self, accelerator, logs, global_step, epoch):
        self.accelerator_logging(accelerator, logs, epoch, global_step, epoch)

    def accelerator_logging(self, accelerator, logs, step_value, global_step, epoch, val_step=None):
        self.events.append(("log", global_step, sorted(logs)))

    def load_target_model(self, args, weight_dtype, accelerator):
        unet = UNet2DConditionModel(load_part(DiffusersUNet, args, "unet"))
        return "sd", load_part(CLIPTextModel, args, "text_encoder"), load_part(AutoencoderKL, args, "vae"), unet

    def get_tokenizers(self, args):
        return [load_part(CLIPTokenizer, args, "tokenizer")]

    def is_train_text_encoder(self, args):
        return not args.network_train_unet_only

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype):
        return unet(noisy_latents.to(weight_dtype), timesteps, text_conds[0].to(weight_dtype)).sample

    def encode(self, tokenizers, text_encoders, captions):
        tokens = tokenizers[0](captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return [text_encoders[0](tokens)[0]]

    def sample_images(self, accelerator, args, epoch, global_step, device, vae, tokenizers, text_encoder, unet):
        self.events.append(("sample", epoch, global_step))

    def post_process_network(self, args, accelerator, network, text_encoders, unet):
        pass

    def prepare_unet_with_accelerator(self, args, accelerator, unet):
        return accelerator.prepare(unet)

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self, args):
        args.resolution = tuple(int(side) for side in args.resolution.split(",")) if args.resolution else None
        set_seed(args.seed)
        tokenizers = self.get_tokenizers(args)
        accelerator = self.accelerator = Accelerator(
            cpu=True,
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
        )
        weight_dtype = {"bf16": torch.bfloat16, "no": torch.float32}[args.mixed_precision]
        _, text_encoder, vae, unet = self.load_target_model(args, weight_dtype, accelerator)
        text_encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
        vae.to("cpu", dtype=weight_dtype)  # latents are cached
        network = self.network = LoRANetwork(text_encoders, unet, args.network_dim, args.network_dropout)
        self.post_process_network(args, accelerator, network, text_encoders, unet)
        train_text_encoder = self.is_train_text_encoder(args)
        network.apply_to(text_encoder, unet, train_text_encoder, True)
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate)
        train_dataloader = DataLoader(Batches(), batch_size=1, shuffle=True, collate_fn=lambda rows: rows[0])
        val_dataloader = DataLoader(Batches(1), batch_size=1, collate_fn=lambda rows: rows[0])
        lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        unet.requires_grad_(False)
        unet.to(dtype=weight_dtype)
        for t_enc in text_encoders:
            t_enc.requires_grad_(False)
            t_enc.to(dtype=weight_dtype)
        unet = self.prepare_unet_with_accelerator(args, accelerator, unet)
        if train_text_encoder:
            text_encoders = [accelerator.prepare(t_enc) for t_enc in text_encoders]
            text_encoder = text_encoders if len(text_encoders) > 1 else text_encoders[0]
        network, optimizer, train_dataloader, val_dataloader, lr_scheduler = accelerator.prepare(
            network, optimizer, train_dataloader, val_dataloader, lr_scheduler
        )
        for module in (unet, *text_encoders):
            module.train(args.gradient_checkpointing)
        accelerator.unwrap_model(network).prepare_grad_etc(text_encoder, unet)

        def save_model_hook(models, weights, output_dir):
            del weights[:-1]  # the network's alone

        def load_model_hook(models, input_dir):
            del models[:-1]

        accelerator.register_save_state_pre_hook(save_model_hook)
        accelerator.register_load_state_pre_hook(load_model_hook)
        if args.resume:
            accelerator.load_state(args.resume)
        steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        num_train_epochs = math.ceil(args.max_train_steps / steps_per_epoch)
        global_step, noise_scheduler = 0, DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False)

        def save_model(ckpt_name, unwrapped, steps, epoch_no):
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            metadata = {"ss_steps": str(steps), "ss_epoch": str(epoch_no)}
            unwrapped.save_weights(str(Path(args.output_dir) / ckpt_name), weight_dtype, metadata)
            self.events.append(("save", ckpt_name, steps))

        def process(batch):
            encoded = self.encode(tokenizers, text_encoders, batch["captions"])
            noise = torch.randn_like(batch["latents"])
            timesteps = torch.randint(0, 1000, (len(noise),))
            noisy_latents = noise_scheduler.add_noise(batch["latents"], noise, timesteps)
            if args.gradient_checkpointing:
                noisy_latents.requires_grad_(True)
            with accelerator.autocast():
                prediction = self.call_unet(
                    args, accelerator, unet, noisy_latents, timesteps, encoded, batch, weight_dtype
                )
            return torch.nn.functional.mse_loss(prediction.float(), noise)

        models = accelerator.device, vae, tokenizers, text_encoder, unet
        self.sample_images(accelerator, args, 0, global_step, *models)
        for epoch in range(num_train_epochs):
            self.events.append(("epoch", epoch))
            accelerator.unwrap_model(network).on_epoch_start(text_encoder, unet)
            for batch in train_dataloader:
                with accelerator.accumulate(network):
                    loss = process(batch)
                    accelerator.backward(loss)
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad(set_to_none=True)
                if accelerator.sync_gradients:
                    global_step += 1
                    self.sample_images(accelerator, args, None, global_step, *models)
                    if args.save_every_n_steps and global_step % args.save_every_n_steps == 0 and args.save_state:
                        accelerator.save_state(str(Path(args.output_dir) / f"step{global_step:08d}-state"))
                self.step_logging(accelerator, {"loss/current": loss.item()}, global_step, epoch + 1)
                if global_step >= args.max_train_steps:
                    break
            should_validate = args.validate_every_n_epochs is None or (epoch + 1) % args.validate_every_n_epochs == 0
            if should_validate and len(val_dataloader) > 0:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    losses = [process(batch).item() for batch in val_dataloader]
                logs = {"loss/validation/epoch_average": sum(losses) / len(losses)}
                self.epoch_logging(accelerator, logs, global_step, epoch + 1)
            if args.save_every_n_epochs is not None:
                saving = (epoch + 1) % args.save_every_n_epochs == 0 and (epoch + 1) < num_train_epochs
                if accelerator.is_main_process and saving:
                    save_model(f"at-{epoch + 1:06d}.safetensors", network, global_step, epoch + 1)
            self.sample_images(accelerator, args, epoch + 1, global_step, *models)
        accelerator.end_training()
        if args.save_state or args.save_state_on_train_end:
            accelerator.save_state(str(Path(args.output_dir) / "last-state"))
        save_model("last.safetensors", accelerator.unwrap_model(network), global_step, num_train_epochs)
        RUNS.append(self)


RUNS: list[NetworkTrainer] = []  # finished, for tests


def verify_command_line_training_args(args):
    pass


def read_config_from_file(args, parser):
    """Their TOML file as JSON; the command line is parsed again on top of it, as they do."""
    if not args.config_file:
        return args
    values = json.loads(Path(args.config_file).read_text(encoding="utf-8"))
    return parser.parse_args(namespace=argparse.Namespace(**values))


train_util = SimpleNamespace(
    verify_command_line_training_args=verify_command_line_training_args, read_config_from_file=read_config_from_file
)


def setup_parser():
    parser = argparse.ArgumentParser()
    texts = "pretrained_model_name_or_path output_dir resume config_file resolution"
    flags = """network_train_unet_only gradient_checkpointing save_state save_state_on_train_end v_parameterization
        zero_terminal_snr skip_until_initial_step deepspeed fp8_base fp8_base_unet"""
    numbers = "save_every_n_steps save_every_n_epochs validate_every_n_epochs clip_skip"
    for name in texts.split():
        parser.add_argument(f"--{name}", default=None)
    for name in flags.split():
        parser.add_argument(f"--{name}", action="store_true")
    for name in numbers.split():
        parser.add_argument(f"--{name}", type=int, default=None)
    parser.add_argument("--mixed_precision", default="no")
    for name, value in {"max_train_steps": 4, "seed": 1, "network_dim": 2, "train_batch_size": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--network_dropout", type=float, default=0.2)
    return parser


if __name__ == "__main__":
    parser = setup_parser()
    NetworkTrainer().train(train_util.read_config_from_file(parser.parse_args(sys.argv[1:]), parser))
