"""What the training scripts share: options, images with captions, checkpoints, and the batches left to train on."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import SchedulerType, get_scheduler
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from memwatch import MemWatch, ProbeError  # memwatch
from memwatch.measure.image_folder import read_image_folder

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


# --- options ---------------------------------------------------------------------------------------------------------


def argument_parser(description: str | None, *, output_dir: str) -> argparse.ArgumentParser:
    """Options of every script. They have the names of diffusers' scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="folder or hub id of a pipeline")
    add("--revision")
    add("--variant", help="which weight files to take, such as fp16")
    add("--resolution", type=int, default=512)
    add("--center_crop", action="store_true", help="crop the middle; otherwise a random square")
    add("--random_flip", action="store_true")
    add("--dataloader_num_workers", type=int, default=0)
    add("--train_batch_size", type=int, default=16, help="per device")
    add("--num_train_epochs", type=int, default=100)
    add("--max_train_steps", type=int, help="optimizer steps; overrides --num_train_epochs")
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
    add("--seed", type=int, default=0)
    add("--output_dir", type=Path, default=Path(output_dir))
    add("--logging_dir", default="logs", help="inside --output_dir")
    add("--report_to", default="tensorboard", help="tensorboard, wandb, another accelerate tracker, all, or none")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, help="how many to keep; the oldest are deleted first")
    add("--resume_from_checkpoint", help="a checkpoint folder, or 'latest' in --output_dir")
    add("--memwatch_config", default=CONFIGS / "default.yaml", help="YAML file")  # memwatch
    probes = "image folder, or text file of prompts, besides those picked"  # memwatch
    add("--memwatch_probes", type=Path, help=probes)  # memwatch
    controls = "folder of images of the same kind that are not trained on, besides those held out"  # memwatch
    add("--memwatch_controls", type=Path, help=controls)  # memwatch
    return parser


# --- data ------------------------------------------------------------------------------------------------------------


class DataError(ValueError):
    """Training data that cannot be used. The message names the file and says what is expected."""


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image in a file.

    Raises:
        DataError: the file is missing, is no image, or its pixels cannot be read.
    """
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError on some broken files
        raise DataError(f"{path}: expected a readable image file, got: {error}") from error


def read_folder(folder: Path, text: str | None = None) -> list[dict[str, Any]]:
    """Rows ``{"image": path, "text": caption}`` of an image folder as memwatch reads it; ``text`` for all of them.

    Raises:
        DataError: the folder cannot be read, or an image in it cannot be opened.
    """
    try:
        found = read_image_folder(folder).rows
    except ProbeError as error:
        raise DataError(str(error)) from error
    for row in found:
        with opened(row.file):  # a wrong file shows now, broken pixels show when they are read
            pass
    return [{"image": row.file, "text": row.caption if text is None else text} for row in found]


class ImageFolder(Dataset[dict[str, Tensor]]):
    """Training images, cropped. Crops and flips depend on seed, epoch and row alone.

    Args:
        rows: each with the path of its image as ``image``.
        tensors: more for the batch, one entry per row, such as ``input_ids``.
        args: ``seed``, ``resolution``, ``center_crop``, ``random_flip``.
    """

    def __init__(self, rows: list[dict[str, Any]], tensors: dict[str, Tensor], args: argparse.Namespace) -> None:
        self.rows, self.tensors, self.args = rows, tensors, args
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        rng, size = np.random.default_rng((self.args.seed, self.epoch, row)), self.args.resolution
        with opened(self.rows[row]["image"]) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        side = min(picture.size)
        left, top = (share * (length - side) for share, length in zip(rng.random(2), picture.size, strict=True))
        if self.args.center_crop:
            left, top = (picture.width - side) / 2, (picture.height - side) / 2
        picture = picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        if self.args.random_flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixel_values": pixels} | {name: tensor[row] for name, tensor in self.tensors.items()}


class Shuffled(Sampler[int]):
    """All rows in an order that depends on seed and epoch alone, and not on any random stream.

    So the start of an epoch leaves noise and timesteps as they are, and a resumed run repeats the unbroken one.
    """

    def __init__(self, data: ImageFolder, seed: int) -> None:
        self.data, self.seed, self.epoch = data, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the prepared dataloader's ``set_epoch``."""
        self.epoch = epoch
        self.data.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng((self.seed, self.epoch)).permutation(len(self.data)).tolist()


def tokenize(texts: list[str], tokenizer: Any) -> Tensor:
    """Token ids ``(texts, length)``, cut and padded to the tokenizer's length."""
    options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    ids: Tensor = tokenizer(texts, return_tensors="pt", **options).input_ids
    return ids


# --- a run -----------------------------------------------------------------------------------------------------------


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The run's accelerator. It also seeds every random stream, differently on every rank."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
    )
    set_seed(args.seed, device_specific=True)
    return accelerator


