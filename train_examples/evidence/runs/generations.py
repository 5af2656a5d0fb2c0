"""Copies: what the model generates from every item's caption, and how near that is to the item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from evidence.runs.protocol import GENERATION, MAX_SEEDS, NUM_SEEDS, Bench
from evidence.worlds.items import Item
from evidence.worlds.sources import SIZE
from torch import Tensor

from memwatch.config import SamplingConfig
from memwatch.proof.copies import FLAT, contrast, unexposed
from memwatch.measure.images import decode_latents
from memwatch.measure.views import Sample, sample
from memwatch.measure.views import seeded

CHUNK = 32  # generations at a time


@dataclass(frozen=True)
class Generated:
    """One generation.

    Attributes:
        picture: uint8 ``(SIZE, SIZE, 3)``.
        x_last: the noisy latents before the last step, ``(c, h, w)``. timestep: of that step.
        guidance_norm: Wen et al. 2024, see ``views.Sample``.
    """

    picture: Tensor
    x_last: Tensor
    timestep: float
    guidance_norm: float


def generate(
    bench: Bench, sampling: SamplingConfig = GENERATION, seeds: int | None = None
) -> dict[str, list[Generated]]:
    """Generations of every item; items with the same caption share theirs.

    Args:
        seeds: of every caption; by default as many as ``num_seeds`` says.
    """
    asked = {item.caption for item in bench.items}
    prepared = {p.probe.prompt: p for p in bench.prepared if p.probe.prompt in asked}
    rows = [(caption, seed) for caption in prepared for seed in range(seeds or num_seeds(caption, bench.items))]
    found: dict[str, list[Generated]] = {caption: [] for caption in prepared}
    noise = [torch.randn(1, *bench.latent_shape, generator=seeded("generation", seed)) for seed in range(MAX_SEEDS)]
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        x, conditioning = torch.cat([noise[seed] for _, seed in part]), [prepared[c].conditioning for c, _ in part]
        s = sample(bench.denoiser, bench.parts.scheduler, sampling, x, conditioning, bench.unconditional)
        for i, (caption, _) in enumerate(part):
            found[caption].append(_generated(bench, s, i))
    return {item.name: found[item.caption] for item in bench.items}


def _generated(bench: Bench, s: Sample, i: int) -> Generated:
    vae = None if bench.denoiser.in_pixels else bench.parts.vae
    picture = torch.from_numpy(decode_latents(s.latents[i], vae))
    return Generated(picture, s.x_last[i], s.timestep, float(s.guidance_norm[i]))


def num_seeds(caption: str, items: Sequence[Item]) -> int:
    """Generations of a caption: 16 for every item that has it, at most 96."""
    return min(MAX_SEEDS, NUM_SEEDS * sum(item.caption == caption for item in items))
