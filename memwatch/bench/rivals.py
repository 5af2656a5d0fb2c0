"""Rivals: what others have published, each a row of the comparison with a map or a score of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from memwatch.bench.items import Kind
from memwatch.bench.methods import LAST_STEP, Method
from memwatch.bench.protocol import GENERATION, LEVELS, PUBLISHED
from memwatch.bench.runs import Finished


def kept_map(key: str) -> Callable[[Finished, str, int], np.ndarray]:
    """The map ``NAME/key`` of an event's tensors."""

    def map_of(run: Finished, name: str, step: int) -> np.ndarray:
        values: np.ndarray = run.tensors(step)[f"{name}/{key}"].double().numpy()
        return values

    return map_of


def concentration(run: Finished, name: str, step: int) -> float:
    """What share of the Bright Ending attention lies in its brightest tenth."""
    values = kept_map("bright_ending")(run, name, step)
    return float(np.sort(values, axis=None)[-max(1, values.size // 10) :].sum() / values.sum())


def wen_norm(run: Finished, name: str, step: int) -> float:
    """Norm of what the caption changes, mean over sampling steps (Wen et al. 2024)."""
    return float(run.numbers[step]["wen"][name])


def clid(run: Finished, name: str, step: int) -> float:
    """Unconditional minus conditional denoising loss, same noise, mean over levels and draws (Zhai et al. 2024)."""
    eps, null, now = run.true_noise(name), run.measurement(f"null/{name}", step), run.measurement(name, step)
    return float((null.epsilon - eps).square().mean() - (now.epsilon - eps).square().mean())


def nearest(run: Finished, name: str, step: int) -> float:
    """f_mem: how near the nearest generation is, over the whole picture."""
    return -float(min(run.numbers[step]["nearest_ratio"][name]))


def risen_loss(run: Finished, name: str, step: int) -> float:
    """How far the loss of the held-out photos is above its lowest so far: one number for the whole run."""
    losses = [_held_out_loss(run, s) for s in run.steps if s <= step]
    return losses[-1] - min(losses)


@lru_cache(maxsize=64)
def _held_out_loss(run: Finished, step: int) -> float:
    """Mean denoising loss of the held-out photos at fixed levels under fixed noise."""
    names = [item.name for item in run.of_kind(Kind.HELD_OUT)]
    losses = [(run.measurement(name, step).epsilon - run.true_noise(name)).square().mean() for name in names]
    return float(torch.stack(losses).mean())


def all_ones(run: Finished, name: str, step: int) -> np.ndarray:
    return np.ones(run.measurement(name, step).measured_rho.samples.shape[-2:])


def published(key: str, baseline: str) -> Method:
    """One of the four maps of the published procedure (Kim & Lee, ICML 2026)."""
    level, signal = f"last of {PUBLISHED.num_inference_steps}", f"published_{key}"
    return Method("published", signal, baseline, level, 1, "prompt", map_of=kept_map(signal))


BRIGHT, STEPS = "bright_ending", GENERATION.num_inference_steps
RIVALS = (
    published("snapshot", "first"),
    published("null", "unconditional"),
    published("score", "first"),
    published("score_null", "unconditional"),
    Method("bright ending", BRIGHT, "-", LAST_STEP, 0, "prompt", map_of=kept_map(BRIGHT), score_of=concentration),
    Method("wen norm", "wen", "unconditional", f"all of {STEPS}", probe="-", score_of=wen_norm),
    Method("clid", "clid", "unconditional", "mean", LEVELS.draws, score_of=clid),
    Method("f_mem", "nearest_ratio", "-", "generations", probe="-", score_of=nearest),
    Method("validation loss", "held_out_loss", "first", "mean", LEVELS.draws, "-", score_of=risen_loss, own_bar=0.0),
    Method("all ones", "ones", map_of=all_ones),
)
