"""Measure a view, and generate, in batches that fit into memory; and what an event costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from memwatch.config import SCREEN_DRAWS, CurvatureConfig, MemWatchConfig, SamplingConfig
from memwatch.denoiser import Conditioning, Denoiser, to_device
from memwatch.measure.curvature import CurvatureMap, test_vectors, value_and_diag_jacobian
from memwatch.measure.measurement import Measurement
from memwatch.measure.views import View, initial_noise, sample, seeded

FORWARD = 4  # times as many noisy latents fit at once where no graph is kept

Row = TypeVar("Row")
Done = TypeVar("Done")


class Batches:
    """Batches of one kind of work. The size that fits is found once and kept for the rest of the run.

    When memory runs out the batch is halved. A single row that does not fit is tried once more, and all that follow
    with it, inside ``sparing``. A size that changes changes rounding, in float32 by about 1e-6 of the largest values.

    ``size``: rows at a time. ``sparing``: entered, it makes the work take less memory and more time. ``spares``:
    whether that is needed.
    """

    def __init__(self, size: int, sparing: Callable[[], AbstractContextManager[None]] | None = None) -> None:
        self.size, self.spares, self._sparing = size, False, sparing

    def limit(self, rows: int) -> None:
        """From now on no more than ``rows`` at a time; below 1 it is one, inside ``sparing``."""
        self.size, self.spares = max(1, min(self.size, rows)), self.spares or rows < 1

    def run(self, rows: Sequence[Row], work: Callable[[Sequence[Row]], Iterable[Done]]) -> list[Done]:
        """What ``work`` makes of every row of a batch, in order; ``OutOfMemoryError`` where one row does not fit."""
        done: list[Done] = []
        while len(done) < len(rows):
            batch, failed = rows[len(done) : len(done) + self.size], False
            try:
                with self._sparing() if self.spares and self._sparing is not None else nullcontext():
                    done += list(work(batch))
            except torch.OutOfMemoryError:
                if len(batch) == 1 and (self.spares or self._sparing is None):
                    raise
                failed = True
            if failed:  # outside of ``except``, where nothing holds on to what the failed batch computed
                self.spares, self.size = self.spares or len(batch) == 1, max(1, len(batch) // 2)
                torch.cuda.empty_cache()
        return done


class EventBatches:
    """The batches of a run, by the kind of work. ``size``: noisy latents at a time where a graph is kept."""

    def __init__(self, size: int, sparing: Callable[[], AbstractContextManager[None]] | None) -> None:
        self.with_gradients, self.forward_only = Batches(size, sparing), Batches(FORWARD * size)
        self.sampling = Batches(max(1, size // 2))  # with guidance a row is two

    def limit(self, rows: int) -> None:
        """As much memory as ``rows`` rows take where a graph is kept."""
        self.with_gradients.limit(rows)
        self.forward_only.limit(max(1, FORWARD * rows))
        self.sampling.limit(max(1, FORWARD * rows // 2))


def measure(
    denoiser: Denoiser, view: View, curvature: CurvatureConfig, seed: int, batches: Batches | None = None
) -> Measurement:
    """Measure a view in batches: one forward pass per batch, shared by all test vectors.

    Views of one key get the same test vectors, whatever the model or the branch. A batch never holds two views, so
    rounding is the same at every event, for every baseline and number of ranks, as long as memory suffices.

    Returns:
        ``rho`` with samples ``(levels, draws * curvature.replicates, h, w)``, draw by draw, and epsilon; on the CPU.
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

    epsilon, products = value_and_diag_jacobian(epsilon_of, x, v, reuse_graph=denoiser.reuse_graph)
    _, sigma = denoiser.schedule.alpha_sigma(timesteps, x)
    rho = (1 - sigma * products).mean(2)  # (vectors, b, h, w): mean over channels
    rho = rho.reshape(replicates, -1, *rho.shape[1:]).mean(1)  # (replicates, b, h, w): one per block
    return list(zip(rho.transpose(0, 1), epsilon, strict=True))


@dataclass(frozen=True)
class Passes:
    """Network passes of one event. One is one latent through the network, forward or backward.

    Attributes:
        screen: forward only, of every probe and control; 0 without a screen.
        full: for the curvature of all of them. sampling: for what prompt probes generate.
    """

    screen: int
    full: int
    sampling: int

    def of_event(self, chosen: float = 0.0) -> float:
        """An event at which a share ``chosen`` of all is measured with curvature; 1 is a full event."""
        return self.screen + self.sampling + chosen * self.full


def count_passes(config: MemWatchConfig, num_references: int, num_prompts: int, branches: int = 2) -> Passes:
    """The passes of an event; numbers include controls. ``branches``: 1 without an unconditional branch."""
    of_draw, draws = len(config.levels.timesteps) * branches, config.levels.draws
    twice = 2  # now, and under earlier weights at the noisy latents of today
    screened = num_references * of_draw * SCREEN_DRAWS + num_prompts * twice * of_draw * draws
    return Passes(
        screen=screened if config.screens else 0,
        full=(num_references + twice * num_prompts) * of_draw * draws * (1 + config.curvature.vectors),
        sampling=num_prompts * config.seeds * config.sampling.num_inference_steps * 2,
    )
