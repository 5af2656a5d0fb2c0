"""Measure one view: retained variance and epsilon. This is the only expensive computation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memwatch.config import CurvatureConfig
from memwatch.denoiser import Denoiser
from memwatch.measure.batches import in_batches
from memwatch.measure.curvature import CurvatureMap, test_vectors, value_and_diag_jacobian
from memwatch.measure.measurement import Measurement
from memwatch.measure.views import View, seeded


def measure(denoiser: Denoiser, view: View, curvature: CurvatureConfig, seed: int) -> Measurement:
    """Measure a view in batches: one forward pass per batch, shared by all test vectors.

    Views of one key get the same test vectors, whatever the model or the branch. When memory runs out the batch is
    halved. A batch never holds two views, so rounding is the same at every event, for every baseline and number of
    ranks.

    Returns:
        ``rho`` with samples ``(levels, draws * vectors / tile, h, w)``, mean over channels, and epsilon; on the CPU.
    """
    levels, draws = view.noisy_latents.shape[:2]
    rows = [(level, draw) for level in range(levels) for draw in range(draws)]
    done = in_batches(rows, curvature.batch_size, lambda part: _measure_batch(denoiser, view, part, curvature, seed))
    rho, epsilon = (torch.stack(parts) for parts in zip(*done, strict=True))
    return Measurement(
        CurvatureMap(rho.reshape(levels, -1, *rho.shape[-2:])),
        epsilon.reshape(levels, draws, *epsilon.shape[1:]),
    )


def _measure_batch(
    denoiser: Denoiser, view: View, rows: Sequence[tuple[int, int]], curvature: CurvatureConfig, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """For every (level, draw) the retained variance ``(blocks, h, w)`` and epsilon ``(c, h, w)``."""
    x = torch.stack([view.noisy_latents[level, draw] for level, draw in rows]).to(denoiser.device)
    timesteps = torch.tensor([view.timesteps[level] for level, _ in rows], device=denoiser.device)
    conditioning = denoiser.stack([view.conditioning] * len(rows))
    shape = (x.shape[1], x.shape[2], x.shape[3])
    generators = [seeded(seed, "vectors", view.key, view.timesteps[level], draw) for level, draw in rows]
    vectors = torch.stack([test_vectors(curvature.vectors, shape, g, tile=curvature.tile) for g in generators], dim=1)

    def epsilon_of(x: Tensor) -> Tensor:
        return denoiser(x, timesteps, conditioning)

    reuse_graph = denoiser.reuse_graph
    epsilon, products = value_and_diag_jacobian(epsilon_of, x, vectors.to(x.device), reuse_graph=reuse_graph)

    _, sigma = denoiser.schedule.alpha_sigma(timesteps, x)
    rho = (1 - sigma * products).mean(2)  # (vectors, b, h, w): mean over channels
    rho = rho.reshape(-1, curvature.tile, *rho.shape[1:]).mean(1)  # (blocks, b, h, w): independent replicates
    return list(zip(rho.transpose(0, 1).cpu(), epsilon.cpu(), strict=True))
