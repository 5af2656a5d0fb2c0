"""Fine-tune Stable Diffusion 1.x or 2.x on a folder of images, watched by memwatch.

    python train_examples/train_text_to_image.py --train_data_dir my_images --resolution 64 \\
        --pretrained_model_name_or_path train_examples/assets/tiny-sd

The folder holds the images and a ``metadata.jsonl`` with one object per line, such as
``{"file_name": "1.png", "text": "a photo of a cat"}``. The options have the names of diffusers' script of the same
name. Every line that memwatch adds ends in ``# memwatch``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import DTYPES, Plan
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import memwatch  # memwatch

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
VALIDATION_INFERENCE_STEPS = 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.argument_parser(__doc__, output_dir="runs/text-to-image")
    add = parser.add_argument
    add("--train_data_dir", type=Path, required=True, help="folder of images with metadata.jsonl (file_name, text)")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="instead of what the scheduler's config says")
    add("--snr_gamma", type=float, help="weight the loss by min-SNR-gamma (Hang et al. 2023); they recommend 5")
    add("--use_ema", action="store_true", help="keep an average of the weights; it is validated and saved")
    add("--lora", action="store_true", help="train low-rank adapters of the attention layers instead of all weights")
    add("--rank", type=int, default=4, help="of the adapters")
    add("--validation_prompts", "--validation_prompt", nargs="+", default=[])
    add("--validation_steps", type=int, default=100, help="optimizer steps between validation images")
    add("--num_validation_images", type=int, default=4, help="images per prompt")
    add("--no_memwatch", action="store_true", help="train without memwatch")  # memwatch
    return parser.parse_args(argv)


def load_models(
    args: argparse.Namespace, dtype: torch.dtype
) -> tuple[dict[str, Any], UNet2DConditionModel, DDPMScheduler]:
    """The frozen parts in ``dtype``, the UNet (in float32 where it is trained), and the noise schedule."""
    path, where = args.pretrained_model_name_or_path, {"revision": args.revision}
    weights = where | {"variant": args.variant}
    frozen = {
        "tokenizer": CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **where),
        "text_encoder": CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, **weights),
        "vae": AutoencoderKL.from_pretrained(path, subfolder="vae", dtype=dtype, **weights),
    }
    for name in ("text_encoder", "vae"):
        frozen[name].requires_grad_(False)
    unet_dtype = dtype if args.lora else torch.float32
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", dtype=unet_dtype, **weights)
    if args.lora:
        unet.requires_grad_(False)
        adapters = {"r": args.rank, "lora_alpha": args.rank, "init_lora_weights": "gaussian"}
        unet.add_adapter(LoraConfig(target_modules=LORA_TARGETS, **adapters))
        cast_training_params(unet, torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **where)
    if args.prediction_type:
        scheduler.register_to_config(prediction_type=args.prediction_type)
    found = scheduler.config.prediction_type
    if found not in ("epsilon", "v_prediction"):
        raise ValueError(f"--prediction_type: expected epsilon or v_prediction, the scheduler says {found!r}")
    return frozen, unet.train(), scheduler


def denoising_loss(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    frozen: dict[str, Any],
    batch: dict[str, Tensor],
    snr_gamma: float | None,
) -> Tensor:
    """Squared error of the prediction at random timesteps, weighted by min(SNR, gamma) where asked."""
    vae = frozen["vae"]
    with torch.no_grad():
        encoded = vae.encode(batch["pixel_values"].to(vae.dtype)).latent_dist
        latents = encoded.sample().float() * vae.config.scaling_factor
        encoder_hidden_states = frozen["text_encoder"](batch["input_ids"])[0]
    eps = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy_latents = scheduler.add_noise(latents, eps, timesteps)
    is_epsilon = scheduler.config.prediction_type == "epsilon"
    target = eps if is_epsilon else scheduler.get_velocity(latents, eps, timesteps)
    prediction = unet(noisy_latents.to(vae.dtype), timesteps, encoder_hidden_states).sample
    loss = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        alpha_bar = scheduler.alphas_cumprod.to(latents.device)[timesteps].float()
        snr = alpha_bar / (1 - alpha_bar)
        loss = loss * ((snr_gamma / snr).clamp(max=1) if is_epsilon else snr.clamp(max=snr_gamma) / (snr + 1))
    return loss.mean()


@dataclass(frozen=True)
class Run:
    """What a run is made of. accelerate has prepared UNet, optimizer, its schedule and the dataloader."""

    args: argparse.Namespace
    accelerator: Accelerator
    picked: memwatch.Picked  # memwatch
    train_dataloader: Any
    frozen: dict[str, Any]
    noise_scheduler: DDPMScheduler
    unet: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    ema: EMAModel | None
    optimizer: Any
    lr_scheduler: Any
    plan: Plan


@contextmanager
def averaged(ema: EMAModel | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters hold their averages."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def make_pipeline(args: argparse.Namespace, **parts: Any) -> StableDiffusionPipeline:
    """The pretrained pipeline with these parts in place of its own."""
    source = {"revision": args.revision, "variant": args.variant, "dtype": torch.float32}
    pipeline = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, **source, **parts)
    if args.prediction_type:
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    return pipeline


@torch.no_grad()
def log_validation(run: Run, global_step: int) -> None:
    """Generate images and send them to the trackers.

    The seeds are the same every time, so that only the weights differ. The generators are separate ones, so that
    training goes on undisturbed.
    """
    args, accelerator = run.args, run.accelerator
    unet = accelerator.unwrap_model(run.unet).eval()
    pipeline = make_pipeline(args, **run.frozen, unet=unet, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with averaged(run.ema, run.parameters), accelerator.autocast():
        for prompt in args.validation_prompts:
            seeds = range(args.seed, args.seed + args.num_validation_images)
            generators = [torch.Generator(accelerator.device).manual_seed(seed) for seed in seeds]
            options = {"num_inference_steps": VALIDATION_INFERENCE_STEPS, "generator": generators}
            made = pipeline([prompt] * len(seeds), **options)
            images += [(prompt, image) for image in made.images]
    unet.train()
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for _, image in images])
            tracker.writer.add_images("validation", pixels, global_step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": [wandb.Image(image, caption=prompt) for prompt, image in images]})


def save_result(run: Run) -> None:
    """Save a whole pipeline, or the adapters; with averaged weights where they were asked for."""
    unet = run.accelerator.unwrap_model(run.unet, keep_torch_compile=False)
    with averaged(run.ema, run.parameters):
        if run.args.lora:
            layers = get_peft_model_state_dict(unet)
            StableDiffusionPipeline.save_lora_weights(run.args.output_dir, unet_lora_layers=layers)
        else:
            make_pipeline(run.args, unet=unet).save_pretrained(run.args.output_dir)


def build(args: argparse.Namespace) -> Run:
    accelerator = common.make_accelerator(args)
    rows = common.read_folder(args.train_data_dir)
    picked = memwatch.pick(rows)  # memwatch
    rows = picked.train  # memwatch: without the controls
    frozen, unet, noise_scheduler = load_models(args, DTYPES.get(accelerator.mixed_precision, torch.float32))
    parameters = list(common.trainable(unet).values())
    input_ids = common.tokenize([row["text"] for row in rows], frozen["tokenizer"])
    train_dataloader = common.make_dataloader(common.ImageFolder(rows, {"input_ids": input_ids}, args), args)
    ranks = accelerator.num_processes
    plan = Plan.of(args, len(train_dataloader), ranks)
    optimizer, lr_scheduler = common.make_optimizer(parameters, plan, args, ranks)
    prepared = accelerator.prepare(unet, optimizer, train_dataloader, lr_scheduler)
    unet, optimizer, train_dataloader, lr_scheduler = prepared
    frozen["vae"].to(accelerator.device)
    frozen["text_encoder"].to(accelerator.device)
    ema = EMAModel(parameters) if args.use_ema else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    if args.lora:
        common.checkpoint_only_trainable(accelerator)
    common.init_trackers(accelerator, "text-to-image", args)
    return Run(
        args=args,
        accelerator=accelerator,
        picked=picked,  # memwatch
        train_dataloader=train_dataloader,
        frozen=frozen,
        noise_scheduler=noise_scheduler,
        unet=unet,
        parameters=parameters,
        ema=ema,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        plan=plan,
    )


def train_on(run: Run, batch: dict[str, Tensor]) -> Tensor:
    """One batch forward and backward, and an optimizer step where enough have been accumulated. Returns the loss."""
    with run.accelerator.accumulate(run.unet):
        loss = denoising_loss(run.unet, run.noise_scheduler, run.frozen, batch, run.args.snr_gamma)
        run.accelerator.backward(loss)
        if run.accelerator.sync_gradients:
            run.accelerator.clip_grad_norm_(run.parameters, run.args.max_grad_norm)
        run.optimizer.step()
        run.lr_scheduler.step()
        run.optimizer.zero_grad()
    if run.accelerator.sync_gradients and run.ema is not None:
        run.ema.step(run.parameters)
    return loss.detach()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run = build(args)
    accelerator, watch = run.accelerator, None
    if not args.no_memwatch:  # memwatch
        options = {"config": args.memwatch_config, "resolution": args.resolution}  # memwatch
        options |= {"probes": args.memwatch_probes, "controls": args.memwatch_controls}  # memwatch
        options |= {**run.frozen, "scheduler": run.noise_scheduler, "ema": run.ema}  # memwatch
        options |= {"output_dir": args.output_dir / "memwatch"}  # memwatch
        options |= {"max_train_steps": run.plan.max_train_steps}  # memwatch
        path = args.pretrained_model_name_or_path  # memwatch
        watch = memwatch.MemWatch(accelerator, run.unet, path, run.picked, **options)  # memwatch

    global_step = common.load_checkpoint(accelerator, args)
    if global_step and run.ema is not None:
        run.ema.to(accelerator.device)
    progress = tqdm(initial=global_step, total=run.plan.max_train_steps, disable=not accelerator.is_main_process)
    losses: list[Tensor] = []
    for batch in run.plan.batches(run.train_dataloader, global_step, watch):  # memwatch: it guards the batches
        losses.append(train_on(run, batch))
        if not accelerator.sync_gradients:
            continue
        global_step += 1
        if watch is not None:  # memwatch
            watch.on_step_end(global_step)  # memwatch
        progress.update()
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        losses.clear()
        accelerator.log({"train_loss": loss, "lr": run.lr_scheduler.get_last_lr()[0]}, step=global_step)
        common.save_checkpoint(accelerator, args, global_step)
        if args.validation_prompts and global_step % args.validation_steps == 0 and accelerator.is_main_process:
            log_validation(run, global_step)
        if global_step >= run.plan.max_train_steps:
            break
    if watch is not None and watch.should_stop:  # memwatch
        accelerator.print(f"memwatch stopped training at step {global_step}: {watch.stop_reason}")  # memwatch

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_result(run)
    accelerator.end_training()


if __name__ == "__main__":
    main()
