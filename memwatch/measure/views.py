"""Views: the noisy latents at which a probe is looked at: of its image, or of what its prompt generates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memwatch.config import LevelsConfig, SamplingConfig
from memwatch.denoiser import Conditioning, Denoiser, to_device
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


@dataclass(frozen=True)
class Sample:
    """What sampling gives: the finished latents ``(b, c, h, w)``, and the noisy ones before the last step.

    ``timestep`` is that of the last step. ``guidance_norm``, ``(b,)``, is the mean over the steps of ``|eps(x, c) -
    eps(x, null)|`` (Wen et al. 2024); 0 without guidance.
    """

    latents: Tensor
    x_last: Tensor
    timestep: float
    guidance_norm: Tensor


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    scheduler: Any,
    sampling: SamplingConfig,
    x: Tensor,
    conditioning: Sequence[Conditioning],
    unconditional: Conditioning | None,
) -> Sample:
    """Sample with classifier-free guidance, if the family has it: DDIM, or Euler steps for rectified flow.

    Args:
        scheduler: the pipeline's; the family's own sampler is made from its configuration.
        x: initial noise of unit variance, ``(b, c, h, w)``, on the CPU. conditioning: one per row of it.
    """
    b = len(x)
    sampler = denoiser.sampler(scheduler, sampling.num_inference_steps, x.shape[-1])
    guided = denoiser.guided and unconditional is not None
    branches = denoiser.stack([*([unconditional] * b if guided else []), *conditioning])  # type: ignore[list-item]
    x = x_last = (x * getattr(sampler, "init_noise_sigma", 1.0)).to(denoiser.device)
    norm = torch.zeros(b, device=x.device)
    for t, there in zip(sampler.timesteps, to_device(sampler.timesteps, denoiser.device), strict=True):
        x_last = x
        rows = torch.cat([x, x]) if guided else x
        output = denoiser.output(rows, there.expand(len(rows)), branches)
        without, with_prompt = output[:b], output[-b:]
        norm += (with_prompt - without).flatten(1).norm(dim=1) / len(sampler.timesteps)
        x = sampler.step(without + sampling.guidance_scale * (with_prompt - without), t, x).prev_sample
    return Sample(x, x_last, sampler.timesteps[-1].item(), norm)


def initial_noise(denoiser: Denoiser, seeds: Sequence[int], side: int) -> Tensor:
    """Where generations begin: ``(n, c, side, side)``, each from its own seed alone."""
    shape = (1, denoiser.latent_channels, side, side)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def prompt_view(
    prepared: PreparedProbe,
    unconditional: Conditioning | None,
    denoiser: Denoiser,
    scheduler: Any,
    sampling: SamplingConfig,
    draws: int,
    side: int,
) -> tuple[View, Tensor]:
    """Sample up to the last step and look there (Kim & Lee 2026: x_t before DDIM step ``num_inference_steps - 1``).

    All ``draws`` of test vectors share the one x_t. Also returns the finished latents ``(c, h, w)`` on the CPU.
    """
    x = initial_noise(denoiser, [prepared.probe.seed], side)
    s = sample(denoiser, scheduler, sampling, x, [prepared.conditioning], unconditional)
    noisy = s.x_last.cpu()[None].expand(1, draws, -1, -1, -1)
    return View(prepared.name, noisy, (s.timestep,), None, prepared.conditioning), s.latents[0].cpu()
