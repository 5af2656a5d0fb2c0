"""Compared: what is held against what. Only observations that are made of the same terms and noise draws are.

What the screen chose is judged on both terms, against controls whose curvature was measured for it; the rest on the
loss that the screen saw, against what it saw of the controls. One rule for probes, controls and peers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from memwatch.config import SignalsConfig
from memwatch.judge.calibration import NUM_SIZES, Null, top_means
from memwatch.measure.measurement import Observation
from memwatch.measure.probes import Probe
from memwatch.measure.signals import Signals, compute_signals


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
        rule = {"terms": terms or config.terms, "against": config.against}
        signals = compute_signals(observations, **rule, smooth=config.smooth)
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
