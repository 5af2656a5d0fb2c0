"""Screen: whose curvature is worth measuring at this event, from forward passes alone.

The loss term sees what is being stored before the variance term does, and costs a fraction of it. What it singles out
is measured with curvature, which confirms it, localizes it, and tells stored from merely learned.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from tqdm.auto import tqdm

from memwatch.config import MemWatchConfig
from memwatch.faults import Faults
from memwatch.judge.alerts import ProbeState
from memwatch.judge.findings import null_of, profile_of
from memwatch.measure.baselines import Baselines
from memwatch.measure.measurement import Observation
from memwatch.measure.observer import Observer
from memwatch.measure.signals import compute_signals

LOOKING, SCREENING = "looking at the model", "choosing what to measure"
MIN_EXCESS = 1.5  # predictive standard deviations above the controls, at any size; an alert takes 3.4 (20 controls)
MIN_FACTOR = 1.2  # of the smallest region, where there are too few controls


def observe(
    observer: Observer,
    baselines: Baselines,
    states: Mapping[str, ProbeState],
    faults: Faults,
    step: int,
    *,
    full: bool,
) -> list[Observation]:
    """One event's observations: of the screen for everything, then with curvature; the same on every rank.

    Where weights cannot be exchanged later, what has no baseline yet is measured with curvature at once.

    Args:
        states: by name; they say when a probe was clean last.
        full: whether curvature is measured on everything but what takes turns.
    """
    ranks, config = observer.ranks, observer.config
    hidden = not ranks.accelerator.is_main_process
    last_clean = {name: state.last_clean for name, state in states.items()}

    def look(names: Collection[str], curvature: bool) -> list[Observation]:
        """Every rank looks at its share."""
        with observer.borrowed():
            probes = ranks.share(observer.probes)  # as a trained text encoder understands them now
            probes = [p for p in probes if p.name in names]
            title = f"memwatch step {step}, {'curvature' if curvature else 'screen'}"
            with tqdm(total=len(probes), desc=title, leave=False, disable=hidden, unit="probe") as bar:
                return observer.observe(probes, baselines, last_clean, bar.update, curvature=curvature)

    def looked(names: Collection[str], curvature: bool) -> list[Observation]:
        """All get everything."""
        if not names:
            return []
        return ranks.gather(ranks.together(LOOKING, faults, lambda: look(names, curvature)))

    observer.forget_generations()
    screened = looked({p.name for p in observer.probes}, curvature=False) if config.screens else []
    names = ranks.together(SCREENING, faults, lambda: chosen(screened, config)) if screened else set()
    if full:
        names = names | {p.name for p in observer.fixed}
    elif not ranks.swappable:  # now or never
        names = names | {o.name for o in screened if o.baseline is None}
    return screened + looked(names, curvature=True)


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
    controls = [o for o in observations if o.probe.is_control]

    def stands_out(o: Observation) -> bool:
        profile, null = profiles[o.name], null_of(profiles, controls, o)
        if not null.is_enough:
            return bool(profile.max() >= math.log(MIN_FACTOR))
        return any(null.excess(mean, size) >= MIN_EXCESS for size, mean in enumerate(profile))

    return {o.name for o in observations if np.isfinite(profiles[o.name]).all() and stands_out(o)}
