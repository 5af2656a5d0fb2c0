"""Rivals: what others have published, each with a map or a score of its own, and all on equal terms.

Every map is tried as it is and smoothed as memwatch's own are, and its score as the mean (the published kind), the
largest value and the mean of the 16 largest. Every score is also tried against the run's controls, as memwatch's is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from evidence.runs.event import GUIDED
from evidence.runs.finished import Finished
from evidence.runs.protocol import NUM_SEEDS, SHIPPED
from evidence.worlds.items import Kind
from evidence.worlds.sources import SIZE
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import from_tensors
from memwatch.measure.probes import MIN_CONTROLS

MapOf = Callable[[Finished, str, int], np.ndarray | None]
ScoreOf = Callable[[Finished, str, int], float | None]
SMOOTH = SHIPPED.signals.smooth
TOP = 16  # pixels of a map's own grid


def top_mean(values: np.ndarray) -> float:
    return float(np.sort(values, axis=None)[-TOP:].mean())


SUMMARIES: Mapping[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(values.mean()),  # as published
    "largest": lambda values: float(values.max()),
    f"mean of {TOP} largest": top_mean,
}


@dataclass(frozen=True)
class Rival:
    """One way of others.

    Attributes:
        name: as tables say it. sampling: of its generations, one of ``event.GUIDED``; ``-`` where it makes none.
        map_of: the map of an item at an event on its own grid ``(h, w)``, larger where more is stored; ``None`` where
            the run has none.
        score_of: by kind, the published one first, a number of an item at an event, larger where more is stored;
            ``None`` where the run has none. Without any the map is summarized.
        needs_prompts: whether it is measured only in worlds with ``prompts``.
    """

    name: str
    sampling: str = "-"
    map_of: MapOf | None = None
    score_of: tuple[tuple[str, ScoreOf], ...] = ()
    needs_prompts: bool = False

    def maps(self, run: Finished, name: str, step: int) -> dict[str, np.ndarray]:
        """By variant, ``as it is`` and ``smoothed``, the map of an item, float64; none where there is none."""
        found = self.map_of(run, name, step) if self.map_of else None
        return {} if found is None else {"as it is": found, "smoothed": smoothed(found)}

    def scores(self, run: Finished, name: str, step: int) -> dict[str, float]:
        """By kind, the published one first; none where there is none."""
        if self.score_of:
            found = {kind: score(run, name, step) for kind, score in self.score_of}
            return {kind: value for kind, value in found.items() if value is not None}
        return {
            kind if variant == "as it is" else f"{kind}, {variant}": summary(values)
            for variant, values in self.maps(run, name, step).items()
            for kind, summary in SUMMARIES.items()
        }


def scores_in(run: Finished, rival: Rival, step: int) -> dict[str, dict[str, float]]:
    """By kind of score and item, at one event; each kind also in standard deviations from the mean of the controls."""
    found: dict[str, dict[str, float]] = {}
    for item in run.items:
        for kind, value in rival.scores(run, item.name, step).items():
            found.setdefault(kind, {})[item.name] = value
    controls = [item.name for item in run.of_kind(Kind.CONTROL)]
    for kind, values in list(found.items()):
        normal = np.array([values[name] for name in controls if name in values])
        if len(normal) >= MIN_CONTROLS and np.isfinite(normal).all() and np.ptp(normal) > 0:
            centre, spread = float(normal.mean()), float(normal.std(ddof=1))
            found[f"{kind}, against controls"] = {name: (value - centre) / spread for name, value in values.items()}
    return found


def smoothed(values: np.ndarray) -> np.ndarray:
    """A map ``(h, w)`` through memwatch's own mean filter."""
    result: np.ndarray = CurvatureMap(torch.from_numpy(values)[None]).smooth(SMOOTH).samples[0].numpy()
    return result


# --- maps ------------------------------------------------------------------------------------------------------------


def kept_map(key: str) -> MapOf:
    """The map ``NAME/key`` of an event's tensors."""

    def map_of(run: Finished, name: str, step: int) -> np.ndarray | None:
        values = run.tensors(step).get(f"{name}/{key}")
        return None if values is None else values.double().numpy()

    return map_of


def raw(run: Finished, name: str, step: int) -> np.ndarray | None:
    """``1 - rho`` of today, mean over levels and draws: no baseline at all."""
    found = from_tensors(run.tensors(step), name)
    if found is None or found.rho is None:
        return None
    values: np.ndarray = 1 - found.rho.mean.mean(0).double().numpy()
    return values


def all_ones(run: Finished, name: str, step: int) -> np.ndarray:
    return np.ones((SIZE, SIZE))


