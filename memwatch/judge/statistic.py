"""The statistic T: how far a map exceeds those of held-out controls, how rare that is by chance, and what a run allows.

One functional for probes and controls, so that they are exchangeable where nothing is stored; ``verdict`` has the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from memwatch.config import SignalsConfig
from memwatch.measure.measurement import Observation
from memwatch.measure.probes import MIN_CONTROLS, Probe
from memwatch.measure.signals import Signals, compute_signals

NUM_SIZES = 7  # the whole map, a half, ... 1/64 of it
SIXTEENTH = 4  # index of that size
RESOLUTION = 0.05  # of a log factor: the smallest spread of the controls that is believed
PRIOR_DF = 10  # by which the controls' variance at one size is drawn towards the mean over the sizes
UNKNOWN_EVENTS = 100  # that a run is taken to have where it does not say


def sizes_of(num_pixels: int) -> tuple[int, ...]:
    """The region sizes at which probes and controls are compared, in pixels of the map, largest first.

    >>> sizes_of(256)
    (256, 128, 64, 32, 16, 8, 4)
    """
    return tuple(max(1, num_pixels >> i) for i in range(NUM_SIZES))


def top_means(values: np.ndarray) -> np.ndarray:
    """The mean of the k largest values of maps ``(..., h, w)`` for each k of ``sizes_of``: ``(..., 7)``, rising."""
    flat = values.reshape(*values.shape[:-2], -1).astype(np.float64)
    largest, sizes = np.sort(flat, axis=-1)[..., ::-1], np.array(sizes_of(flat.shape[-1]))
    means: np.ndarray = np.cumsum(largest, axis=-1)[..., sizes - 1] / sizes
    return means


def profile_of(signals: Signals | None) -> np.ndarray:
    """``top_means`` of the map that decides; NaN where there is no map."""
    if signals is None or signals.decisive is None:
        return np.full(NUM_SIZES, np.nan)
    return top_means(signals.decisive.samples.double().mean(0).numpy())


def spread_of(variance: np.ndarray, num_controls: int) -> np.ndarray:
    """The standard deviation of one more observation, from the N controls' variances ``(..., 7)``.

    Each is drawn towards the mean over the sizes, as a moderated t does (Smyth 2004): one size alone tells it badly.
    """
    df = num_controls - 1
    moderated = (PRIOR_DF * variance.mean(-1, keepdims=True) + df * variance) / (PRIOR_DF + df)
    spread: np.ndarray = np.maximum(np.sqrt(moderated * (1 + 1 / num_controls)), RESOLUTION)
    return spread


def scores(profiles: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """T of profiles ``(..., M, 7)`` among controls ``(..., N, 7)``, predictive deviations: ``(..., M)``."""
    spread = spread_of(controls.var(-2, ddof=1), controls.shape[-2])
    found: np.ndarray = ((profiles - controls.mean(-2)[..., None, :]) / spread[..., None, :]).max(-1)
    return found


def leave_one_out(controls: np.ndarray) -> np.ndarray:
    """T of each control ``(..., N, 7)`` among the N - 1 others: ``(..., N)``."""
    others = controls.shape[-2] - 1
    apart = controls - controls.mean(-2, keepdims=True)  # the mean of the others lies at -apart / others
    squares = (apart**2).sum(-2, keepdims=True) - apart**2 * (1 + 1 / others)
    spread = spread_of(np.maximum(squares, 0) / (others - 1), others)
    found: np.ndarray = (apart * (1 + 1 / others) / spread).max(-1)
    return found


def p_value(score: np.ndarray, num_controls: int) -> np.ndarray:
    """The chance that a picture that was never trained on scores as much at one event.

    Student's t with N - 1 degrees of freedom (the prediction interval of a normal sample) times the number of sizes.
    """
    p: np.ndarray = np.minimum(1.0, NUM_SIZES * stats.t.sf(score, num_controls - 1))
    return p


def threshold(false_alarms_per_run: float, looks: int) -> float:
    """The largest p-value of a memorized probe: what a run may spend, over all looks that may come (Bonferroni)."""
    return false_alarms_per_run / max(1, looks)


def called_from(p: float, num_controls: int) -> float:
    """The score from which on ``p_value`` is at most ``p``."""
    return float(stats.t.isf(p / NUM_SIZES, num_controls - 1))


def kind_of(probe: Probe) -> str:
    """Probes are compared with controls of their own kind."""
    return "reference" if probe.is_reference else "prompt"


@dataclass(frozen=True)
class Screened:
    """What the screen measured of everything at one event, and the names of those that are judged with curvature."""

    observations: Sequence[Observation]
    chosen: frozenset[str]


@dataclass(frozen=True)
class Compared:
    """One probe or control among the controls of its kind, all by maps of the same terms.

    Attributes:
        observation, signals: what was measured, and its maps; ``None`` where not all of it is finite.
        profile: see ``profile_of``. num_controls: of its kind that could be compared, without itself.
        score: T; ``None`` where nothing could be compared, and where there are too few controls.
    """

    observation: Observation
    signals: Signals | None
    profile: np.ndarray
    num_controls: int
    score: float | None


def compare(observations: Sequence[Observation], config: SignalsConfig, terms: str = "") -> dict[str, Compared]:
    """Every probe and control by name, compared by ``terms``; default: the configured ones."""
    terms = terms or config.terms
    signals = compute_signals(observations, terms=terms, against=config.against, smooth=config.smooth)
    profiles = {name: profile_of(found) for name, found in signals.items()}
    usable = [o.probe for o in observations if np.isfinite(profiles[o.name]).all()]
    compared = {}
    for kind in {kind_of(o.probe) for o in observations}:
        same = [p for p in usable if kind_of(p) == kind]
        controls, watched = ([p.name for p in same if p.is_control is control] for control in (True, False))
        found: dict[str, float] = {}
        if len(controls) >= MIN_CONTROLS:
            among = np.array([profiles[name] for name in controls])
            found = dict(zip(controls, map(float, leave_one_out(among)), strict=True))
            found |= {name: float(scores(profiles[name][None], among)[0]) for name in watched}
        for o in (o for o in observations if kind_of(o.probe) == kind):
            others = len(controls) - (o.name in controls)
            compared[o.name] = Compared(o, signals[o.name], profiles[o.name], others, found.get(o.name))
    return compared
