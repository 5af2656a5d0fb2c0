"""Screen: forward passes alone decide whose curvature is measured at this event.

Curvature, and more noise draws, are measured of probes whose loss exceeds the controls, and of the controls that they
are judged by.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from memwatch.config import MemWatchConfig
from memwatch.judge.statistic import Compared, compare
from memwatch.measure.measurement import Observation
from memwatch.measure.probes import Probe

# Of T. An alert takes 3.4 with 20 controls, never below 2.98. One chosen probe costs the curvature of all controls too:
# with 24 probes, 20 controls and nothing stored, 2.9 chooses something at 26 % of events, 2.5 at 48 %, 1.5 at all.
MIN_Z_SCORE = 2.9
MIN_FACTOR = 1.2  # reduction factor at the smallest size, where there are too few controls


def with_references(names: Collection[str], probes: Collection[Probe]) -> set[str]:
    """What is chosen, and the controls of its kind."""
    judged = {p.is_reference for p in probes if p.name in names}
    return {*names} | {p.name for p in probes if p.is_control and p.is_reference in judged}


def chosen(observations: Sequence[Observation], config: MemWatchConfig) -> set[str]:
    """Who is judged with curvature: by one rule, so that probes and controls of which nothing is stored are alike."""

    def stands_out(compared: Compared) -> bool:
        if compared.score is not None:
            return compared.score >= MIN_Z_SCORE
        return bool(compared.profile.max() >= math.log(MIN_FACTOR))  # never where nothing was compared: NaN

    seen = compare(observations, config.signals, terms="loss")
    return {name for name, compared in seen.items() if stands_out(compared)}
