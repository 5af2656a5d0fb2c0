"""Calibration: what chance alone shows, from held-out controls that are measured and judged as the probes are.

A region of k pixels is compared with the highest mean that each control shows *anywhere* on k pixels: the mean of its k
largest. No connected region of that size can be higher, so large faint regions and small strong ones are judged by one
rule, wherever they lie. Sizes are powers of two, and a p-value pays for all of them (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import stats

from memwatch.config import SignalsConfig
from memwatch.measure.measurement import Observation
from memwatch.measure.probes import MIN_CONTROLS, Probe
from memwatch.measure.signals import Signals, compute_signals

NUM_SIZES = 7  # the whole map, a half, ... 1/64 of it
RESOLUTION = 0.05  # of a log factor: controls that differ by less are alike, and a spread below it is estimated as it
FIRST_BLOCK = 16  # events that share half of a run's budget, where their number is not known


def sizes_of(num_pixels: int) -> tuple[int, ...]:
    """The sizes of regions that are compared, in pixels of the map, largest first.

    >>> sizes_of(256)
    (256, 128, 64, 32, 16, 8, 4)
    """
    return tuple(max(1, num_pixels >> i) for i in range(NUM_SIZES))


def top_means(values: np.ndarray) -> np.ndarray:
    """The mean of the k largest values of a map ``(h, w)`` for each k of ``sizes_of``: ``(NUM_SIZES,)``, rising."""
    largest = np.sort(values.astype(np.float64), axis=None)[::-1]
    means: np.ndarray = np.cumsum(largest)[np.array(sizes_of(largest.size)) - 1] / sizes_of(largest.size)
    return means


def size_index(num_pixels: int, of: int) -> int:
    """Which of the sizes a region is compared at: the largest that is not larger than the region.

    A smaller size has the higher means, so that rounding down never favours the region. ``regions.MIN_AREA`` is the
    smallest size, because fewer pixels would have an advantage there.
    """
    return next((i for i, size in enumerate(sizes_of(of)) if size <= num_pixels), NUM_SIZES - 1)


@dataclass(frozen=True)
class Null:
    """The null distribution of one event.

    Attributes:
        profiles: ``top_means`` of the controls that something is judged by, natural log of a factor,
            ``(N, NUM_SIZES)``.
        judged: how many controls of the same group are judged by these and are not among them: 1 for a control, which
            is judged by the others, else 0.
    """

    profiles: np.ndarray
    judged: int = 0

    @classmethod
    def of(cls, profiles: Sequence[np.ndarray]) -> Null:
        """The distribution of these profiles. Those that are not finite are left out."""
        finite = [p for p in profiles if np.isfinite(p).all()]
        return cls(np.stack(finite) if finite else np.empty((0, NUM_SIZES)))

    def __len__(self) -> int:
        return len(self.profiles)

    def without(self, i: int) -> Null:
        """All controls but one, to judge that one by."""
        return Null(np.delete(self.profiles, i, axis=0), judged=1)

    @property
    def is_enough(self) -> bool:
        """Whether the whole group is: the same answer for a probe and for any control of the group."""
        return len(self) + self.judged >= MIN_CONTROLS

    @cached_property
    def _mean(self) -> np.ndarray:
        mean: np.ndarray = self.profiles.mean(0)
        return mean

    @cached_property
    def _spread(self) -> np.ndarray:
        """Standard deviation of one more observation, ``(NUM_SIZES,)``."""
        spread: np.ndarray = self.profiles.std(0, ddof=1) * math.sqrt(1 + 1 / len(self))
        floored: np.ndarray = np.maximum(spread, RESOLUTION)
        return floored

    def z_score(self, mean: float, size: int) -> float:
        """How far the mean of a region exceeds the controls at this size, in predictive standard deviations.

        Args:
            size: see ``size_index``.
        """
        return float((mean - self._mean[size]) / self._spread[size])

    def p_value(self, z_score: float) -> float:
        """Chance that one more control exceeds the others as far, at any size.

        A predictive t with N - 1 degrees of freedom (the prediction interval of a normal sample) on log factors, times
        the number of sizes. Unlike a rank it falls below ``1 / (1 + N)``, which the promise for a whole run needs.
        """
        return float(min(1.0, NUM_SIZES * stats.t.sf(z_score, len(self) - 1)))

    def rank_p(self, mean: float, size: int) -> float:
        """``p = (1 + #{controls >= x}) / (1 + N)`` at this size (Phipson & Smyth 2010).

        It assumes nothing about the controls' distribution, so it checks the other one as far as N allows.
        """
        return float((1 + (self.profiles[:, size] >= mean).sum()) / (1 + len(self)))


def share_of_budget(event: int, planned: int | None = None) -> float:
    """The share of a run's false-alarm budget that its n-th event may spend, n = 1, 2, ...; all of them sum to 1.

    The first 16 events share one half, the next 32 a quarter, the next 64 an eighth, and so on: a run need not say how
    long it will be, and a long one pays little for it.

    Args:
        planned: how many events the run will have, if known; they take the place of the 16.

    >>> [share_of_budget(n) for n in (1, 16, 17)]
    [0.03125, 0.03125, 0.0078125]
    >>> share_of_budget(1, planned=5)
    0.1
    """
    first = planned or FIRST_BLOCK
    block = int(math.log2((event - 1) / first + 1))
    return float(0.5 ** (block + 1) / (first * 2**block))


def largest_p(event: int, *, false_alarms_per_run: float, num_probes: int, planned: int | None = None) -> float:
    """The p-value that a probe may have at most, at its n-th event, to be called ``memorized``.

    A run in which nothing is stored calls something with probability ``false_alarms_per_run`` at most, however probes
    and events depend on each other: what all of them are allowed sums to that (Bonferroni).
    """
    return min(1.0, false_alarms_per_run * share_of_budget(event, planned) / num_probes)


def upper_bound(count: int, of: int, confidence: float = 0.95) -> float:
    """The largest rate that ``count`` of ``of`` leaves plausible, one-sided (Clopper & Pearson 1934).

    >>> round(upper_bound(0, 24), 3)
    0.117
    """
    return 1.0 if count >= of else float(stats.beta.ppf(confidence, count + 1, of - count))


# --- what is held against what ---


@dataclass(frozen=True)
class Screened:
    """What the screen saw at one event.

    Attributes:
        observations: of everything, run forward only, at the screen's noise draws.
        chosen: names of those that are judged with curvature.
    """

    observations: Sequence[Observation]
    chosen: frozenset[str]


@dataclass(frozen=True)
class References:
    """What a probe is compared with: controls of its own kind (reference or prompt), and ordinary training images.

    Attributes:
        controls, peers: their null distributions. any_controls: whether there are controls of either kind.
        severity_peers: median severity of the peers.
    """

    controls: Null
    peers: Null
    any_controls: bool
    severity_peers: float = 1.0


@dataclass(frozen=True)
class Compared:
    """Observations of one event that are made of the same terms, so that any of them can be held against any other.

    Attributes:
        observations: by name, of probes, controls and peers.
        signals: by name; ``None`` where the measurements are not finite. profiles: by name, see ``profile_of``.
    """

    observations: Mapping[str, Observation]
    signals: Mapping[str, Signals | None]
    profiles: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, observations: Sequence[Observation], config: SignalsConfig, terms: str | None = None) -> Compared:
        """Compare by the configured terms, or by others."""
        signals = compute_signals(
            observations,
            terms=terms or config.terms,
            against=config.against,
            smooth=config.smooth,
        )
        return cls({o.name: o for o in observations}, signals, {name: profile_of(s) for name, s in signals.items()})

    @classmethod
    def both(
        cls, observations: Sequence[Observation], screened: Screened | None, config: SignalsConfig
    ) -> tuple[Compared, Compared]:
        """What is judged by the configured terms, and what is judged by the screen's loss: all by the first without it.

        Args:
            observations: of everything, with curvature where it was measured.
        """
        if screened is None:
            return cls.of(observations, config), cls.of([], config)
        measured = [o for o in observations if o.has_curvature]
        return cls.of(measured, config), cls.of(screened.observations, config, terms="loss")

    def controls_of(self, probe: Probe) -> Null:
        """The controls that a probe is judged by: those of its kind, without itself."""
        return self._null(probe, [o.probe for o in self.observations.values() if o.probe.is_control])

    def peers_of(self, probe: Probe) -> Null:
        """The ordinary training images of its kind."""
        return self._null(probe, [o.probe for o in self.observations.values() if o.probe.is_peer])

    def _null(self, probe: Probe, group: Sequence[Probe]) -> Null:
        of_kind = [other.name for other in group if other.is_reference is probe.is_reference]
        null = Null.of([self.profiles[name] for name in of_kind if name != probe.name])
        return replace(null, judged=int(probe.name in of_kind))


def profile_of(signals: Signals | None) -> np.ndarray:
    """``top_means`` of the map that decides; NaN where nothing was compared.

    What has risen counts as unchanged: how much a model forgets of other pictures says nothing of what it stores.
    """
    if signals is None or signals.decisive is None:
        return np.full(NUM_SIZES, np.nan)
    return top_means(signals.decisive.samples.double().mean(0).clamp(min=0).numpy())
