"""Sampling: what prompts generate, and the last sampling step as a view of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwatch.config import SamplingConfig
from memwatch.denoiser import Conditioning, Denoiser, to_device
from memwatch.measure.measure import Batches
from memwatch.measure.prepare import PreparedProbe
from memwatch.measure.views import View


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


def generate(
    denoiser: Denoiser,
    scheduler: Any,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    side: int,
    batches: Batches,
) -> Tensor:
    """Finished latents of one prompt, ``(n, c, side, side)`` float32 on the CPU, one per seed.

    A batch never holds two prompts, see ``measure``.
    """

    def finished(batch: Sequence[int]) -> Tensor:
        x = initial_noise(denoiser, batch, side)
        s = sample(denoiser, scheduler, sampling, x, [conditioning] * len(batch), unconditional)
        return s.latents.float().cpu()

    return torch.stack(batches.run(seeds, finished))


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
