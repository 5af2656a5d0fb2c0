"""Fine-tune Stable Diffusion 1.x or 2.x on a folder of images, watched by memwatch.

    python train_examples/train_text_to_image.py --train_data_dir my_images --resolution 64 \\
        --pretrained_model_name_or_path train_examples/assets/tiny-sd

The folder holds the images and a ``metadata.jsonl`` with one object a line: ``{"file_name": "1.png", "text": "a photo of a cat"}``.
Options are named as in diffusers' script of the same name; what memwatch adds ends in ``# memwatch``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from memwatch import MemWatch  # memwatch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
VALIDATION_INFERENCE_STEPS = 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="folder or hub id of a Stable Diffusion 1.x or 2.x pipeline")
    add("--revision")
    add("--variant", help="of the weight files, such as fp16")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="instead of what the scheduler's config says")
    add("--train_data_dir", type=Path, required=True, help="folder of images with metadata.jsonl (file_name, text)")
    add("--resolution", type=int, default=512)
    add("--center_crop", action="store_true", help="crop the middle; otherwise a random square")
    add("--random_flip", action="store_true")
    add("--dataloader_num_workers", type=int, default=0)
    add("--train_batch_size", type=int, default=16, help="a device")
    add("--num_train_epochs", type=int, default=100)
    add("--max_train_steps", type=int, help="optimizer steps; goes before --num_train_epochs")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: what `accelerate config` says")
    add("--learning_rate", type=float, default=1e-4)
    add("--lr_scheduler", default="constant", choices=[kind.value for kind in SchedulerType])
    add("--lr_warmup_steps", type=int, default=0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--snr_gamma", type=float, help="weight the loss by min-SNR-gamma (Hang et al. 2023); they recommend 5")
    add("--use_ema", action="store_true", help="keep an average of the weights; it is validated and saved")
    add("--lora", action="store_true", help="train low-rank adapters of the attention layers instead of all weights")
    add("--rank", type=int, default=4, help="of the adapters")
    add("--seed", type=int, default=0)
    add("--output_dir", type=Path, default=Path("runs/text-to-image"))
    add("--logging_dir", default="logs", help="inside --output_dir")
    add("--report_to", default="tensorboard", help="tensorboard, wandb, another accelerate tracker, all, or none")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, help="the oldest go first")
    add("--resume_from_checkpoint", help="a checkpoint folder, or 'latest' in --output_dir")
    add("--validation_prompts", "--validation_prompt", nargs="+", default=[])
    add("--validation_steps", type=int, default=100, help="optimizer steps between validation images")
    add("--num_validation_images", type=int, default=4, help="a prompt")
    here = Path(__file__).resolve().parent
    add("--memwatch_config", default=here.parent / "configs" / "default.yaml", help="YAML file")  # memwatch
    add("--memwatch_probes", type=Path, help="image folder or text file of prompts; default: the first 8 training images")  # memwatch
    add("--memwatch_controls", type=Path, help="image folder of the same kind, held out from training")  # memwatch
    add("--no_memwatch", action="store_true", help="train without memwatch")  # memwatch
    return parser.parse_args(argv)


class DataError(ValueError):
    """Training data that cannot be used; the message names the file and says what is expected."""


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError on some broken files
        raise DataError(f"{path}: expected a readable image file, got: {error}") from error


def read_metadata(folder: Path) -> list[dict[str, Any]]:
    """Rows ``{"image": path, "text": caption}`` of ``metadata.jsonl``."""
    metadata = folder / "metadata.jsonl"
    expected = """expected one JSON object a line, such as {"file_name": "1.png", "text": "a photo of a cat"}"""
    if not metadata.is_file():
        raise DataError(f"{metadata}: not found; {expected}")
    rows = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({"image": folder / row["file_name"], "text": row["text"] + ""})  # TypeError unless both are strings
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{metadata}, line {number}: {expected}; got {line.strip()[:200]}") from error
        with opened(rows[-1]["image"]):  # a wrong file shows now, broken pixels when they are read
            pass
    if not rows:
        raise DataError(f"{metadata}: empty; {expected}")
    return rows


class ImageFolder(Dataset[dict[str, Tensor]]):
    """Shuffled, cropped and tokenized training images. Order, crops and flips depend on seed, epoch and position alone."""

    def __init__(self, rows: list[dict[str, Any]], tokenizer: CLIPTokenizer, args: argparse.Namespace) -> None:
        self.rows, self.args = rows, args
        texts = [row["text"] for row in rows]
        length = tokenizer.model_max_length
        self.input_ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the prepared dataloader's ``set_epoch``."""
        self.epoch = epoch
        self.order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.args.seed, self.epoch, position))
        index, size = int(self.order[position]), self.args.resolution
        with opened(self.rows[index]["image"]) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        side = min(picture.size)
        left, top = (share * (length - side) for share, length in zip(rng.random(2), picture.size, strict=True))
        if self.args.center_crop:
            left, top = (picture.width - side) / 2, (picture.height - side) / 2
        picture = picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        if self.args.random_flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixel_values": pixels, "input_ids": self.input_ids[index]}


