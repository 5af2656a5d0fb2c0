"""Fine-tune all weights of a Stable Diffusion XL UNet on a folder of images, watched by memwatch.

    python train_examples/train_text_to_image_sdxl.py --train_data_dir my_images --resolution 1024 \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --mixed_precision bf16 --gradient_checkpointing

The folder holds the images and a ``metadata.jsonl`` with one object per line, such as
``{"file_name": "1.png", "text": "a photo of a cat"}``. The captions are encoded once, and both text encoders are
dropped. memwatch loads them for a moment to encode its probes. The options have the names of diffusers' script of the
same name. Every line that memwatch adds ends in ``# memwatch``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from tqdm.auto import tqdm

import memwatch  # memwatch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.argument_parser(__doc__, output_dir="runs/text-to-image-sdxl")
    add = parser.add_argument
    add("--train_data_dir", type=Path, required=True, help="folder of images with metadata.jsonl (file_name, text)")
    return parser.parse_args(argv)


@torch.no_grad()
def encode(texts: list[str], args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Tensor]:
    """``prompt_embeds`` and ``pooled_prompt_embeds`` of every caption, on the CPU; the encoders are gone afterwards."""
    # Without a dtype, encoders stored in half precision would stay in it, and the UNet is trained in float32.
    weights = {"revision": args.revision, "variant": args.variant, "dtype": torch.float32}
    path = args.pretrained_model_name_or_path
    pipeline = StableDiffusionXLPipeline.from_pretrained(path, unet=None, vae=None, **weights).to(accelerator.device)
    encoded = [pipeline.encode_prompt(text, do_classifier_free_guidance=False) for text in texts]
    embeds, pooled = torch.cat([e[0] for e in encoded]), torch.cat([e[2] for e in encoded])
    return {"prompt_embeds": embeds.cpu(), "pooled_prompt_embeds": pooled.cpu()}


def denoising_loss(
    unet: torch.nn.Module, scheduler: DDPMScheduler, vae: AutoencoderKL, batch: dict[str, Tensor]
) -> Tensor:
    """Squared error of the prediction at random timesteps. Crops count as whole images."""
    with torch.no_grad():  # in float32: this autoencoder overflows in float16
        latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
    eps = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy_latents = scheduler.add_noise(latents, eps, timesteps)
    size = batch["pixel_values"].shape[-1]
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=latents.device).repeat(len(latents), 1)
    added = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": time_ids}
    prediction = unet(noisy_latents, timesteps, batch["prompt_embeds"], added_cond_kwargs=added).sample
    target = eps if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, eps, timesteps)
    return F.mse_loss(prediction.float(), target)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = common.make_accelerator(args)
    rows = common.read_folder(args.train_data_dir)
    picked = memwatch.pick(rows)  # memwatch
    rows = picked.train  # memwatch: without the controls
    captions = encode([row["text"] for row in rows], args, accelerator)

    path, where = args.pretrained_model_name_or_path, {"revision": args.revision}
    weights = where | {"variant": args.variant, "dtype": torch.float32}
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae", **weights).requires_grad_(False).to(accelerator.device)
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", **weights).train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    noise_scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **where)

    train_dataloader = common.make_dataloader(common.ImageFolder(rows, captions, args), args)
    ranks, parameters = accelerator.num_processes, list(unet.parameters())
    plan = common.Plan.of(args, len(train_dataloader), ranks)
    optimizer, lr_scheduler = common.make_optimizer(parameters, plan, args, ranks)
    prepared = accelerator.prepare(unet, optimizer, train_dataloader, lr_scheduler)
    unet, optimizer, train_dataloader, lr_scheduler = prepared
    common.init_trackers(accelerator, "text-to-image-sdxl", args)
    options = {"config": args.memwatch_config, "resolution": args.resolution, "vae": vae}  # memwatch
    options |= {"max_train_steps": plan.max_train_steps}  # memwatch
    options |= {"probes": args.memwatch_probes, "controls": args.memwatch_controls}  # memwatch
    options |= {"scheduler": noise_scheduler, "output_dir": args.output_dir / "memwatch"}  # memwatch
    watch = memwatch.MemWatch(accelerator, unet, path, picked, **options)  # memwatch

    global_step = common.load_checkpoint(accelerator, args)
    progress = tqdm(initial=global_step, total=plan.max_train_steps, disable=not accelerator.is_main_process)
    for batch in plan.batches(train_dataloader, global_step, watch):  # memwatch: it guards the batches
        with accelerator.accumulate(unet):
            loss = denoising_loss(unet, noise_scheduler, vae, batch)
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
        trained = accelerator.unwrap_model(unet, keep_torch_compile=False)
        pipeline = StableDiffusionXLPipeline.from_pretrained(path, unet=trained, vae=vae, **where)
        pipeline.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
