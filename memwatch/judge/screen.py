"""Screen: whose curvature is worth measuring at this event, from forward passes alone.

The loss term sees what is being stored before the variance term does, and costs a fraction of it. What it singles out
is measured with curvature, which confirms it, localizes it, and tells stored from merely learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from memwatch.config import MemWatchConfig
from memwatch.judge.calibration import Null
from memwatch.judge.findings import profile_of
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import compute_signals

MIN_EXCESS = 1.5  # predictive standard deviations above the controls, at any size; an alert takes 3.4 (20 controls)
MIN_FACTOR = 1.2  # of the smallest region, where there are too few controls


def chosen(observations: Sequence[Observation], config: MemWatchConfig) -> set[str]:
    """The names of those whose curvature is to be measured.

    One rule for probes, controls and peers alike, each against the controls of its kind without itself. So a control
    is chosen as often as a probe of which nothing is stored, and what is judged afterwards stays exchangeable.

    Args:
        observations: of the screen; those without a baseline are passed over.
    """
    c = config.signals
    signals = compute_signals(observations, terms="loss", against=c.against, combine=c.combine, smooth=c.smooth)
    profiles = {name: profile_of(s) for name, s in signals.items()}

    def stands_out(o: Observation) -> bool:
        kind, profile = o.probe.is_reference, profiles[o.name]
        others = [x for x in observations if x.probe.is_control and x.probe.is_reference is kind and x.name != o.name]
        null = Null.of([profiles[x.name] for x in others])
        if not null.is_enough:
            return bool(profile.max() >= math.log(MIN_FACTOR))
        return any(null.excess(mean, size) >= MIN_EXCESS for size, mean in enumerate(profile))

    return {o.name for o in observations if np.isfinite(profiles[o.name]).all() and stands_out(o)}
