"""The protocol: what is measured at every event of every run, and what stays the same over a run's events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memwatch.bench.items import SIZE, Item, general_batch
from memwatch.config import CurvatureConfig, LevelsConfig, SamplingConfig
from memwatch.denoiser import Components, Conditioning, StableDiffusion
from memwatch.measure.images import to_pixels
from memwatch.measure.prepare import PreparedProbe, prepare
from memwatch.measure.probes import Probe
from memwatch.measure.views import View, reference_view

LEVELS = LevelsConfig(timesteps=(21, 61, 141, 301), draws=8)
CURVATURE = CurvatureConfig(vectors=4, tile=4, batch_size=32)
NULL_DRAWS = 2  # of the unconditional branch
GENERATION = SamplingConfig(num_inference_steps=20, guidance_scale=2.0)
PUBLISHED = SamplingConfig(num_inference_steps=50, guidance_scale=7.5)
PUBLISHED_VECTORS = 16
PROMPT_DRAWS = 4  # of test vectors, at the one noisy latent of a prompt probe
NUM_SEEDS = 4  # generations of a planted item; one of every other
POOL = 256  # pictures that are no copies: a copy is nearer to its item than a third of its distance to the nearest one


def event_file(home: Path, step: int) -> Path:
    """The tensors of one event of the run in ``home``; its plain numbers lie beside it as ``.json``."""
    return home / f"event_{step:05d}.safetensors"


@dataclass(frozen=True)
class Bench:
    """What stays the same over a run's events.

    Attributes:
        prepared, views: one per item.
        pool: ``(POOL, SIZE, SIZE, 3)`` in [0, 1], as the autoencoder gives them back.
    """

    denoiser: StableDiffusion
    parts: Components
    items: Sequence[Item]
    prepared: Sequence[PreparedProbe]
    views: Sequence[View]
    unconditional: Conditioning
    pool: np.ndarray
    seed: int

    @classmethod
    def of(cls, denoiser: StableDiffusion, parts: Components, items: Sequence[Item], seed: int) -> Bench:
        prepared = prepare([Probe(i.caption, i.probe, name=i.name) for i in items], denoiser, parts, SIZE)
        views = [reference_view(p, denoiser, LEVELS, seed) for p in prepared]
        others = [np.asarray(picture) for _, picture in general_batch(seed + 5000, 0, POOL)]
        unconditional = denoiser.encode("", parts, SIZE)
        return cls(denoiser, parts, items, prepared, views, unconditional, as_decoded(others, parts.vae), seed)

    @property
    def latent_shape(self) -> torch.Size:
        """``(c, h, w)``"""
        return self.views[0].noisy_latents.shape[2:]

    @cached_property
    def targets(self) -> dict[str, np.ndarray]:
        """Every item's probe as the autoencoder gives it back, ``(SIZE, SIZE, 3)`` in [0, 1]."""
        return {i.name: as_decoded([np.asarray(i.probe)], self.parts.vae)[0] for i in self.items}


@torch.no_grad()
def as_decoded(pictures: Sequence[np.ndarray], vae: Any) -> np.ndarray:
    """RGB uint8 pictures through the autoencoder and back, ``(n, SIZE, SIZE, 3)`` in [0, 1].

    What the autoencoder loses is nobody's copying error.
    """
    parts = torch.split(to_pixels(pictures), 32)
    back = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in parts])
    decoded: np.ndarray = ((back.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    return decoded
