"""One event, one straight line; the training loop and ``memwatch scan`` call the same function.

rotate -> screen all -> measure what stands out -> remember -> judge -> prove -> stop -> act -> report -> sinks
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from tqdm.auto import tqdm

from memwatch.act.stop import decide_stop
from memwatch.config import MemWatchConfig
from memwatch.faults import Faults, PartError
from memwatch.judge.findings import Judgement, judge_event
from memwatch.judge.screen import chosen, with_references
from memwatch.judge.statistic import UNKNOWN_EVENTS, Screened
from memwatch.measure.baselines import Baselines
from memwatch.measure.measurement import Observation
from memwatch.measure.observer import Observer
from memwatch.proof.prove import prove
from memwatch.report.about import About
from memwatch.report.report import Report
from memwatch.report.sinks import Sinks
from memwatch.resume import Progress

MEASURING, SCREENING = "measuring the probes", "choosing whose curvature to measure"
CHECKING, REMEMBERING = "checking the prediction type", "storing the measurements"
JUDGING, STOPPING, REPORTING = "judging the measurements", "deciding whether to stop", "writing the report"
NEEDED = (MEASURING, SCREENING, REMEMBERING, JUDGING, STOPPING)  # an event takes all of these

Observed = tuple[list[Observation], Screened | None]


class Watched(Protocol):
    """What has events: a run that trains, or a scan of finished checkpoints."""

    config: MemWatchConfig
    observer: Observer
    baselines: Baselines
    faults: Faults
    sinks: Sinks
    about: About
    progress: Progress

    @property
    def planned(self) -> int | None:
        """How many events will be judged, if known."""

    def observe(self, step: int, *, full: bool) -> Observed:
        """The observations of every probe, the same on every rank; usually by ``observe_all``."""

    def act(self, step: int, judgement: Judgement) -> None:
        """What follows from a judgement, on every rank."""


def conduct(watch: Watched, step: int) -> Report:
    """One event, on every rank. A failure costs this event, on every rank; the next event tries again.

    Returns:
        The report, with pictures on the main process. Of an event that failed it has a ``failure`` and no findings.
    """
    started, progress, observer, faults = time.perf_counter(), watch.progress, watch.observer, watch.faults
    ranks, main, config = observer.ranks, observer.ranks.accelerator.is_main_process, watch.config
    full, judgement, failure = config.is_full_event(progress.events), Judgement(), None
    observer.rotate(progress.events, {name for name, state in progress.states.items() if state.verdict.is_evidence})
    progress.last_step, progress.events = step, progress.events + 1
    try:
        seen, screened = watch.observe(step, full=full)
        if misread := ranks.broadcast(ranks.together(CHECKING, faults, lambda: observer.misread(seen))):
            raise PartError(misread)
        weights, rotation = observer.trainable_weights, [p.name for p in observer.rotation]
        ranks.together(REMEMBERING, faults, lambda: watch.baselines.remember(step, seen, weights, faults, rotation))
        observations = observer.in_order(seen)
        judged_by = (progress.states, step, config, looks_in(observer, watch.planned), screened)
        judgement = ranks.together(JUDGING, faults, lambda: judge_event(observations, *judged_by))
        found = prove(judgement.findings, observations, observer, faults, progress.stop.copied)
        judgement = replace(judgement, findings=found)
        stop = ranks.together(STOPPING, faults, lambda: decide_stop(progress.stop, found, step, config.stop))
        progress.states, progress.stop = dict(judgement.states), ranks.broadcast(stop)
        watch.act(step, judgement)
    except PartError as failed:
        judgement, failure = Judgement(), str(failed)
    faults.count = ranks.largest(faults.count)  # a disk may be full on one machine only
    seconds = time.perf_counter() - started
    progress.clock.first = progress.clock.first or seconds
    report = report_of(watch, step, judgement, failure, seconds)
    with suppress(PartError):
        if not faults.is_off(REPORTING):
            trackers: Sequence[Any] = ranks.accelerator.trackers
            return ranks.together(REPORTING, faults, lambda: watch.sinks.write(report, trackers) if main else report)
    return report


def looks_in(observer: Observer, planned: int | None) -> int:
    """How many verdicts a run may give at its planned events: of its probes, and of the rows rotated in at each.

    A row that stays because it stands out counts once.
    """
    num_fixed = sum(not p.probe.is_control for p in observer.fixed)
    return (planned or UNKNOWN_EVENTS) * (num_fixed + min(observer.config.rotation.per_event, len(observer.rotation)))


def observe_all(watch: Watched, step: int, *, full: bool) -> Observed:
    """Screen everything, then measure curvature for what stands out and for the controls that it is judged by.

    The second item is ``None`` without a screen. Where weights cannot be exchanged later, curvature is measured at once
    for what has no baseline yet.

    Args:
        full: whether curvature is measured for everything but the rows in rotation.
    """
    observer, config, ranks = watch.observer, watch.config, watch.observer.ranks
    observer.forget_generations()
    everything = {p.name for p in observer.probes}
    screened = measure(watch, step, everything, curvature=False) if config.screens else []
    names = ranks.together(SCREENING, watch.faults, lambda: chosen(screened, config)) if screened else set()
    measured = with_references(names, [p.probe for p in observer.probes])
    if full:
        names = names | {p.name for p in observer.fixed}
    elif not ranks.swappable:
        names = names | {o.name for o in screened if o.baseline is None}
    seen = screened + measure(watch, step, names | measured, curvature=True)
    return seen, Screened(screened, frozenset(names)) if config.screens else None


def measure(watch: Watched, step: int, names: Collection[str], *, curvature: bool) -> list[Observation]:
    """The observations of these probes, the same on every rank; each rank measures its share."""
    observer, ranks = watch.observer, watch.observer.ranks
    last_clean = {name: state.last_clean for name, state in watch.progress.states.items()}
    hidden = not ranks.accelerator.is_main_process

    def share() -> list[Observation]:
        with observer.borrowed():
            probes = ranks.share(observer.probes)  # encoded anew inside, where the text encoder is trained
            probes = [p for p in probes if p.name in names]
            title = f"memwatch step {step}, {'curvature' if curvature else 'screen'}"
            with tqdm(total=len(probes), desc=title, leave=False, disable=hidden, unit="probe") as bar:
                return observer.observe(probes, watch.baselines, last_clean, bar.update, curvature=curvature)

    return ranks.gather(ranks.together(MEASURING, watch.faults, share)) if names else []


def report_of(watch: Watched, step: int, judgement: Judgement, failure: str | None, seconds: float) -> Report:
    """The event as the sinks get it."""
    progress = watch.progress
    return Report(
        step,
        watch.config,
        judgement,
        watch.observer.has_controls,
        seconds,
        watch.faults.count,
        progress.stop.reason,
        failure=failure,
        overhead=progress.clock.overhead,
        about=watch.about,
    )
