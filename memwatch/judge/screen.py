"""Screen: forward passes alone decide whose curvature is measured at this event.

The loss term shows what is being stored earlier than the variance term, at a fraction of the cost. Curvature is
measured for probes whose loss exceeds the controls, and for the controls that they are judged by: it confirms and
localizes what is stored, and tells it from what is merely learned.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from memwatch.config import MemWatchConfig
from memwatch.judge.statistic import Compared, compare
from memwatch.measure.measurement import Observation
from memwatch.measure.probes import Probe

# Predictive standard deviations above the controls, at any size. An alert takes 3.4 with 20 controls, never below 2.98.
# One chosen probe costs the curvature of all controls as well, so chance should choose little. With 24 probes, 20
# controls and nothing stored, 2.9 chooses something at 26 % of events, 2.5 at 48 %, 1.5 at all of them (simulated,
# normal log factors; 55 and 78 % where half of the pictures have got worse, which counts as unchanged).
MIN_Z_SCORE = 2.9
MIN_FACTOR = 1.2  # reduction factor at the smallest size, where there are too few controls


def with_references(names: Collection[str], probes: Collection[Probe]) -> set[str]:
    """What is chosen, and the controls of its kind."""
    judged = {p.is_reference for p in probes if p.name in names}
    return {*names} | {p.name for p in probes if p.is_control and p.is_reference in judged}


def chosen(observations: Sequence[Observation], config: MemWatchConfig) -> set[str]:
    """The names of those that are judged with curvature.

    One rule for probes and controls: each is compared with the controls of its kind without itself. So a control is
    chosen as often as a probe of which nothing is stored, and probes and controls stay exchangeable.

    Args:
        observations: of the screen; those without a baseline are passed over.
    """

    def stands_out(compared: Compared) -> bool:
        if compared.score is not None:
            return compared.score >= MIN_Z_SCORE
        return bool(compared.profile.max() >= math.log(MIN_FACTOR))  # never where nothing was compared: NaN

    seen = compare(observations, config.signals, terms="loss")
    return {name for name, compared in seen.items() if stands_out(compared)}
