"""Copies: what the model generates from every item's caption, and how near that is to the item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memwatch.bench.items import PLANTED, SIZE
from memwatch.bench.protocol import GENERATION, NUM_SEEDS, Bench
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
    """Generations of every item, and the Wen et al. 2024 norm: mean over steps and seeds, see ``views.Sample``."""
    rows = [
        (p, seed)
        for p, item in zip(bench.prepared, bench.items, strict=True)
        for seed in range(NUM_SEEDS if item.kind in PLANTED else 1)
    ]
    found: dict[str, list[Generated]] = {p.name: [] for p in bench.prepared}
    norms: dict[str, list[float]] = {p.name: [] for p in bench.prepared}
    noise = [torch.randn(1, *bench.latent_shape, generator=seeded("generation", seed)) for seed in range(NUM_SEEDS)]
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        x, conditioning = torch.cat([noise[seed] for _, seed in part]), [p.conditioning for p, _ in part]
        s = sample(bench.denoiser, bench.parts.scheduler, GENERATION, x, conditioning, bench.unconditional)
        for i, (p, _) in enumerate(part):
            picture = torch.from_numpy(decode_latents(s.latents[i], bench.parts.vae))
            found[p.name].append(Generated(picture, s.x_last[i]))
            norms[p.name].append(float(s.guidance_norm[i]))
    return found, {name: float(np.mean(values)) for name, values in norms.items()}


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
    return {i.name: _ratios(bench.targets[i.name], generated[i.name], mask, others) for i in bench.items}


def _ratios(target: np.ndarray, generated: Sequence[Generated], mask: np.ndarray, others: np.ndarray) -> list[float]:
    """Distance to the target over distance to the nearest of ``others``, inside the mask, all of them ``unexposed``.

    Below 1/3 is a copy (the 1/3 rule: Yoon et al. 2023; Bonnaire et al. 2025).
    """
    (target,) = unexposed(target[None], mask)
    pictures = unexposed(np.stack([g.picture.numpy() / 255 for g in generated]), mask)
    own = [np.linalg.norm(target - x) for x in pictures]
    nearest = [np.linalg.norm(others - x, axis=(1, 2)).min() for x in pictures]
    return [float(a / b) for a, b in zip(own, nearest, strict=True)]


def unexposed(pictures: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pixels ``(n, pixels, 3)`` inside a mask, without the mean of each channel and with unit contrast.

    A copy is one at any exposure: sampling of a small model leaves brightness to the initial noise, whose
    signal-to-noise ratio is not zero.
    """
    pixels = pictures[:, mask].astype(np.float64)
    pixels = pixels - pixels.mean(1, keepdims=True)
    scaled: np.ndarray = pixels / np.sqrt(np.square(pixels).mean((1, 2), keepdims=True) + 1e-8)
    return scaled
