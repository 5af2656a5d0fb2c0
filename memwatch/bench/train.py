"""One seeded, resumable fine-tune of the base on a planted set, looked at along the way."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from memwatch.bench.items import SIZE, batch, general_batch, looked_at
from memwatch.bench.look import look
from memwatch.bench.protocol import Bench, event_file
from memwatch.bench.worlds import WORLDS, Plan
from memwatch.denoiser import Components, StableDiffusion, load_components
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.images import to_pixels
from memwatch.measure.weights import lora_off, read_safetensors, trainable, write_safetensors


@dataclass(frozen=True)
class Run:
    """One training: a world (see ``worlds.WORLDS``) and a seed."""

    seed: int
    world: str

    @property
    def name(self) -> str:
        return f"{self.world}-{self.seed}"


def read_base(base: Path) -> tuple[nn.Module, Components]:
    """UNet and the rest of a tiny Stable Diffusion pipeline, float32, frozen but for the UNet."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    names, device = StableDiffusion.text_encoders, torch.device("cpu")
    parts = load_components(base, Components(None), needs_vae=True, text_encoders=names, device=device)
    return unet.to(memory_format=torch.channels_last), parts  # a tenth faster on a CPU


class Trainer:
    """Ordinary epsilon training whose step n depends on seed and n alone."""

    def __init__(self, unet: nn.Module, parts: Components, steps: int, learning_rate: float, seed: int) -> None:
        self.unet, self.parts, self.seed, self.steps, self.step = unet, parts, seed, steps, 0
        self.denoiser = StableDiffusion(unet, NoiseSchedule.from_scheduler(parts.scheduler))
        trained = [p for p in unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=1e-2)
        self.schedule = LambdaLR(self.optimizer, lambda n: min(1, (n + 1) / 20) * (1 - n / steps))
        self._captions: dict[str, Tensor] = {}

    def hidden(self, captions: list[str]) -> Tensor:
        for caption in set(captions) - self._captions.keys():
            self._captions[caption] = self.denoiser.encode(caption, self.parts, SIZE)["encoder_hidden_states"]
        return torch.stack([self._captions[caption] for caption in captions])

    def train_on(self, pictures: list[Image.Image], captions: list[str]) -> float:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
        pixels, vae = to_pixels([np.asarray(picture) for picture in pictures]), self.parts.vae
        with torch.no_grad():  # channels last, as the UNet is; encode_images would make them contiguous
            latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        eps = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(self.denoiser.schedule.num_train_timesteps, (len(latents),), generator=generator)
        conditioning = {"encoder_hidden_states": self.hidden(captions)}
        prediction = self.denoiser(self.denoiser.schedule.add_noise(latents, eps, timesteps), timesteps, conditioning)
        loss = F.mse_loss(prediction, eps)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def save(self, file: Path) -> None:
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        part = file.with_suffix(".part")
        torch.save(state | {"step": self.step, "weights": trainable(self.unet)}, part)
        os.replace(part, file)

    def load(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.unet.load_state_dict(state["weights"], strict=False)


def prepare_base(base: Path, folder: Path, plan: Plan) -> Path:
    """The base that every run starts from: tiny-sd taught plain backgrounds as well. Made once, shared by all runs."""
    file = folder / "base.safetensors"
    if file.is_file():
        return file
    unet, parts = read_base(base)
    trainer = Trainer(unet.train(), parts, plan.prepare_steps, plan.prepare_learning_rate, seed=99)
    for step in tqdm(range(plan.prepare_steps), desc="base"):
        captions, pictures = zip(*general_batch(trainer.seed, step, plan.batch_size), strict=True)
        trainer.train_on(list(pictures), list(captions))
    write_safetensors(file, trainable(unet))
    return file


def add_lora(unet: nn.Module, rank: int, seed: int) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    adapter: Any = unet
    adapter.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def run_one(run: Run, base: Path, folder: Path, plan: Plan | None = None) -> None:
    """Train and look, from where it was interrupted. Writes ``folder/NAME/event_NNNNN.safetensors`` and ``.json``.

    Args:
        plan: instead of the world's own.
    """
    world = WORLDS[run.world]
    plan, home = plan or world.plan, folder / run.name
    home.mkdir(parents=True, exist_ok=True)
    unet, parts = read_base(base)
    unet.load_state_dict(read_safetensors(prepare_base(base, folder, plan)))
    if world.lora:
        add_lora(unet, plan.lora_rank, run.seed)
    items = world.items(run.seed)
    (home / "run.json").write_text(json.dumps(dataclasses.asdict(plan) | dataclasses.asdict(run)), encoding="utf-8")
    learning_rate = plan.lora_learning_rate if world.lora else plan.learning_rate
    trainer = Trainer(unet.train(), parts, plan.steps, learning_rate, run.seed)
    if (checkpoint := home / "checkpoint.pt").is_file():
        trainer.load(checkpoint)
    bench = Bench.of(trainer.denoiser, parts, looked_at(items), run.seed, world.levels)
    with tqdm(total=plan.steps, initial=trainer.step, desc=run.name) as bar:
        while True:
            if trainer.step in plan.events and not event_file(home, trainer.step).is_file():
                _event(
                    bench, trainer, home, world.prompts and trainer.step in plan.events[-2:], trainer.step == plan.steps
                )
            if trainer.step >= plan.steps:
                break
            captions, pictures = zip(*batch(items, run.seed, trainer.step, plan.batch_size, world.dropout), strict=True)
            loss = trainer.train_on(list(pictures), list(captions))
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


def _event(bench: Bench, trainer: Trainer, home: Path, late: bool, last: bool) -> None:
    """Measure. At the last two events, which patience needs, prompt probes are measured as well."""
    started = time.perf_counter()
    trainer.save(home / "checkpoint.pt")
    trainer.unet.eval()
    tensors, numbers = look(bench, _starting_weights(home, trainer) if late else None, last)
    trainer.unet.train()
    file = event_file(home, trainer.step)
    numbers |= {"step": trainer.step, "seconds": time.perf_counter() - started}
    file.with_suffix(".json").write_text(json.dumps(numbers), encoding="utf-8")
    write_safetensors(file, tensors)


def _starting_weights(home: Path, trainer: Trainer) -> Mapping[str, Tensor]:
    """What was trained, as it was before training: the base, or LoRA turned off."""
    return lora_off(trainer.unet) or read_safetensors(home.parent / "base.safetensors")