def load_models(args: argparse.Namespace, dtype: torch.dtype) -> tuple[dict[str, Any], UNet2DConditionModel, DDPMScheduler]:
    """The frozen parts in ``dtype``; the UNet, in float32 where it is trained; the noise schedule."""
    path, where = args.pretrained_model_name_or_path, {"revision": args.revision}
    weights = where | {"variant": args.variant}
    frozen = {
        "tokenizer": CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **where),
        "text_encoder": CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, **weights).requires_grad_(False),
        "vae": AutoencoderKL.from_pretrained(path, subfolder="vae", dtype=dtype, **weights).requires_grad_(False),
    }
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", dtype=dtype if args.lora else torch.float32, **weights)
    if args.lora:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
        cast_training_params(unet, torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **where)
    if args.prediction_type:
        scheduler.register_to_config(prediction_type=args.prediction_type)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"--prediction_type: expected epsilon or v_prediction, the scheduler says {scheduler.config.prediction_type!r}")
    return frozen, unet.train(), scheduler


def denoising_loss(
    unet: torch.nn.Module, scheduler: DDPMScheduler, frozen: dict[str, Any], batch: dict[str, Tensor], snr_gamma: float | None
) -> Tensor:
    """Squared error of the prediction at random timesteps, weighted by min(SNR, gamma) where asked."""
    vae = frozen["vae"]
    with torch.no_grad():
        latents = vae.encode(batch["pixel_values"].to(vae.dtype)).latent_dist.sample().float() * vae.config.scaling_factor
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
    """What a run is made of; ``unet``, ``optimizer``, ``lr_scheduler`` and ``train_dataloader`` as accelerate has prepared them."""

    args: argparse.Namespace
    accelerator: Accelerator
    rows: list[dict[str, Any]]
    train_dataloader: Any
    frozen: dict[str, Any]
    noise_scheduler: DDPMScheduler
    unet: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    ema: EMAModel | None
    optimizer: Any
    lr_scheduler: Any
    steps_per_epoch: int
    max_train_steps: int


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoint_only_trainable(accelerator: Accelerator, file_name: str = "trainable.safetensors") -> None:
    """Checkpoints hold the adapters and not the frozen model beneath."""

    def save(models: list[torch.nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        if accelerator.is_main_process:
            tensors = {name: p.detach().contiguous() for name, p in trainable(accelerator.unwrap_model(models[0])).items()}
            save_file(tensors, Path(folder) / file_name)
        weights.clear()

    def load(models: list[torch.nn.Module], folder: str) -> None:
        parameters, tensors = trainable(accelerator.unwrap_model(models.pop())), load_file(Path(folder) / file_name)
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def step_of(checkpoint: Path) -> int:
    name, _, step = checkpoint.name.rpartition("-")
    if name != "checkpoint" or not step.isdigit():
        raise ValueError(f"--resume_from_checkpoint: expected a folder named checkpoint-STEP or 'latest', got {str(checkpoint)!r}")
    return int(step)


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=step_of)


def save_checkpoint(run: Run, global_step: int) -> None:
    new, limit = run.args.output_dir / f"checkpoint-{global_step}", run.args.checkpoints_total_limit
    run.accelerator.save_state(str(new))
    if run.accelerator.is_main_process and limit:
        others = [path for path in checkpoints(run.args.output_dir) if path != new]
        for old in others[: max(0, len(others) + 1 - limit)]:
            shutil.rmtree(old)


def load_checkpoint(run: Run) -> int:
    """Returns the step to go on from."""
    wanted = run.args.resume_from_checkpoint
    if wanted is None:
        return 0
    found = checkpoints(run.args.output_dir) if wanted == "latest" else [Path(wanted)]
    if not found:
        run.accelerator.print(f"--resume_from_checkpoint latest: no checkpoint in {run.args.output_dir}, starting anew")
        return 0
    global_step = step_of(found[-1])
    run.accelerator.load_state(str(found[-1]))
    if run.ema is not None:
        run.ema.to(run.accelerator.device)
    return global_step


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
    """The same seeds every time, so that only the weights differ, and generators of their own, so that training goes on undisturbed."""
    args, accelerator = run.args, run.accelerator
    unet = accelerator.unwrap_model(run.unet).eval()
    pipeline = make_pipeline(args, **run.frozen, unet=unet, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with averaged(run.ema, run.parameters), accelerator.autocast():
        for prompt in args.validation_prompts:
            generators = [torch.Generator(accelerator.device).manual_seed(args.seed + i) for i in range(args.num_validation_images)]
            made = pipeline([prompt] * len(generators), num_inference_steps=VALIDATION_INFERENCE_STEPS, generator=generators)
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
    """A whole pipeline, or the adapters; averaged weights where they were asked for."""
    unet = run.accelerator.unwrap_model(run.unet, keep_torch_compile=False)
    with averaged(run.ema, run.parameters):
        if run.args.lora:
            StableDiffusionPipeline.save_lora_weights(run.args.output_dir, unet_lora_layers=get_peft_model_state_dict(unet))
        else:
            make_pipeline(run.args, unet=unet).save_pretrained(run.args.output_dir)


def build(args: argparse.Namespace) -> Run:
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
    )  # fmt: skip
    set_seed(args.seed, device_specific=True)
    rows = read_metadata(args.train_data_dir)
    frozen, unet, noise_scheduler = load_models(args, DTYPES.get(accelerator.mixed_precision, torch.float32))
    parameters = list(trainable(unet).values())
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "weight_decay": args.adam_weight_decay}
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, **adam)
    # A generator of its own: starting an epoch must not draw from the stream of noise and timesteps, or resuming would shift it.
    data, own = ImageFolder(rows, frozen["tokenizer"], args), torch.Generator()
    train_dataloader = DataLoader(data, args.train_batch_size, num_workers=args.dataloader_num_workers, generator=own)
    ranks = accelerator.num_processes
    steps_per_epoch = math.ceil(math.ceil(len(train_dataloader) / ranks) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    ticks = {"num_warmup_steps": args.lr_warmup_steps * ranks, "num_training_steps": max_train_steps * ranks}  # accelerate: one a rank
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **ticks)
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(unet, optimizer, train_dataloader, lr_scheduler)
    frozen["vae"].to(accelerator.device)
    frozen["text_encoder"].to(accelerator.device)
    ema = EMAModel(parameters) if args.use_ema else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    if args.lora:
        checkpoint_only_trainable(accelerator)
    if accelerator.is_main_process:
        accelerator.init_trackers("text-to-image", config={key: str(value) for key, value in vars(args).items()})
    steps = (steps_per_epoch, max_train_steps)
    return Run(args, accelerator, rows, train_dataloader, frozen, noise_scheduler, unet, parameters, ema, optimizer, lr_scheduler, *steps)


