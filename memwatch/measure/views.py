"""Views: the noisy latents at which a probe is looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memwatch.config import LevelsConfig
from memwatch.denoiser import Conditioning, Denoiser
from memwatch.measure.prepare import PreparedProbe


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator that depends on ``parts`` alone: not on rank, batch or order."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class View:
    """Noisy latents of one probe, ``(levels, draws, c, h, w)`` float32 on the CPU, with what belongs to them.

    Attributes:
        key: names the view. Its test vectors depend on it, so that baseline and now share them.
        timesteps: one per level; whole numbers, except at the last sampling step of rectified flow.
        eps: the true noise, same shape; ``None`` where it is unknown, at the last sampling step.
        conditioning: of the probe, or of the unconditional branch.
    """

    key: str
    noisy_latents: Tensor
    timesteps: tuple[float, ...]
    eps: Tensor | None
    conditioning: Conditioning

    def first_draws(self, draws: int) -> View:
        """The same with the first noise draws of every level."""
        eps = None if self.eps is None else self.eps[:, :draws]
        return replace(self, noisy_latents=self.noisy_latents[:, :draws], eps=eps)


def fixed_noise(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The true noise of a probe, ``(levels, draws, c, h, w)``. It depends on name and seed alone."""
    return torch.randn(tuple(shape), generator=seeded(seed, "noise", name))


def reference_view(prepared: PreparedProbe, denoiser: Denoiser, levels: LevelsConfig, seed: int) -> View:
    """Known latents under fixed noise at fixed levels: the same at every event."""
    assert prepared.latents is not None
    return noised(prepared, prepared.latents[None], denoiser, levels, seed)


def noised(prepared: PreparedProbe, latents: Tensor, denoiser: Denoiser, levels: LevelsConfig, seed: int) -> View:
    """Latents z_0 ``(n, c, h, w)`` under the probe's fixed noise at fixed levels; draw d has number d mod n."""
    eps = fixed_noise(prepared.name, (len(levels.timesteps), levels.draws, *latents.shape[1:]), seed)
    z_0 = latents.repeat(levels.draws // len(latents), 1, 1, 1)
    add_noise = denoiser.schedule.add_noise
    noisy = [add_noise(z_0, e, torch.full((len(e),), t)) for e, t in zip(eps, levels.timesteps, strict=True)]
    return View(prepared.name, torch.stack(noisy), levels.timesteps, eps, prepared.conditioning)
