"""The protocol: what is measured at every event of every run, and what stays the same over a run's events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence.worlds.items import Item, Kind
from evidence.worlds.sources import SIZE

from memwatch.config import LevelsConfig, MemWatchConfig, SamplingConfig
from memwatch.denoiser import Components, Conditioning, Denoiser
from memwatch.measure.images import to_pixels
from memwatch.measure.prepare import PreparedProbe, prepare
from memwatch.measure.probes import Probe
from memwatch.measure.views import View, reference_view

SHIPPED = MemWatchConfig()
DRAWS, CURVATURE = SHIPPED.levels.draws, SHIPPED.curvature
TRUTH = LevelsConfig(timesteps=(100, 300, 500, 700, 900), draws=4)  # at which twins are compared, on noise of their own
TRUTH_SEED = 1_000_000  # added to a run's seed, for noise that memwatch never uses
GENERATION = SamplingConfig(num_inference_steps=10, guidance_scale=2.0)  # as copies are verified
NUM_SEEDS = 16  # generations of an item, whatever it is
MAX_SEEDS = 96  # of one caption that many items share


def event_file(home: Path, step: int) -> Path:
    """The tensors of one event of the run in ``home``; its plain numbers lie beside it as ``.json``."""
    return home / f"event_{step:05d}.safetensors"


def probe_of(item: Item) -> Probe:
    """An item as memwatch knows it."""
    return Probe(item.caption, item.probe, name=item.name, is_control=item.kind is Kind.CONTROL)


@dataclass(frozen=True)
class Bench:
    """What stays the same over a run's events.

    Attributes:
        prepared, views: one per item. truths: the same items on noise that memwatch never uses.
        unconditional: conditioning of the branch without a prompt; ``None`` where the model has no such branch.
    """

    denoiser: Denoiser
    parts: Components
    items: Sequence[Item]
    prepared: Sequence[PreparedProbe]
    views: Sequence[View]
    truths: Sequence[View]
    unconditional: Conditioning | None
    seed: int

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        parts: Components,
        items: Sequence[Item],
        seed: int,
        levels: LevelsConfig = SHIPPED.levels,
    ) -> Bench:
        prepared = prepare([probe_of(item) for item in items], denoiser, parts, SIZE)
        views = [reference_view(p, denoiser, levels, seed) for p in prepared]
        truths = [reference_view(p, denoiser, TRUTH, seed + TRUTH_SEED) for p in prepared]
        unconditional = denoiser.encode_unconditional(parts, SIZE)
        return cls(denoiser, parts, items, prepared, views, truths, unconditional, seed)

    @property
    def latent_shape(self) -> torch.Size:
        """``(c, h, w)``"""
        return self.views[0].noisy_latents.shape[2:]

    @cached_property
    def targets(self) -> dict[str, np.ndarray]:
        """Every item's probe as the autoencoder gives it back, ``(SIZE, SIZE, 3)`` in [0, 1]."""
        vae = None if self.denoiser.in_pixels else self.parts.vae
        return {i.name: as_decoded([np.asarray(i.probe)], vae)[0] for i in self.items}

    def branch_of(self, view: View) -> Conditioning | None:
        """The unconditional branch, where it is another one than the view's own."""
        if self.unconditional is None:
            return None
        same = all(torch.equal(value, view.conditioning[key]) for key, value in self.unconditional.items())
        return None if same else self.unconditional


@torch.no_grad()
def as_decoded(pictures: Sequence[np.ndarray], vae: Any) -> np.ndarray:
    """RGB uint8 pictures through the autoencoder and back, ``(n, SIZE, SIZE, 3)`` in [0, 1].

    What the autoencoder loses is nobody's copying error. ``vae`` is ``None`` for models on pixels.
    """
    parts = torch.split(to_pixels(pictures), 32)
    back = torch.cat(
        [part if vae is None else vae.decode(vae.encode(part).latent_dist.mode()).sample for part in parts]
    )
    decoded: np.ndarray = ((back.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    return decoded
