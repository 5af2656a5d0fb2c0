"""The trainer of the benchmark: ordinary denoising of any prediction type, whose step n depends on seed and n alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evidence.worlds.sources import SIZE
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from memwatch.denoiser import Components, Conditioning, Denoiser
from memwatch.measure.images import to_pixels
from memwatch.measure.weights import trainable


class Trainer:
    """AdamW with a rate that rises over 20 steps, falls evenly until ``decay_steps``, and then stays where it is.

    Args:
        last_rate: what is left of the rate in the end, as a share of it.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        parts: Components,
        decay_steps: int,
        learning_rate: float,
        seed: int,
        last_rate: float = 0.0,
    ) -> None:
        self.denoiser, self.parts, self.seed, self.step = denoiser, parts, seed, 0
        trained = [p for p in denoiser.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=1e-2)
        self.schedule = LambdaLR(self.optimizer, lambda n: min(1, (n + 1) / 20) * max(last_rate, 1 - n / decay_steps))
        self._captions: dict[str, Conditioning] = {}

    def train_on(self, pictures: list[Image.Image], captions: list[str]) -> float:
        """One optimizer step; its loss."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
        latents = self._latents(pictures)
        eps = torch.randn(latents.shape, generator=generator)
        schedule = self.denoiser.schedule
        timesteps = torch.randint(schedule.num_train_timesteps, (len(latents),), generator=generator)
        conditioning = self.denoiser.stack([self._encoded(caption) for caption in captions])
        output = self.denoiser.output(schedule.add_noise(latents, eps, timesteps), timesteps, conditioning)
        loss = F.mse_loss(output, self._target(latents, eps, timesteps))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.denoiser.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def _latents(self, pictures: list[Image.Image]) -> Tensor:
        pixels = to_pixels([np.asarray(picture) for picture in pictures])
        if self.denoiser.in_pixels:
            return pixels
        vae = self.parts.vae  # channels last, as the network is; encode_images would make the latents contiguous
        latents: Tensor = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        return latents

    def _encoded(self, caption: str) -> Conditioning:
        if caption not in self._captions:
            self._captions[caption] = self.denoiser.encode(caption, self.parts, SIZE)
        return self._captions[caption]

    def _target(self, latents: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """What the network's own output should be."""
        match self.denoiser.schedule.prediction_type:
            case "epsilon":
                return eps
            case "v_prediction":
                alpha, sigma = self.denoiser.schedule.alpha_sigma(timesteps, latents)
                return alpha * eps - sigma * latents
            case "flow":
                return eps - latents
            case other:
                raise ValueError(f"the benchmark does not train {other}")

    def save(self, file: Path) -> None:
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        part = file.with_suffix(".part")
        torch.save(state | {"step": self.step, "weights": trainable(self.denoiser.model)}, part)
        os.replace(part, file)

    def load(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.denoiser.model.load_state_dict(state["weights"], strict=False)
