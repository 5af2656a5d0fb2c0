"""The statistic: how rare a region is where nothing is stored, and how rare it must be to be called memorized.

Held-out controls, measured and judged as the probes are, show what chance alone brings. A region of k pixels is
compared with the mean of each control's k largest pixels. No connected region of a control can have a higher mean, so
one rule judges large faint regions and small strong ones, wherever they lie. Sizes are powers of two, and a p-value
pays for all of them (Bonferroni).
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
RESOLUTION = 0.05  # of a log factor: the smallest spread of the controls that is believed
FIRST_BLOCK = 16  # events that share half of a run's false-alarm budget, where their number is not known


def sizes_of(num_pixels: int) -> tuple[int, ...]:
    """The region sizes at which probes and controls are compared, in pixels of the map, largest first.

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

    Controls have higher means at a smaller size, so rounding down never favours the region. ``regions.MIN_AREA`` is the
    smallest size: a region of fewer pixels would have an advantage.
    """
    return next((i for i, size in enumerate(sizes_of(of)) if size <= num_pixels), NUM_SIZES - 1)


@dataclass(frozen=True)
class Null:
    """The null distribution of one event: what the pictures of one group show.

    Attributes:
        profiles: ``top_means`` of the group, natural log of a factor, ``(N, NUM_SIZES)``.
        judged: how many of the group are left out because they are judged: 1 for a control, which is judged by the
            others, else 0.
    """

    profiles: np.ndarray
    judged: int = 0

    @classmethod
    def of(cls, profiles: Sequence[np.ndarray]) -> Null:
        """The distribution of the profiles that are finite."""
        finite = [p for p in profiles if np.isfinite(p).all()]
        return cls(np.stack(finite) if finite else np.empty((0, NUM_SIZES)))

    def __len__(self) -> int:
        return len(self.profiles)

    @property
    def is_enough(self) -> bool:
        """Whether the whole group is large enough: the same answer for a probe and for every control of the group."""
        return len(self) + self.judged >= MIN_CONTROLS

    @cached_property
    def _mean_and_spread(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean, and the standard deviation of one more observation, ``(NUM_SIZES,)`` each."""
        spread = self.profiles.std(0, ddof=1) * math.sqrt(1 + 1 / len(self))
        return self.profiles.mean(0), np.maximum(spread, RESOLUTION)

    def z_score(self, mean: float, size: int) -> float:
        """Predictive standard deviations by which the mean of a region exceeds the controls at this ``size_index``."""
        means, spreads = self._mean_and_spread
        return float((mean - means[size]) / spreads[size])

    def p_value(self, z_score: float) -> float:
        """The chance that one more control exceeds the others as far, at any size.

        Student's t with N - 1 degrees of freedom (the prediction interval of a normal sample) on log factors, times the
        number of sizes. Unlike a rank it falls below ``1 / (1 + N)``, which the promise for a whole run needs.
        """
        return float(min(1.0, NUM_SIZES * stats.t.sf(z_score, len(self) - 1)))

    def rank_p(self, mean: float, size: int) -> float:
        """``p = (1 + #{group >= x}) / (1 + N)`` at this size (Phipson & Smyth 2010); it assumes no distribution."""
        return float((1 + (self.profiles[:, size] >= mean).sum()) / (1 + len(self)))


def share_of_budget(event: int, planned: int | None = None) -> float:
    """The share of a run's false-alarm budget that its n-th event may spend, n = 1, 2, ...; all shares sum to 1.

    The first 16 events (or as many as are ``planned``) share one half, twice as many a quarter, and so on. So the
    length of a run need not be known, and a long run pays little for it.

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

    With these limits a run in which nothing is stored calls something memorized with probability
    ``false_alarms_per_run`` at most, however probes and events depend on each other: the limits sum to it (Bonferroni).
    """
    return min(1.0, false_alarms_per_run * share_of_budget(event, planned) / num_probes)


def upper_bound(count: int, of: int, confidence: float = 0.95) -> float:
    """The largest rate that ``count`` of ``of`` leaves plausible, one-sided (Clopper & Pearson 1934).

    >>> round(upper_bound(0, 24), 3)
    0.117
    """
    return 1.0 if count >= of else float(stats.beta.ppf(confidence, count + 1, of - count))


# --- which observations are compared with which ---


@dataclass(frozen=True)
class Screened:
    """What the screen measured at one event.

    Attributes:
        observations: of everything, by forward passes at the screen's noise draws.
        chosen: names of those that are judged with curvature.
    """

    observations: Sequence[Observation]
    chosen: frozenset[str]


@dataclass(frozen=True)
class References:
    """What one observation is compared with, each of its own kind (reference or prompt).

    Attributes:
        controls: held-out controls. peers: ordinary training images; none for what is not watched itself.
        any_controls: whether the event has controls of either kind. severity_peers: median severity of the peers.
    """

    controls: Null
    peers: Null
    any_controls: bool
    severity_peers: float = 1.0


@dataclass(frozen=True)
class Compared:
    """Observations of one event whose maps are made of the same terms, so that they can be compared with each other.

    Attributes:
        observations: by name, of probes, controls and peers.
        signals: by name; ``None`` where the measurements are not finite. profiles: by name, see ``profile_of``.
        severity_peers: median severity of the peers, once they are judged.
    """

    observations: Mapping[str, Observation]
    signals: Mapping[str, Signals | None]
    profiles: Mapping[str, np.ndarray]
    severity_peers: float = 1.0

    @classmethod
    def of(cls, observations: Sequence[Observation], config: SignalsConfig, terms: str | None = None) -> Compared:
        """Compare by ``terms``; default: the configured ones."""
        terms = terms or config.terms
        signals = compute_signals(observations, terms=terms, against=config.against, smooth=config.smooth)
        return cls({o.name: o for o in observations}, signals, {name: profile_of(s) for name, s in signals.items()})

    @classmethod
    def both(
        cls, observations: Sequence[Observation], screened: Screened | None, config: SignalsConfig
    ) -> tuple[Compared, Compared]:
        """What is judged by the configured terms, and what is judged by the screen's loss; without a screen nothing is.

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

    def references_of(self, probe: Probe, *, any_controls: bool) -> References:
        """What a probe is judged by."""
        return References(self.controls_of(probe), Null.of([]), any_controls)

    def _null(self, probe: Probe, group: Sequence[Probe]) -> Null:
        of_kind = [other.name for other in group if other.is_reference is probe.is_reference]
        null = Null.of([self.profiles[name] for name in of_kind if name != probe.name])
        return replace(null, judged=int(probe.name in of_kind))


def profile_of(signals: Signals | None) -> np.ndarray:
    """``top_means`` of the map that decides; NaN where nothing was compared.

    Pixels at which the model got worse count as unchanged: what it forgets says nothing of what it stores.
    """
    if signals is None or signals.decisive is None:
        return np.full(NUM_SIZES, np.nan)
    return top_means(signals.decisive.samples.double().mean(0).clamp(min=0).numpy())