# --- scores ----------------------------------------------------------------------------------------------------------


def guidance_norm(how: str) -> ScoreOf:
    """Norm of what the caption changes, mean over sampling steps (Wen et al. 2024)."""

    def score_of(run: Finished, name: str, step: int) -> float | None:
        value: float | None = run.numbers[step].get(f"wen {how}", {}).get(name)
        return value

    return score_of


@lru_cache(maxsize=10_000)  # a run's items at all its events, a few hundred bytes each
def loss_of(run: Finished, key: str, name: str, step: int) -> Tensor | None:
    """Denoising loss of an item under fixed noise, ``(levels, draws)``; ``None`` where it was not measured.

    Args:
        key: of its measurement, see ``event``.
    """
    found = from_tensors(run.tensors(step), key)
    if found is None:
        return None
    return (found.epsilon - run.true_noise(name)[:, : found.draws]).square().mean((2, 3, 4))


def clid(run: Finished, name: str, step: int) -> float | None:
    """Loss without the caption minus loss with it, same noise, mean over levels and draws (Zhai et al. 2024)."""
    without, now = loss_of(run, f"null/{name}", name, step), loss_of(run, name, name, step)
    return None if without is None or now is None else float((without - now).mean())


def fallen_loss(prefix: str, log: bool) -> ScoreOf:
    """How far the image's own loss has fallen since the first event, mean over levels and draws.

    Args:
        prefix: ``screen/``, which every event has of every item, or nothing for all draws.
        log: whether as the log of the factor by which it fell.
    """

    def score_of(run: Finished, name: str, step: int) -> float | None:
        losses = [loss_of(run, f"{prefix}{name}", name, s) for s in (run.steps[0], step)]
        if losses[0] is None or losses[1] is None:
            return None
        before, now = (float(loss.mean()) for loss in losses if loss is not None)
        return float(np.log(before / now)) if log else before - now

    return score_of


def nearest(run: Finished, name: str, step: int) -> float | None:
    """f_mem: how near the nearest of an item's generations is over the whole picture; the first 4, whatever it is."""
    ratios = run.numbers[step].get("nearest_ratio", {}).get(name)
    return None if not ratios else -float(min(ratios[:NUM_SEEDS]))


def risen_loss(run: Finished, name: str, step: int) -> float:
    """How far the held-out loss is above its lowest so far: one number for the whole run."""
    losses = [held_out_loss(run, s) for s in run.steps if s <= step]
    return losses[-1] - min(losses)


@lru_cache(maxsize=1000)
def held_out_loss(run: Finished, step: int) -> float:
    """Denoising loss under fixed noise of pictures that are never trained on and show nothing that is."""
    held_out = [item for item in run.of_kind(Kind.HELD_OUT, Kind.CONTROL) if item.dose == 0]
    names = [item.name for item in held_out if not item.name.startswith("sibling")]
    losses = [loss_of(run, f"screen/{name}", name, step) for name in names]
    return float(torch.stack([loss.mean() for loss in losses if loss is not None]).mean())


KIM_LEE = {
    "snapshot": "Kim & Lee, curvature against the first model",
    "null": "Kim & Lee, curvature against no caption",
    "score": "Kim & Lee, score against the first model",
    "score_null": "Kim & Lee, score against no caption",
}
IMAGE_LOSS = Rival(
    "loss of the image itself",
    score_of=(
        ("fall", fallen_loss("screen/", log=False)),
        ("log of the fall", fallen_loss("screen/", log=True)),
        ("fall, all draws", fallen_loss("", log=False)),
        ("log of the fall, all draws", fallen_loss("", log=True)),
    ),
)
HELD_OUT_LOSS = Rival("loss of held-out images", score_of=(("rise above its lowest", risen_loss),))
F_MEM = Rival("f_mem", "verified", score_of=(("nearest of 4 generations", nearest),))
ALL_ONES = Rival("all ones", map_of=all_ones)
RIVALS = (
    *(
        Rival(says, how, kept_map(f"{how}/{key}"), needs_prompts=True)
        for key, says in KIM_LEE.items()
        for how in GUIDED
    ),
    *(Rival("Bright Ending, own grid", how, kept_map(f"{how}/bright_ending"), needs_prompts=True) for how in GUIDED),
    *(Rival("Wen norm", how, score_of=(("norm", guidance_norm(how)),), needs_prompts=True) for how in GUIDED),
    Rival("CLiD", score_of=(("difference of losses", clid),)),
    F_MEM,
    IMAGE_LOSS,
    HELD_OUT_LOSS,
    Rival("curvature of today alone", map_of=raw),
    ALL_ONES,
)
