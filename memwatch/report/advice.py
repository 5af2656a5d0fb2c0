"""Advice: what to do about a finding, and what a run's report does not say. Plain sentences."""

from __future__ import annotations

from memwatch.judge.verdict import Verdict
from memwatch.measure.probes import MIN_CONTROLS
from memwatch.report.history import Event, Row, Run


def headline(run: Run) -> str:
    """What happened, in one sentence."""
    last, count = run.last, len(run.last.rows)
    if not last.rows:
        return f"Step {last.step}: no probe has been judged yet."
    if run.memorized:
        said = f"{len(run.memorized)} of {count} probes {verb(len(run.memorized))} memorized, since step {since(run)}"
    elif suspicious := last.count(Verdict.SUSPICIOUS):
        said = f"{suspicious} of {count} probes {verb(suspicious)} suspicious, and none is memorized"
    elif last.count(Verdict.NO_EVIDENCE):
        said = f"No evidence of anything stored on {last.count(Verdict.NO_EVIDENCE)} of {count} probes"
    else:
        said = "Nothing can be said yet: every probe is inconclusive"
    return f"{said}; memwatch decided to stop the training at step {run.stop.step}." if run.stop else f"{said}."


def since(run: Run) -> int:
    """The step of the first event with evidence of what is memorized, of any probe."""
    called = [(e.step, row) for e in run.events for row in e.rows if row.verdict is Verdict.MEMORIZED]
    return min(step if row.since is None else row.since for step, row in called)


def verb(count: int) -> str:
    return "is" if count == 1 else "are"


def advice_of(row: Row) -> str:
    """What to do about one probe."""
    if row.verdict is Verdict.MEMORIZED:
        back = "one can go back to a checkpoint from there, or to last_clean/, of before there was enough to call"
        before = f" Events before step {row.since} showed none of it: {back}." if row.since else ""
        known = "flagged.jsonl names those that memwatch knows"
        what = f"Find its duplicates, and the images that share this region ({known}); keep one of them, or none."
        if not row.is_reference:
            what = "Look for training images with this caption or a similar one; keep one of them, or none."
        return f"Stop training on it. {what}{before} Fewer steps, a lower rate or a smaller LoRA rank store less."
    if row.verdict is Verdict.SUSPICIOUS:
        return "Watch the next events. If the effect grows, treat it as memorized; look for duplicates already now."
    if row.verdict is Verdict.INCONCLUSIVE:
        return f"No judgement is possible: {row.reason}."
    return "Nothing to do. That there is no evidence on this probe does not mean that nothing is stored elsewhere."


def not_watched(run: Run) -> list[str]:
    """What nobody can read out of this report, one sentence each."""
    about, last = run.about, run.last
    probes = [p for p in about.probes if p["role"] == "probe"]
    images = sum(p["is_reference"] for p in probes)
    said = []
    if about.training_rows is not None:
        rows = about.training_rows
        turns = sum(int((event.scalars or {}).get("memwatch/rotated", 0)) for event in run.events)
        also = f"; others had {turns} turns" if turns else ""
        watched = f"{images} images are watched{also}"
        said.append(f"The training set has {rows} rows, and {watched}. The rest is not looked at.")
    else:
        count = images or len(last.rows)
        said.append(f"{count} probes are watched. Whatever else is in the training set is not looked at.")
    timesteps = sorted({t for row in last.rows for t in row.timesteps})
    if timesteps:
        said.append(f"Noise levels other than t = {', '.join(f'{t:g}' for t in timesteps)} are not looked at.")
    unjudged = [row.name for row in last.rows if row.verdict is Verdict.INCONCLUSIVE]
    if unjudged:
        said.append(f"At the last event no judgement was possible of {', '.join(unjudged[:8])}{more(unjudged, 8)}.")
    if not last.calibrated:
        said.append("There are no controls: alerts are uncalibrated, and nothing can be called memorized.")
    elif 0 < len(last.controls or {}) < MIN_CONTROLS:
        said.append(f"{len(last.controls or {})} controls were usable, and it takes {MIN_CONTROLS} of a probe's kind.")
    lost = [event for event in run.events if event.failure is not None]
    if lost:
        steps = ", ".join(str(event.step) for event in lost[:8])
        said.append(f"Lost events: step {steps}{more(lost, 8)}.")
    said.append("A style, a celebrity or another concept spreads over the whole picture and does not localize.")
    said.append("'No evidence' is said of these probes alone. It never means that the model has memorized nothing.")
    return said


def more(items: list[str] | list[Event], shown: int) -> str:
    """The words behind a list that was cut."""
    return f" and {len(items) - shown} more" if len(items) > shown else ""
