"""The protocol: what is measured at every event of every run, and what stays the same over a run's events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memwatch.bench.items import PLANTED, SIZE, Item, general_batch, unused_captions
from memwatch.config import CurvatureConfig, LevelsConfig, SamplingConfig
from memwatch.denoiser import Components, Conditioning, StableDiffusion
from memwatch.measure.images import to_pixels
from memwatch.measure.prepare import PreparedProbe, prepare
from memwatch.measure.probes import Probe
from memwatch.measure.views import View, reference_view

LEVELS = LevelsConfig(timesteps=(61, 141, 301, 501, 701), draws=8)
CURVATURE = CurvatureConfig(vectors=1, tile=4, batch_size=40)
GENERATION = SamplingConfig(num_inference_steps=20, guidance_scale=2.0)
PUBLISHED = SamplingConfig(num_inference_steps=50, guidance_scale=7.5)
PUBLISHED_VECTORS = 16
PROMPT_DRAWS = 4  # of test vectors, at the one noisy latent of a prompt probe
RENOISED = (61, 141, 301, 501)  # timesteps at which generations are looked at again
SEED_DRAWS = (4, 2, 1, 1)  # noise draws of the generations of one prompt: 4 draws of 1 seed, 2 of 2, 1 of 4
NUM_PROMPTS = {"prompt-control": 16, "prompt-held-out": 12}  # captions never trained on, as prompt probes
NUM_SEEDS = 4  # generations of a planted item; one of every other
MAX_SEEDS = 64  # of one caption that many planted items share
POOL = 256  # pictures that are no copies: a copy is nearer to its item than a third of its distance to the nearest one


def event_file(home: Path, step: int) -> Path:
    """The tensors of one event of the run in ``home``; its plain numbers lie beside it as ``.json``."""
    return home / f"event_{step:05d}.safetensors"


@dataclass(frozen=True)
class Bench:
    """What stays the same over a run's events.

    Attributes:
        prepared, views: one per item.
        prompts: prompt probes: the planted items' captions, where each has its own, and captions never trained on.
        pool: ``(POOL, SIZE, SIZE, 3)`` in [0, 1], as the autoencoder gives them back.
    """

    denoiser: StableDiffusion
    parts: Components
    items: Sequence[Item]
    prepared: Sequence[PreparedProbe]
    views: Sequence[View]
    prompts: Sequence[PreparedProbe]
    unconditional: Conditioning
    pool: np.ndarray
    seed: int

    @classmethod
    def of(
        cls,
        denoiser: StableDiffusion,
        parts: Components,
        items: Sequence[Item],
        seed: int,
        levels: LevelsConfig = LEVELS,
    ) -> Bench:
        prepared = prepare([Probe(i.caption, i.probe, name=i.name) for i in items], denoiser, parts, SIZE)
        prompts = prepare(prompt_probes(items, seed), denoiser, parts, SIZE)
        views = [reference_view(p, denoiser, levels, seed) for p in prepared]
        others = [np.asarray(picture) for _, picture in general_batch(seed + 5000, 0, POOL)]
        unconditional = denoiser.encode("", parts, SIZE)
        return cls(denoiser, parts, items, prepared, views, prompts, unconditional, as_decoded(others, parts.vae), seed)

    @property
    def latent_shape(self) -> torch.Size:
        """``(c, h, w)``"""
        return self.views[0].noisy_latents.shape[2:]

    @cached_property
    def targets(self) -> dict[str, np.ndarray]:
        """Every item's probe as the autoencoder gives it back, ``(SIZE, SIZE, 3)`` in [0, 1]."""
        return {i.name: as_decoded([np.asarray(i.probe)], self.parts.vae)[0] for i in self.items}


def prompt_probes(items: Sequence[Item], seed: int) -> list[Probe]:
    """The planted items' captions, and as many captions of the same kind that were never trained on as are needed.

    None where planted items share a caption: then no prompt can be told to be an item's.
    """
    planted = [item for item in items if item.kind in PLANTED]
    if len({item.caption for item in planted}) < len(planted) or len(planted) == 0:
        return []
    free = iter(unused_captions(seed, sum(NUM_PROMPTS.values())))
    others = [Probe(next(free), name=f"{name}-{i:02d}") for name, n in NUM_PROMPTS.items() for i in range(n)]
    return [Probe(item.caption, name=item.name) for item in planted] + others


@torch.no_grad()
def as_decoded(pictures: Sequence[np.ndarray], vae: Any) -> np.ndarray:
    """RGB uint8 pictures through the autoencoder and back, ``(n, SIZE, SIZE, 3)`` in [0, 1].

    What the autoencoder loses is nobody's copying error.
    """
    parts = torch.split(to_pixels(pictures), 32)
    back = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in parts])
    decoded: np.ndarray = ((back.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    return decoded
