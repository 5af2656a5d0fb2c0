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
from evidence.worlds.sources import SIZE, Source

from memwatch.config import MemWatchConfig, SamplingConfig
from memwatch.denoiser import Components, Conditioning, Denoiser
from memwatch.measure.images import to_pixels
from memwatch.measure.prepare import PreparedProbe, prepare
from memwatch.measure.probes import Probe
from memwatch.measure.views import View, reference_view

SHIPPED = MemWatchConfig()
LEVELS, CURVATURE = SHIPPED.levels, SHIPPED.curvature
GENERATION = SamplingConfig(num_inference_steps=10, guidance_scale=2.0)  # as copies are verified
PUBLISHED = SamplingConfig(num_inference_steps=50, guidance_scale=7.5)
PUBLISHED_VECTORS = 16
NUM_SEEDS = 4  # generations of an item, whatever it is
MAX_SEEDS = 96  # of one caption that many items share
POOL = 256  # pictures that are no copies: a copy is nearer to its item than a third of its distance to the nearest one


def event_file(home: Path, step: int) -> Path:
    """The tensors of one event of the run in ``home``; its plain numbers lie beside it as ``.json``."""
    return home / f"event_{step:05d}.safetensors"


def later_file(home: Path, step: int) -> Path:
    """The same of what is generated after the run's own end, see ``train.run_one``."""
    return home / f"later_{step:05d}.safetensors"


def probe_of(item: Item) -> Probe:
    """An item as memwatch knows it."""
    return Probe(item.caption, item.probe, name=item.name, is_control=item.kind is Kind.CONTROL)


@dataclass(frozen=True)
class Bench:
    """What stays the same over a run's events.

    Attributes:
        prepared, views: one per item.
        unconditional: conditioning of the branch without a prompt; ``None`` where the model has no such branch.
        pool: ``(POOL, SIZE, SIZE, 3)`` in [0, 1], as the autoencoder gives them back.
    """

    denoiser: Denoiser
    parts: Components
    items: Sequence[Item]
    prepared: Sequence[PreparedProbe]
    views: Sequence[View]
    unconditional: Conditioning | None
    pool: np.ndarray
    seed: int

    @classmethod
    def of(cls, denoiser: Denoiser, parts: Components, items: Sequence[Item], source: Source, seed: int) -> Bench:
        prepared = prepare([probe_of(item) for item in items], denoiser, parts, SIZE)
        views = [reference_view(p, denoiser, LEVELS, seed) for p in prepared]
        rng = np.random.default_rng([seed, 5000])
        pool = as_decoded([np.asarray(source.free(rng)) for _ in range(POOL)], None if denoiser.in_pixels else parts.vae)
        unconditional = denoiser.encode_unconditional(parts, SIZE)
        return cls(denoiser, parts, items, prepared, views, unconditional, pool, seed)

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
