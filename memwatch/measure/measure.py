"""Measure one view: retained variance and epsilon. This is the only expensive computation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memwatch.config import CurvatureConfig
from memwatch.denoiser import Conditioning, Denoiser, to_device
from memwatch.measure.batches import Batches
from memwatch.measure.curvature import CurvatureMap, test_vectors, value_and_diag_jacobian
from memwatch.measure.measurement import Measurement
from memwatch.measure.views import View, seeded


def measure(
    denoiser: Denoiser, view: View, curvature: CurvatureConfig, seed: int, batches: Batches | None = None
) -> Measurement:
    """Measure a view in batches: one forward pass per batch, shared by all test vectors.

    Views of one key get the same test vectors, whatever the model or the branch. A batch never holds two views, so
    rounding is the same at every event, for every baseline and number of ranks, as long as memory suffices.

    Args:
        batches: those of the run, which know what fits; ``None`` begins anew at ``curvature.batch_size``.

    Returns:
        ``rho`` with samples ``(levels, draws * curvature.replicates, h, w)``, draw by draw, mean over channels, and
        epsilon; on the CPU.
    """
    levels, draws = view.noisy_latents.shape[:2]
    rows = [(level, draw) for level in range(levels) for draw in range(draws)]
    batches = Batches(curvature.batch_size) if batches is None else batches
    vectors = _vectors(view, curvature, seed)
    done = batches.run(rows, lambda part: _measure_batch(denoiser, view, part, vectors, curvature.replicates))
    rho, epsilon = (torch.stack(parts).cpu() for parts in zip(*done, strict=True))
    return Measurement(
        CurvatureMap(rho.reshape(levels, -1, *rho.shape[-2:])),
        epsilon.reshape(levels, draws, *epsilon.shape[1:]),
    )


@torch.no_grad()
def run_forward(
    denoiser: Denoiser, view: View, unconditional: Conditioning | None, batches: Batches
) -> tuple[Measurement, Measurement | None]:
    """Epsilon alone, from forward passes: with the prompt, and without it where ``unconditional`` is given.

    Both branches share batches. Rounding may differ from that of ``measure``, so each is compared with its own kind.
    """
    levels, draws = view.noisy_latents.shape[:2]
    branches = [view.conditioning] if unconditional is None else [view.conditioning, unconditional]
    rows = [(level, draw, said) for said in branches for level in range(levels) for draw in range(draws)]

    def predict(part: Sequence[tuple[int, int, Conditioning]]) -> list[Tensor]:
        x, timesteps = _batch(denoiser, view, [(level, draw) for level, draw, _ in part])
        return list(denoiser(x, timesteps, denoiser.stack([said for _, _, said in part])))

    epsilon = torch.stack(batches.run(rows, predict)).cpu()
    epsilon = epsilon.reshape(len(branches), levels, draws, *epsilon.shape[1:])
    now, *without = (Measurement(None, one) for one in epsilon)
    return now, without[0] if without else None


def _batch(denoiser: Denoiser, view: View, rows: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Noisy latents and timesteps of some (level, draw) of a view, on the model's device."""
    x = torch.stack([view.noisy_latents[level, draw] for level, draw in rows])
    timesteps = torch.tensor([view.timesteps[level] for level, _ in rows])
    return to_device(x, denoiser.device), to_device(timesteps, denoiser.device)


def _vectors(view: View, curvature: CurvatureConfig, seed: int) -> Tensor:
    """Test vectors ``(levels, draws, vectors, c, h, w)``; the draws of a level share blocks, the levels do not.

    Jacobians at different noise draws have much in common, which a block cancels in the mean over them.
    """
    _, draws, c, h, w = view.noisy_latents.shape
    found = [
        test_vectors(draws * curvature.vectors, (c, h, w), seeded(seed, "vectors", view.key, t), tile=curvature.tile)
        for t in view.timesteps
    ]
    return torch.stack(found).reshape(-1, draws, curvature.vectors, c, h, w)


def _measure_batch(
    denoiser: Denoiser, view: View, rows: Sequence[tuple[int, int]], vectors: Tensor, replicates: int
) -> list[tuple[Tensor, Tensor]]:
    """For every (level, draw) the retained variance ``(replicates, h, w)`` and epsilon ``(c, h, w)``."""
    x, timesteps = _batch(denoiser, view, rows)
    conditioning = denoiser.stack([view.conditioning] * len(rows))
    v = to_device(torch.stack([vectors[row] for row in rows], dim=1), x.device)  # (vectors, b, c, h, w)

    def epsilon_of(x: Tensor) -> Tensor:
        return denoiser(x, timesteps, conditioning)

    reuse_graph = denoiser.reuse_graph
    epsilon, products = value_and_diag_jacobian(epsilon_of, x, v, reuse_graph=reuse_graph)

    _, sigma = denoiser.schedule.alpha_sigma(timesteps, x)
    rho = (1 - sigma * products).mean(2)  # (vectors, b, h, w): mean over channels
    rho = rho.reshape(replicates, -1, *rho.shape[1:]).mean(1)  # (replicates, b, h, w): one per block
    return list(zip(rho.transpose(0, 1), epsilon, strict=True))
