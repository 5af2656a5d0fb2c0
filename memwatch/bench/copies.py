"""Copies: what the model generates from every item's caption, and how near that is to the item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memwatch.bench.items import PLANTED, SIZE, Item
from memwatch.bench.protocol import GENERATION, MAX_SEEDS, NUM_SEEDS, Bench
from memwatch.measure.copies import ratios, unexposed
from memwatch.measure.images import decode_latents
from memwatch.measure.views import sample, seeded

CHUNK = 32  # generations at a time


@dataclass(frozen=True)
class Generated:
    """One generation.

    Attributes:
        picture: uint8 ``(SIZE, SIZE, 3)``.
        x_last: the noisy latents before the last step, ``(c, h, w)``.
    """

    picture: Tensor
    x_last: Tensor


def generate(bench: Bench) -> tuple[dict[str, list[Generated]], dict[str, float]]:
    """Generations of every item, and the Wen et al. 2024 norm: mean over steps and seeds, see ``views.Sample``.

    Items with the same caption share their generations.
    """
    prepared = {p.probe.prompt: p for p in bench.prepared}
    rows = [(caption, seed) for caption in prepared for seed in range(num_seeds(caption, bench.items))]
    found: dict[str, list[Generated]] = {caption: [] for caption in prepared}
    norms: dict[str, list[float]] = {caption: [] for caption in prepared}
    noise = [torch.randn(1, *bench.latent_shape, generator=seeded("generation", seed)) for seed in range(MAX_SEEDS)]
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        x, conditioning = torch.cat([noise[seed] for _, seed in part]), [prepared[c].conditioning for c, _ in part]
        s = sample(bench.denoiser, bench.parts.scheduler, GENERATION, x, conditioning, bench.unconditional)
        for i, (caption, _) in enumerate(part):
            picture = torch.from_numpy(decode_latents(s.latents[i], bench.parts.vae))
            found[caption].append(Generated(picture, s.x_last[i]))
            norms[caption].append(float(s.guidance_norm[i]))
    mean = {caption: float(np.mean(values)) for caption, values in norms.items()}
    return {i.name: found[i.caption] for i in bench.items}, {i.name: mean[i.caption] for i in bench.items}


def num_seeds(caption: str, items: Sequence[Item]) -> int:
    """Generations of a caption: 4 for every planted item that has it, at most 64; one where none has."""
    planted = sum(item.caption == caption and item.kind in PLANTED for item in items)
    return min(MAX_SEEDS, NUM_SEEDS * planted) or 1


def copy_ratios(bench: Bench, generated: Mapping[str, list[Generated]]) -> dict[str, list[float]]:
    """How near each generation of a planted item is inside the item's mask: the measure of what is stored."""
    return {
        i.name: _ratios(bench.targets[i.name], generated[i.name], i.mask, unexposed(bench.pool, i.mask))
        for i in bench.items
        if i.kind in PLANTED
    }


def nearest_ratios(bench: Bench, generated: Mapping[str, list[Generated]]) -> dict[str, list[float]]:
    """The same for every item over the whole picture: f_mem's own way, which needs no mask."""
    mask = np.ones((SIZE, SIZE), dtype=bool)
    others = unexposed(bench.pool, mask)
    return {i.name: _ratios(bench.targets[i.name], generated[i.name][:NUM_SEEDS], mask, others) for i in bench.items}


def _ratios(target: np.ndarray, generated: Sequence[Generated], mask: np.ndarray, others: np.ndarray) -> list[float]:
    """Distance to the target over distance to the nearest of ``others``, which are ``unexposed``; see ``copies``."""
    (target,) = unexposed(target[None], mask)
    return ratios(target, unexposed(np.stack([g.picture.numpy() / 255 for g in generated]), mask), others)