def train_on(run: Run, batch: dict[str, Tensor]) -> Tensor:
    """One batch forward and backward; an optimizer step where enough have been accumulated. Returns the loss."""
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
    accelerator, train_dataloader = run.accelerator, run.train_dataloader
    watch = None  # memwatch
    if not args.no_memwatch:  # memwatch
        watch = MemWatch(  # memwatch
            accelerator, run.unet, args.pretrained_model_name_or_path, config=args.memwatch_config,  # memwatch
            probes=args.memwatch_probes or run.rows[:8], controls=args.memwatch_controls, resolution=args.resolution,  # memwatch
            **run.frozen, scheduler=run.noise_scheduler, ema=run.ema, output_dir=args.output_dir / "memwatch",  # memwatch
        )  # memwatch  # fmt: skip

    global_step = load_checkpoint(run)
    first_epoch, steps_done = divmod(global_step, run.steps_per_epoch)
    resumed = skip_first_batches(train_dataloader, steps_done * args.gradient_accumulation_steps)  # what is left of that epoch
    if watch is not None:  # memwatch
        resumed, train_dataloader = watch.guard(resumed), watch.guard(train_dataloader)  # memwatch
    progress = tqdm(initial=global_step, total=run.max_train_steps, disable=not accelerator.is_main_process)
    losses: list[Tensor] = []
    for epoch in range(first_epoch, math.ceil(run.max_train_steps / run.steps_per_epoch)):
        batches = resumed if epoch == first_epoch else train_dataloader
        batches.set_epoch(epoch)
        for batch in batches:
            if global_step >= run.max_train_steps:
                break
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
            if global_step % args.checkpointing_steps == 0:
                save_checkpoint(run, global_step)
            if args.validation_prompts and global_step % args.validation_steps == 0 and accelerator.is_main_process:
                log_validation(run, global_step)
        if watch is not None and watch.should_stop:  # memwatch
            accelerator.print(f"memwatch stopped training at step {global_step}: {watch.stop_reason}")  # memwatch
            break  # memwatch

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_result(run)
    accelerator.end_training()


if __name__ == "__main__":
    main()
