"""Screen: whose curvature is worth measuring at this event, from forward passes alone.

The loss term sees what is being stored before the variance term does, and costs a fraction of it. What it singles out
is measured with curvature, which confirms it, localizes it, and tells stored from merely learned; and so are the
controls and peers that it is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from memwatch.config import MemWatchConfig
from memwatch.judge.statistic import Compared
from memwatch.measure.measurement import Observation
from memwatch.measure.probes import Probe

# Predictive standard deviations above the controls, at any size. An alert takes 3.4 with 20 controls and 2.98 with any
# number. One chosen item costs the curvature of all controls as well, so chance should choose little: of 24 probes and
# 20 controls with nothing stored it chooses any at 36 % of events, from 2.5 on at 57 %, from 1.5 on always (simulated,
# normal log factors; fewer where pictures hardly differ, up to 71 % where half of them have risen, which counts as 0).
MIN_Z_SCORE = 2.9
MIN_FACTOR = 1.2  # of the smallest region, where there are too few controls


def with_references(names: Collection[str], probes: Collection[Probe]) -> set[str]:
    """What is chosen, and what it is judged by: the controls of its kind and, where it is watched, the peers."""
    chosen = [p for p in probes if p.name in names]
    judged, watched = {p.is_reference for p in chosen}, {p.is_reference for p in chosen if not p.is_control}
    controls = {p.name for p in probes if p.is_control and p.is_reference in judged}
    peers = {p.name for p in probes if p.is_peer and p.is_reference in watched}
    return {*names} | controls | peers


def chosen(observations: Sequence[Observation], config: MemWatchConfig) -> set[str]:
    """The names of those that are to be judged with curvature.

    One rule for probes and controls alike, each against the controls of its kind without itself. So a control is chosen
    as often as a probe of which nothing is stored, and what is judged afterwards stays exchangeable. Peers are never
    chosen, because nothing is asked of them: they are measured for what is judged by them.

    Args:
        observations: of the screen; those without a baseline are passed over.
    """
    seen = Compared.of(observations, config.signals, terms="loss")

    def stands_out(o: Observation) -> bool:
        profile, null = seen.profiles[o.name], seen.controls_of(o.probe)
        if o.probe.is_peer or not np.isfinite(profile).all():
            return False
        if not null.is_enough:
            return bool(profile.max() >= math.log(MIN_FACTOR))
        return any(null.z_score(mean, size) >= MIN_Z_SCORE for size, mean in enumerate(profile))

    return {o.name for o in observations if stands_out(o)}
