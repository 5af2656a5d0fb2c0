"""Truth: what a pair of twins says of an item, none of which memwatch computes itself.

*stored*: the twin that was trained on an item denoises it better than the twin that never saw it, inside its mask, on
noise that memwatch never uses. *copied*: its caption generates it more than the other twin's does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from evidence.runs.finished import Finished, Pair
from evidence.worlds.items import PLANTED, Item, Kind
from evidence.worlds.shapes import CELL
from memwatch.proof.copies import distances, mask_at

COPIED = 0.2  # graded copy from which eyes see one; see ``pages/pairs.py``
CONFIDENCE = 0.975


@dataclass(frozen=True)
class Gap:
    """By how much the twin that saw an item denoises it better: log of the ratio of losses inside the mask.

    Attributes:
        mean: over noise draws and levels. low: its lower 97.5 % bound by Student's t over the draws.
    """

    mean: float
    low: float

    @classmethod
    def between(cls, there: np.ndarray, here: np.ndarray) -> Gap:
        """Of the losses of two models, ``(levels, draws)``, on the same noise. A draw is what is independent."""
        draws = np.log(there / here).mean(0)
        mean, sem = float(draws.mean()), float(draws.std(ddof=1) / math.sqrt(len(draws)))
        return cls(mean, mean - float(stats.t.ppf(CONFIDENCE, len(draws) - 1)) * sem)


@dataclass(frozen=True)
class Truth:
    """What a pair of twins says of what was watched in one of them.

    Attributes:
        run: the twin that memwatch watched.
    """

    pair: Pair
    run: Finished

    @cached_property
    def twin(self) -> Finished:
        return self.pair.twin_of(self.run)

    def gap(self, item: Item, step: int) -> Gap:
        """Between the other twin and this one; positive where this one knows more of the item."""
        there, here = (r.loss(item, step)[..., latent_mask(item)].mean(-1) for r in (self.twin, self.run))
        return Gap.between(there, here)

    def gap_map(self, item: Item, step: int) -> np.ndarray:
        """The same pixel by pixel, ``(h, w)``: what regions are measured against."""
        there, here = (r.loss(item, step).mean(1) for r in (self.twin, self.run))
        found: np.ndarray = np.log(there / here).mean(0)
        return found

    @cached_property
    def chance(self) -> float:
        """The largest gap, either way, of what neither twin has seen, at the last event."""
        gaps = [self.gap(item, self.run.last) for item in self.run.items if item.kind is Kind.HELD_OUT]
        return max((abs(gap.mean) for gap in gaps), default=0.0)

    def is_stored(self, item: Item, step: int) -> bool:
        """Whether this twin knows more of the item than the other, beyond chance and beyond the error."""
        gap = self.gap(item, step)
        return gap.low > 0 and gap.mean > self.chance

    # --- copied ------------------------------------------------------------------------------------------------------

    @cached_property
    def generated_steps(self) -> list[int]:
        """At which both twins were asked for everything."""

        def asked(run: Finished, step: int) -> bool:
            return all(run.generated(i, step) is not None for i in run.items if i.kind in PLANTED)

        return [step for step in self.run.steps[1:] if asked(self.run, step) and asked(self.twin, step)]

    def distances(self, run: Finished, item: Item, step: int) -> np.ndarray:
        """Of a twin's generations to the item inside its mask, at any exposure, ``(n,)``; empty without any."""
        pictures = run.generated(item, step)
        if pictures is None:
            return np.zeros(0)
        found: np.ndarray = distances(run.target(item)[None], pictures / 255, item.mask)[0]
        return found

    def distance(self, run: Finished, item: Item, step: int) -> float | None:
        """``nearest_quarter`` of ``distances``; ``None`` without generations."""
        found = self.distances(run, item, step)
        return nearest_quarter(found) if len(found) else None

    @cached_property
    def grades(self) -> dict[str, dict[int, float]]:
        """Graded copy of what is planted in either half, by item and by the step at which this twin was asked.

        ``G = 1 - d(in) / d(out)``: 0 is as near as chance brings it, 1 is the item itself. d(out) is interpolated
        between the events at which the other twin was asked.
        """
        found: dict[str, dict[int, float]] = {}
        for item in (i for i in self.run.items if i.kind in PLANTED):
            others = [d for s in self.generated_steps if (d := self.distance(self.twin, item, s)) is not None]
            own = {step: self.distance(self.run, item, step) for step in self.run.steps[1:]}
            found[item.name] = {
                step: 1 - d / float(np.interp(step, self.generated_steps, others))
                for step, d in own.items()
                if d is not None
            }
        return found

    def grade(self, item: Item, step: int) -> float | None:
        """See ``grades``; ``None`` where this twin was not asked."""
        return self.grades.get(item.name, {}).get(step)

    def is_copied(self, item: Item) -> bool:
        """Whether it is copied at the end."""
        return item.kind in PLANTED and item.is_in(self.run.half) and (self.grade(item, self.run.last) or 0) >= COPIED

    def first_copy(self, item: Item) -> int | None:
        """The first of two events in a row at which it is copied, or the last event: one may be a lucky draw."""
        grades = self.grades.get(item.name, {})
        copied = [grade >= COPIED for grade in grades.values()]
        after = [*copied[1:], True]
        return next((step for step, now, then in zip(grades, copied, after, strict=False) if now and then), None)


def nearest_quarter(distances: np.ndarray) -> float:
    """Mean of the smallest quarter: a copy is one, however rare."""
    return float(np.sort(distances)[: max(1, len(distances) // 4)].mean())


def latent_mask(item: Item) -> np.ndarray:
    """The item's mask on the grid of latents, bool ``(h, w)``; everything where it has none."""
    side = len(item.mask) // CELL
    return mask_at(item.mask if item.mask.any() else ~item.mask, (side, side))


def truths_of(pairs: Sequence[Pair]) -> list[Truth]:
    """Of both twins of every pair."""
    return [Truth(pair, run) for pair in pairs for run in pair.runs]