def make_dataloader(data: ImageFolder, args: argparse.Namespace, **options: Any) -> DataLoader[dict[str, Tensor]]:
    """The images in batches. Its generator, from which workers are seeded, is its own; see ``Shuffled``."""
    options |= {"num_workers": args.dataloader_num_workers, "generator": torch.Generator()}
    return DataLoader(data, args.train_batch_size, sampler=Shuffled(data, args.seed), **options)


@dataclass(frozen=True)
class Plan:
    """How long to train, in optimizer steps."""

    steps_per_epoch: int
    max_train_steps: int
    batches_per_step: int

    @classmethod
    def of(cls, args: argparse.Namespace, num_batches: int, ranks: int) -> Plan:
        """The plan of a run. ``num_batches`` counts those of the dataloader before accelerate shares it out."""
        batches_per_step = args.gradient_accumulation_steps
        steps_per_epoch = math.ceil(math.ceil(num_batches / ranks) / batches_per_step)
        return cls(steps_per_epoch, args.max_train_steps or args.num_train_epochs * steps_per_epoch, batches_per_step)

    def batches(
        self, train_dataloader: Any, global_step: int, watch: MemWatch | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """All batches after ``global_step``, until the loop has enough of them; ``watch`` guards them."""
        if global_step >= self.max_train_steps:
            return
        epoch, batches_done = self.place(global_step)
        guard = watch.guard if watch is not None else (lambda dataloader: dataloader)  # memwatch
        whole = guard(train_dataloader)
        loader = guard(skip_first_batches(train_dataloader, batches_done))
        while watch is None or not watch.should_stop:
            loader.set_epoch(epoch)
            yield from loader
            loader, epoch = whole, epoch + 1

    def place(self, global_step: int) -> tuple[int, int]:
        """Epoch of the batch after ``global_step``, and how many batches of that epoch were given before it."""
        epoch, steps_done = divmod(global_step, self.steps_per_epoch)
        return epoch, steps_done * self.batches_per_step


def make_optimizer(
    parameters: list[torch.nn.Parameter], plan: Plan, args: argparse.Namespace, ranks: int
) -> tuple[Any, Any]:
    """AdamW and its learning rate schedule, not yet prepared."""
    betas = (args.adam_beta1, args.adam_beta2)
    adam = {"betas": betas, "eps": args.adam_epsilon, "weight_decay": args.adam_weight_decay}
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, **adam)
    warmup, total = args.lr_warmup_steps * ranks, plan.max_train_steps * ranks  # accelerate ticks once per rank
    schedule = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    return optimizer, schedule


def init_trackers(accelerator: Accelerator, name: str, args: argparse.Namespace) -> None:
    if accelerator.is_main_process:
        accelerator.init_trackers(name, config={key: str(value) for key, value in vars(args).items()})


# --- checkpoints -----------------------------------------------------------------------------------------------------


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoint_only_trainable(accelerator: Accelerator, file_name: str = "trainable.safetensors") -> None:
    """Make checkpoints hold the adapters, and not the frozen model beneath them."""

    def save(models: list[torch.nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        if accelerator.is_main_process:
            parameters = trainable(accelerator.unwrap_model(models[0]))
            tensors = {name: parameter.detach().contiguous() for name, parameter in parameters.items()}
            save_file(tensors, Path(folder) / file_name)
        weights.clear()

    def load(models: list[torch.nn.Module], folder: str) -> None:
        parameters, tensors = trainable(accelerator.unwrap_model(models.pop())), load_file(Path(folder) / file_name)
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved.

    Raises:
        ValueError: the folder is not named ``checkpoint-STEP``.
    """
    name, _, step = checkpoint.name.rpartition("-")
    if name != "checkpoint" or not step.isdigit():
        expected = "expected a folder named checkpoint-STEP or 'latest'"
        raise ValueError(f"--resume_from_checkpoint: {expected}, got {str(checkpoint)!r}")
    return int(step)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=step_of)


def save_checkpoint(accelerator: Accelerator, args: argparse.Namespace, global_step: int) -> None:
    """Save a checkpoint every ``--checkpointing_steps`` steps, and delete those beyond the limit."""
    if global_step % args.checkpointing_steps:
        return
    new, limit = args.output_dir / f"checkpoint-{global_step}", args.checkpoints_total_limit
    accelerator.save_state(str(new))
    if accelerator.is_main_process and limit:
        others = [path for path in checkpoints(args.output_dir) if path != new]
        for old in others[: max(0, len(others) + 1 - limit)]:
            shutil.rmtree(old)


def load_checkpoint(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Load what ``--resume_from_checkpoint`` names. Returns the step to go on from."""
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return 0
    found = checkpoints(args.output_dir) if wanted == "latest" else [Path(wanted)]
    if not found:
        accelerator.print(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}, starting anew")
        return 0
    global_step = step_of(found[-1])
    accelerator.load_state(str(found[-1]))
    return global_step
