"""Retained variance and epsilon of a denoiser on views: the only expensive computation, batched over probes, levels and draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memwatch.config import CurvatureConfig
from memwatch.curvature import CurvatureMap, test_vectors, value_and_diag_jacobian
from memwatch.denoiser import Denoiser
from memwatch.probes import View, seeded
from memwatch.signals import Measurement


def measure(
    denoiser: Denoiser,
    views: Sequence[View],
    curvature: CurvatureConfig,
    seed: int,
    tick: Callable[[int], object] = lambda rows: None,
) -> list[Measurement]:
    """Measure every view: one forward pass a batch of noisy latents, shared by all test vectors.

    Views of one key get the same test vectors whatever the model, the branch or the batch. When memory runs out the batch is halved.

    Args:
        views: all of one latent shape.
        tick: called with the number of noisy latents done.

    Returns:
        For every view ``rho`` with samples ``(levels, draws * vectors / tile, h, w)`` (mean over channels) and epsilon, on the CPU.
    """
    rows = [
        (i, level, draw)
        for i, v in enumerate(views)
        for level in range(len(v.timesteps))
        for draw in range(v.noisy_latents.shape[1])
    ]
    done: list[tuple[Tensor, Tensor]] = []
    size = curvature.batch_size
    while len(done) < len(rows):
        batch = rows[len(done) : len(done) + size]
        try:
            done += _measure_batch(denoiser, [(views[i], level, draw) for i, level, draw in batch], curvature, seed)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            size = len(batch) // 2
            torch.cuda.empty_cache()
            continue
        tick(len(batch))
    measurements, start = [], 0
    for view in views:
        levels, draws = view.noisy_latents.shape[:2]
        own = done[start : start + levels * draws]
        start += levels * draws
        rho = torch.stack([samples for samples, _ in own])
        rho = rho.reshape(levels, -1, *rho.shape[-2:])
        epsilon = torch.stack([eps for _, eps in own])
        epsilon = epsilon.reshape(levels, draws, *epsilon.shape[1:])
        measurements.append(Measurement(CurvatureMap(rho), epsilon))
    return measurements


def _measure_batch(
    denoiser: Denoiser, rows: Sequence[tuple[View, int, int]], curvature: CurvatureConfig, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """For every row the retained variance (blocks, h, w) and epsilon (c, h, w)."""
    x = torch.stack([view.noisy_latents[level, draw] for view, level, draw in rows]).to(denoiser.device)
    timesteps = torch.tensor([view.timesteps[level] for view, level, _ in rows], device=denoiser.device)
    conditioning = denoiser.stack([view.conditioning for view, _, _ in rows])
    shape = (x.shape[1], x.shape[2], x.shape[3])
    generators = [seeded(seed, "vectors", view.key, view.timesteps[level], draw) for view, level, draw in rows]
    vectors = torch.stack([test_vectors(curvature.vectors, shape, g, tile=curvature.tile) for g in generators], dim=1)

    epsilon, products = value_and_diag_jacobian(
        lambda x: denoiser(x, timesteps, conditioning), x, vectors.to(x.device), once=denoiser.once
    )

    _, sigma = denoiser.schedule.alpha_sigma(timesteps, x)
    rho = (1 - sigma * products).mean(2)  # (vectors, b, h, w): mean over channels
    rho = rho.reshape(-1, curvature.tile, *rho.shape[1:]).mean(1)  # (blocks, b, h, w): independent replicates
    return list(zip(rho.transpose(0, 1).cpu(), epsilon.cpu(), strict=True))
