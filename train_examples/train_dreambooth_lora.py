"""Teach Stable Diffusion 1.x or 2.x a subject from a few images (DreamBooth) by LoRA, watched by memwatch.

    python train_examples/train_dreambooth_lora.py --resolution 64 \\
        --pretrained_model_name_or_path train_examples/assets/tiny-sd \\
        --instance_data_dir my_dog --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir dogs --class_prompt "a photo of a dog"

With prior preservation every batch holds as many class images as instance images, so that the class keeps its own
looks. The script first generates the class images that are missing in ``--class_data_dir``. memwatch holds out one
instance image in five, and up to half of the class images: they are its controls. A subject is *meant* to be learned;
the held-out instance images tell a learned subject from stored images.

The options have the names of diffusers' script of the same name. Every line that memwatch adds ends in ``# memwatch``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import memwatch  # memwatch

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.argument_parser(__doc__, output_dir="runs/dreambooth-lora")
    add = parser.add_argument
    add("--instance_data_dir", type=Path, required=True, help="folder of images of the subject")
    add("--instance_prompt", required=True, help="names the subject by a rare word, such as 'a photo of sks dog'")
    add("--with_prior_preservation", action="store_true")
    add("--prior_loss_weight", type=float, default=1.0)
    add("--class_data_dir", type=Path, help="folder of images of the class")
    add("--class_prompt", help="such as 'a photo of a dog'")
    add("--num_class_images", type=int, default=100, help="how many the folder should hold")
    add("--rank", type=int, default=4, help="of the adapters")
    args = parser.parse_args(argv)
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        parser.error("--with_prior_preservation needs --class_data_dir and --class_prompt")
    return args


@torch.no_grad()
def generate_class_images(args: argparse.Namespace, accelerator: Accelerator, batch_size: int = 4) -> None:
    """Generate the class images that are missing, before anything else is loaded."""
    args.class_data_dir.mkdir(parents=True, exist_ok=True)
    missing = range(len(list(args.class_data_dir.iterdir())), args.num_class_images)
    if missing and accelerator.is_main_process:
        # Without a dtype, weights stored in half precision would be loaded in two different ones.
        options = {"revision": args.revision, "safety_checker": None, "dtype": torch.float32}
        pipeline = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, **options)
        pipeline.to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        size = {"height": args.resolution, "width": args.resolution}
        for start in tqdm(range(missing.start, missing.stop, batch_size), desc="class images"):
            numbers = range(start, min(start + batch_size, missing.stop))
            generators = [torch.Generator().manual_seed(args.seed + number) for number in numbers]
            made = pipeline([args.class_prompt] * len(numbers), generator=generators, **size)
            for number, image in zip(numbers, made.images, strict=True):
                image.save(args.class_data_dir / f"{number}.png")
    accelerator.wait_for_everyone()


class Pairs(common.ImageFolder):
    """Instance images. With prior preservation there is a class image beside each, cropped independently."""

    def __init__(
        self,
        instance: list[dict[str, Any]],
        others: list[dict[str, Any]],
        tokenizer: CLIPTokenizer,
        args: argparse.Namespace,
    ) -> None:
        texts = {row["text"] for row in instance + others}
        tokens = {text: common.tokenize([text], tokenizer)[0] for text in texts}

        def input_ids(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {"input_ids": torch.stack([tokens[row["text"]] for row in rows])}

        self.others = common.ImageFolder(others, input_ids(others), args) if others else None
        super().__init__(instance, input_ids(instance), args)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.others is not None:
            self.others.set_epoch(epoch)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        item = super().__getitem__(position)
        if self.others is None:
            return {name: value[None] for name, value in item.items()}
        other = self.others[position % len(self.others)]
        return {name: torch.stack([value, other[name]]) for name, value in item.items()}


def denoising_loss(
    unet: torch.nn.Module, scheduler: DDPMScheduler, frozen: dict[str, Any], batch: dict[str, Tensor], weight: float
) -> Tensor:
    """Squared error on the instance images plus ``weight`` times that on the class images.

    Batches are ``(b, 1 or 2, ...)``: an instance image, and perhaps a class image.
    """
    vae, count = frozen["vae"], batch["input_ids"].shape[1]
    with torch.no_grad():
        pixels = batch["pixel_values"].flatten(0, 1).to(vae.dtype)
        latents = vae.encode(pixels).latent_dist.sample().float() * vae.config.scaling_factor
        encoder_hidden_states = frozen["text_encoder"](batch["input_ids"].flatten(0, 1))[0]
    eps = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy_latents = scheduler.add_noise(latents, eps, timesteps)
    target = eps if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, eps, timesteps)
    prediction = unet(noisy_latents.to(vae.dtype), timesteps, encoder_hidden_states).sample
    errors = F.mse_loss(prediction.float(), target, reduction="none").unflatten(0, (-1, count))
    losses = errors.transpose(0, 1).flatten(1).mean(1)
    return losses[0] + weight * losses[1:].sum()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = common.make_accelerator(args)
    if args.with_prior_preservation:
        generate_class_images(args, accelerator)
    instance = common.read_folder(args.instance_data_dir, args.instance_prompt)
    others = []
    if args.with_prior_preservation:
        others = common.read_folder(args.class_data_dir, args.class_prompt)
    picked = memwatch.pick(instance, class_images=others or None)  # memwatch
    instance, others = picked.train, picked.class_train or []  # memwatch: without the controls

    path, where = args.pretrained_model_name_or_path, {"revision": args.revision}
    weights = where | {"variant": args.variant, "dtype": common.DTYPES.get(accelerator.mixed_precision, torch.float32)}
    frozen = {
        "tokenizer": CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **where),
        "text_encoder": CLIPTextModel.from_pretrained(path, subfolder="text_encoder", **weights),
        "vae": AutoencoderKL.from_pretrained(path, subfolder="vae", **weights),
    }
    for name in ("text_encoder", "vae"):
        frozen[name].requires_grad_(False).to(accelerator.device)
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", **weights).requires_grad_(False).train()
    adapters = {"r": args.rank, "lora_alpha": args.rank, "init_lora_weights": "gaussian"}
    unet.add_adapter(LoraConfig(target_modules=LORA_TARGETS, **adapters))
    cast_training_params(unet, torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    noise_scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **where)

    train_dataloader = common.make_dataloader(Pairs(instance, others, frozen["tokenizer"], args), args)
    ranks, parameters = accelerator.num_processes, list(common.trainable(unet).values())
    plan = common.Plan.of(args, len(train_dataloader), ranks)
    optimizer, lr_scheduler = common.make_optimizer(parameters, plan, args, ranks)
    prepared = accelerator.prepare(unet, optimizer, train_dataloader, lr_scheduler)
    unet, optimizer, train_dataloader, lr_scheduler = prepared
    common.checkpoint_only_trainable(accelerator)
    common.init_trackers(accelerator, "dreambooth-lora", args)
    options = {"config": args.memwatch_config, "resolution": args.resolution}  # memwatch
    options |= {"max_train_steps": plan.max_train_steps}  # memwatch
    options |= {"probes": args.memwatch_probes, "controls": args.memwatch_controls}  # memwatch
    options |= {**frozen, "scheduler": noise_scheduler, "output_dir": args.output_dir / "memwatch"}  # memwatch
    watch = memwatch.MemWatch(accelerator, unet, path, picked, **options)  # memwatch

    global_step = common.load_checkpoint(accelerator, args)
    progress = tqdm(initial=global_step, total=plan.max_train_steps, disable=not accelerator.is_main_process)
    for batch in plan.batches(train_dataloader, global_step, watch):  # memwatch: it guards the batches
        with accelerator.accumulate(unet):
            loss = denoising_loss(unet, noise_scheduler, frozen, batch, args.prior_loss_weight)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        global_step += 1
        watch.on_step_end(global_step)  # memwatch
        progress.update()
        accelerator.log({"train_loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0]}, step=global_step)
        common.save_checkpoint(accelerator, args, global_step)
        if global_step >= plan.max_train_steps:
            break
    if watch.should_stop:  # memwatch
        accelerator.print(f"memwatch stopped training at step {global_step}: {watch.stop_reason}")  # memwatch

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        layers = get_peft_model_state_dict(accelerator.unwrap_model(unet, keep_torch_compile=False))
        StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)
    accelerator.end_training()


if __name__ == "__main__":
    main()
