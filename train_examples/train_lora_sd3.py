"""Fine-tune Stable Diffusion 3 or 3.5 on a folder of images by LoRA (flow matching), watched by memwatch.

    python train_examples/train_lora_sd3.py --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \\
        --train_data_dir my_images --resolution 1024 --mixed_precision bf16 --gradient_checkpointing

The folder holds the images and a ``metadata.jsonl`` with one object per line, such as
``{"file_name": "1.png", "text": "a photo of a cat"}``. The captions are encoded once, and the text encoders are
dropped. memwatch loads them for a moment to encode its probes. The options have the names of diffusers' scripts. Every
line that memwatch adds ends in ``# memwatch``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import common
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import cast_training_params, compute_density_for_timestep_sampling
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from tqdm.auto import tqdm

import memwatch  # memwatch

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.argument_parser(__doc__, output_dir="runs/lora-sd3")
    add = parser.add_argument
    add("--train_data_dir", type=Path, required=True, help="folder of images with metadata.jsonl (file_name, text)")
    add("--rank", type=int, default=4, help="of the adapters")
    schemes = ["none", "logit_normal", "mode"]
    add("--weighting_scheme", default="logit_normal", choices=schemes, help="how noise levels are drawn")
    return parser.parse_args(argv)


@torch.no_grad()
def encode(texts: list[str], args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Tensor]:
    """``prompt_embeds`` and ``pooled_prompt_embeds`` of every caption, on the CPU; the encoders are gone afterwards."""
    path, where = args.pretrained_model_name_or_path, {"revision": args.revision, "variant": args.variant}
    config = StableDiffusion3Pipeline.load_config(path, revision=args.revision)
    parts = {name: part for name, part in config.items() if isinstance(part, list)}
    absent = {name: None for name, part in parts.items() if part[0] is None}  # many leave the third encoder out
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, **absent | {"transformer": None, "vae": None}, **where)
    pipeline.to(accelerator.device)
    shape = SD3Transformer2DModel.load_config(path, subfolder="transformer", revision=args.revision)
    config = SimpleNamespace(**shape)  # without a third encoder the pipeline asks for this to shape its zeros
    pipeline.transformer = SimpleNamespace(config=config)
    encoded = [pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False) for text in texts]
    embeds, pooled = torch.cat([e[0] for e in encoded]), torch.cat([e[2] for e in encoded])
    return {"prompt_embeds": embeds.cpu(), "pooled_prompt_embeds": pooled.cpu()}


def flow_matching_loss(
    transformer: torch.nn.Module,
    scheduler: FlowMatchEulerDiscreteScheduler,
    vae: AutoencoderKL,
    batch: dict[str, Tensor],
    scheme: str,
) -> Tensor:
    """Squared error of the velocity ``eps - z_0`` at ``x_t = (1 - sigma) z_0 + sigma eps``."""
    with torch.no_grad():
        encoded = vae.encode(batch["pixel_values"].to(vae.dtype)).latent_dist.sample().float()
        latents = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
    eps = torch.randn_like(latents)
    options = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
    share = compute_density_for_timestep_sampling(scheme, batch_size=len(latents), **options)
    index = (share * scheduler.config.num_train_timesteps).long()
    sigma = scheduler.sigmas[index].to(latents)[:, None, None, None]
    noisy_latents = (1 - sigma) * latents + sigma * eps
    output = transformer(
        hidden_states=noisy_latents.to(vae.dtype),
        timestep=scheduler.timesteps[index].to(latents.device),
        encoder_hidden_states=batch["prompt_embeds"].to(vae.dtype),
        pooled_projections=batch["pooled_prompt_embeds"].to(vae.dtype),
    )
    return F.mse_loss(output.sample.float(), eps - latents)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = common.make_accelerator(args)
    rows = common.read_folder(args.train_data_dir)
    picked = memwatch.pick(rows)  # memwatch
    rows = picked.train  # memwatch: without the controls
    captions = encode([row["text"] for row in rows], args, accelerator)

    dtype = common.DTYPES.get(accelerator.mixed_precision, torch.float32)
    path, where = args.pretrained_model_name_or_path, {"revision": args.revision}
    weights = where | {"variant": args.variant, "dtype": dtype}
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae", **weights).requires_grad_(False).to(accelerator.device)
    transformer = SD3Transformer2DModel.from_pretrained(path, subfolder="transformer", **weights)
    transformer.requires_grad_(False).train()
    adapters = {"r": args.rank, "lora_alpha": args.rank, "init_lora_weights": "gaussian"}
    transformer.add_adapter(LoraConfig(target_modules=LORA_TARGETS, **adapters))
    cast_training_params(transformer, torch.float32)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler", **where)

    train_dataloader = common.make_dataloader(common.ImageFolder(rows, captions, args), args)
    ranks, parameters = accelerator.num_processes, list(common.trainable(transformer).values())
    plan = common.Plan.of(args, len(train_dataloader), ranks)
    optimizer, lr_scheduler = common.make_optimizer(parameters, plan, args, ranks)
    prepared = accelerator.prepare(transformer, optimizer, train_dataloader, lr_scheduler)
    transformer, optimizer, train_dataloader, lr_scheduler = prepared
    common.checkpoint_only_trainable(accelerator)
    common.init_trackers(accelerator, "lora-sd3", args)
    options = {"config": args.memwatch_config, "resolution": args.resolution, "vae": vae}  # memwatch
    options |= {"max_train_steps": plan.max_train_steps}  # memwatch
    options |= {"probes": args.memwatch_probes, "controls": args.memwatch_controls}  # memwatch
    options |= {"scheduler": noise_scheduler, "output_dir": args.output_dir / "memwatch"}  # memwatch
    watch = memwatch.MemWatch(accelerator, transformer, path, picked, **options)  # memwatch

    global_step = common.load_checkpoint(accelerator, args)
    progress = tqdm(initial=global_step, total=plan.max_train_steps, disable=not accelerator.is_main_process)
    for batch in plan.batches(train_dataloader, global_step, watch):  # memwatch: it guards the batches
        with accelerator.accumulate(transformer):
            loss = flow_matching_loss(transformer, noise_scheduler, vae, batch, args.weighting_scheme)
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
        layers = get_peft_model_state_dict(accelerator.unwrap_model(transformer, keep_torch_compile=False))
        StableDiffusion3Pipeline.save_lora_weights(args.output_dir, transformer_lora_layers=layers)
    accelerator.end_training()


if __name__ == "__main__":
    main()
