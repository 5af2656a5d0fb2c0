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

from memwatch.config import MemWatchConfig
from memwatch.faults import Faults, PartError
from memwatch.judge.findings import Judgement, judge_event
from memwatch.judge.proof import prove
from memwatch.judge.screen import chosen, with_references
from memwatch.judge.statistic import Screened
from memwatch.judge.stop import decide_stop
from memwatch.measure.baselines import Baselines
from memwatch.measure.measurement import Observation
from memwatch.measure.observer import Observer
from memwatch.pace import planned_events
from memwatch.report.about import About
from memwatch.report.report import Report
from memwatch.report.sinks import Sinks
from memwatch.resume import Progress, with_evidence

LOOKING, SCREENING = "looking at the model", "choosing what to measure"
READING, KEEPING = "telling epsilon from v_prediction", "keeping what was seen"
JUDGING, STOPPING, REPORTING = "judging what was seen", "deciding whether to stop", "writing the report"
NEEDED = (LOOKING, SCREENING, KEEPING, JUDGING, STOPPING)  # without any of these there is no event

Seen = tuple[list[Observation], Screened | None]


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
    def every_steps(self) -> int | None: ...

    def look(self, step: int, *, full: bool) -> Seen:
        """What is seen of every probe, the same on every rank; usually ``look_at_all``."""

    def act(self, step: int, judgement: Judgement) -> None:
        """What follows from a judgement, on every rank."""


def conduct(watch: Watched, step: int) -> Report:
    """One event, on every rank. What fails costs this event, on every rank, and is tried again at the next one.

    Returns:
        The report, with pictures on the main process. Of an event that failed it has a ``failure`` and no findings.
    """
    started, progress, observer, faults = time.perf_counter(), watch.progress, watch.observer, watch.faults
    ranks, main = observer.ranks, observer.ranks.accelerator.is_main_process
    full, judgement, failure = watch.config.is_full_event(progress.events), Judgement(), None
    observer.rotate(progress.events, with_evidence(progress.states))
    progress.last_step, progress.events = step, progress.events + 1
    try:
        seen, screened = watch.look(step, full=full)
        if misread := ranks.broadcast(ranks.together(READING, faults, lambda: observer.misread(seen))):
            raise PartError(misread)
        ranks.together(KEEPING, faults, lambda: remember(watch, step, seen))
        watch.baselines.settle()
        observations = observer.in_order(seen)
        planned = planned_events(watch.config.max_train_steps, watch.every_steps)
        judgement = ranks.together(JUDGING, faults, lambda: judge(watch, step, observations, screened, planned))
        found = prove(judgement.findings, observations, observer, faults, progress.stop.copied)
        judgement = replace(judgement, findings=found)
        rule = watch.config.stop
        stop = ranks.together(STOPPING, faults, lambda: decide_stop(progress.stop, found, step, rule))
        progress.states, progress.stop = dict(judgement.states), ranks.broadcast(stop)
        watch.act(step, judgement)
    except PartError as failed:
        judgement, failure = Judgement(), str(failed)
    faults.count = ranks.largest(faults.count)  # a disk may be full on one machine only
    report = report_of(watch, step, judgement, failure, time.perf_counter() - started)
    with suppress(PartError):
        if not faults.is_off(REPORTING):
            trackers: Sequence[Any] = ranks.accelerator.trackers
            return ranks.together(REPORTING, faults, lambda: watch.sinks.write(report, trackers) if main else report)
    return report


def look_at_all(watch: Watched, step: int, *, full: bool) -> Seen:
    """Screen everything, then measure curvature for what stands out and for the controls that it is judged by.

    Both parts of what it returns are the same on every rank; the second is ``None`` without a screen. Where weights
    cannot be exchanged later, what has no baseline yet is measured with curvature at once.

    Args:
        full: whether curvature is measured for everything but the rows in rotation.
    """
    observer, config, faults = watch.observer, watch.config, watch.faults
    ranks = observer.ranks
    hidden = not ranks.accelerator.is_main_process
    last_clean = {name: state.last_clean for name, state in watch.progress.states.items()}

    def look(names: Collection[str], curvature: bool) -> list[Observation]:
        """At this rank's share."""
        with observer.borrowed():
            probes = ranks.share(observer.probes)  # as a trained text encoder understands them now
            probes = [p for p in probes if p.name in names]
            title = f"memwatch step {step}, {'curvature' if curvature else 'screen'}"
            with tqdm(total=len(probes), desc=title, leave=False, disable=hidden, unit="probe") as bar:
                return observer.observe(probes, watch.baselines, last_clean, bar.update, curvature=curvature)

    def look_together(names: Collection[str], curvature: bool) -> list[Observation]:
        """All ranks get what all have seen."""
        return ranks.gather(ranks.together(LOOKING, faults, lambda: look(names, curvature))) if names else []

    observer.forget_generations()
    screened = look_together({p.name for p in observer.probes}, curvature=False) if config.screens else []
    names = ranks.together(SCREENING, faults, lambda: chosen(screened, config)) if screened else set()
    measured = with_references(names, [p.probe for p in observer.probes])
    if full:
        names = names | {p.name for p in observer.fixed}
    elif not ranks.swappable:  # now or never
        names = names | {o.name for o in screened if o.baseline is None}
    seen = screened + look_together(names | measured, curvature=True)
    return seen, Screened(screened, frozenset(names)) if config.screens else None


def remember(watch: Watched, step: int, seen: Sequence[Observation]) -> None:
    """What was seen becomes a baseline of later events."""
    rotation = [p.name for p in watch.observer.rotation]
    watch.baselines.remember(step, seen, watch.observer.trainable_weights, watch.faults, rotation)


def judge(
    watch: Watched, step: int, seen: Sequence[Observation], screened: Screened | None, planned: int | None
) -> Judgement:
    """Maps, statistics, verdicts, and the false-alarm check on the controls.

    Args:
        planned: how many events the run will have, if known.
    """
    rotating = watch.observer.num_rotating(planned)
    return judge_event(seen, watch.progress.states, step, watch.config, planned, rotating, screened)


def report_of(watch: Watched, step: int, judgement: Judgement, failure: str | None, seconds: float) -> Report:
    """The event as the sinks get it."""
    progress = watch.progress
    progress.clock.first = progress.clock.first or seconds
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
