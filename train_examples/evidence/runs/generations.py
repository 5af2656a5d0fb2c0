"""Generations: what the model makes of every item's caption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from evidence.runs.protocol import GENERATION, MAX_SEEDS, NUM_SEEDS, Bench
from evidence.worlds.items import Item
from torch import Tensor

from memwatch.measure.images import decode_latents
from memwatch.measure.views import sample, seeded

CHUNK = 32  # generations at a time


def generate(bench: Bench) -> dict[str, list[Tensor]]:
    """Generations of every item, uint8 ``(SIZE, SIZE, 3)``; items with the same caption share theirs."""
    asked = {item.caption for item in bench.items}
    prepared = {p.probe.prompt: p for p in bench.prepared if p.probe.prompt in asked}
    rows = [(caption, seed) for caption in prepared for seed in range(num_seeds(caption, bench.items))]
    found: dict[str, list[Tensor]] = {caption: [] for caption in prepared}
    noise = [torch.randn(1, *bench.latent_shape, generator=seeded("generation", seed)) for seed in range(MAX_SEEDS)]
    vae = None if bench.denoiser.in_pixels else bench.parts.vae
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        x, conditioning = torch.cat([noise[seed] for _, seed in part]), [prepared[c].conditioning for c, _ in part]
        s = sample(bench.denoiser, bench.parts.scheduler, GENERATION, x, conditioning, bench.unconditional)
        for (caption, _), latents in zip(part, s.latents, strict=True):
            found[caption].append(torch.from_numpy(decode_latents(latents, vae)))
    return {item.name: found[item.caption] for item in bench.items}


def num_seeds(caption: str, items: Sequence[Item]) -> int:
    """Generations of a caption: 16 for every item that has it, at most 96."""
    return min(MAX_SEEDS, NUM_SEEDS * sum(item.caption == caption for item in items))
