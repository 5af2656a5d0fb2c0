"""What diffusers' example scripts have in common: their parts, their losses, and the loop they all share."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from support import families as tiny
from support.builders import CONFIG, picture
from support.processes import new_process
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTokenizer

from memwatch import MemWatch, Probe

STEPS = 3


@dataclass
class Script:
    """What a script has at hand when its loop starts.

    Attributes:
        trained: prepared with the optimizer and the dataloader.
        loss: of a batch.
        watched, extra: MemWatch's ``model``, ``pretrained`` and further arguments.
        after: run after every optimizer step, before ``global_step`` counts on.
        gone: what the script deleted; must be gone.
    """

    accelerator: Accelerator
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    loss: Callable[[Any], Tensor]
    watched: tuple[Any, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    after: Callable[[], None] = lambda: None
    gone: list[Any] = field(default_factory=list)
    ema: EMAModel | None = None
    size: int = tiny.SIZE


def accelerator_of(folder: Path) -> Accelerator:
    new_process()
    set_seed(1)
    return Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)


def batches(**columns: Tensor) -> DataLoader:
    rows = [{name: column[i] for name, column in columns.items()} for i in range(len(next(iter(columns.values()))))]
    return DataLoader(rows, batch_size=2, shuffle=True)


def pixels(num: int, size: int = tiny.SIZE) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(picture(i, size))).permute(2, 0, 1) / 127.5 - 1 for i in range(num)])


def latents_of(vae: AutoencoderKL, values: Tensor) -> Tensor:
    with torch.no_grad():
        return (vae.encode(values).latent_dist.sample() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def denoising_loss(predict: Callable[[Tensor, Tensor], Tensor], scheduler: DDPMScheduler, latents: Tensor) -> Tensor:
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (len(latents),)).long()
    return nn.functional.mse_loss(predict(scheduler.add_noise(latents, noise, timesteps), timesteps).float(), noise)


def stable_diffusion(pretrained: Path):
    vae = AutoencoderKL.from_pretrained(pretrained, subfolder="vae").requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(pretrained, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(pretrained, subfolder="tokenizer")
    unet = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet").train()
    scheduler = DDPMScheduler.from_pretrained(pretrained, subfolder="scheduler")
    return vae, text_encoder, tokenizer, unet, scheduler


def ids_of(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def probes(prompt: str = "a photo of a cat", size: int = tiny.SIZE) -> list[Probe]:
    return [Probe(prompt, picture(0, size), name="shown"), Probe(prompt, seed=3, name="drawn")]


def train(script: Script, folder: Path, *, watched: bool) -> dict[str, Any]:
    """The loop that all these scripts share, with the README's lines where ``watched``."""
    accelerator, model = script.accelerator, script.trained
    accelerator.init_trackers("run")
    loader, watch = script.loader, None
    if watched:
        common = {"probes": probes(size=script.size), "config": CONFIG, "resolution": script.size, "strict": True}
        options = common | script.extra | {"ema": script.ema, "output_dir": str(folder / "memwatch")}
        watch = MemWatch(accelerator, *script.watched, **options)
        loader = watch.guard(loader)
    step, random_numbers = 0, []
    while step < STEPS:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(script.loss(batch))
                script.optimizer.step()
                script.optimizer.zero_grad()
            if accelerator.sync_gradients:
                script.after()
                step += 1
                if watch is not None:
                    watch.on_step_end(step)
                accelerator.log({"train_loss": 1.0}, step=step)
            random_numbers.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            if step >= STEPS:
                break
    accelerator.end_training()
    gc.collect()
    assert all(reference() is None for reference in script.gone)
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "optimizer": script.optimizer.state_dict()["state"],
        "ema": [p.clone() for p in script.ema.shadow_params] if script.ema else [],
        "random": random_numbers,
    }
