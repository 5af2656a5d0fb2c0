"""Words: an event as a small table for the terminal; a run's verdicts, and what to do, for pages and pull requests."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import combining, east_asian_width

from memwatch.judge.verdict import Verdict
from memwatch.measure.probes import MIN_CONTROLS
from memwatch.report.about import About
from memwatch.report.history import Event, Row, Run

SHOWN = 3  # probes per event in the terminal, worst first
NAMED = 16  # others that are named there
HEAD = ("probe", "verdict", "effect", "region, px", "generations", "why")

# --- an event ---------------------------------------------------------------------------------------------------------


def summary(event: Event, about: About, *, shown: int = SHOWN) -> str:
    """Verdict counts, the ``shown`` worst probes, the controls, the cost, and the reason of a stop."""
    planned = about.settings.get("max_train_steps")
    head = f"memwatch, step {event.step}{f' of {planned}' if planned else ''}"
    if event.failure is not None:
        lines = [f"{head}: this event is lost, because {event.failure}"]
    else:
        reasons = {row.reason for row in event.rows}
        if len(event.rows) > 1 == len(reasons) and event.count(Verdict.INCONCLUSIVE):  # as at the first event
            lines = [f"{head}: {event.counts()}", f"  {reasons.pop()}"]
        else:
            lines = [f"{head}: {event.counts()}", *table(event.worst_first[:shown])]
            lines += [f"  {others}"] if (others := event.left_out(shown, NAMED)) else []
        lines.append(f"  {event.calibration}")
    overhead = "" if event.overhead is None else f", {100 * event.overhead:.1f} % of training time"
    failures = f", {event.errors} failure{'s' if event.errors > 1 else ''} of memwatch so far" if event.errors else ""
    lines.append(f"  {event.seconds:.1f} s{overhead}{failures}")
    lines += [f"  STOP: {event.stop_reason}"] if event.stop_reason is not None else []
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned lines under a header; none without rows. A column that holds nothing is left out."""
    cells = [HEAD, *map(cells_of, rows)] if rows else []
    kept = [i for i in range(len(HEAD)) if any(line[i] for line in cells[1:])]
    widths = {i: max(columns(line[i]) for line in cells) for i in kept}
    return [f"  {'  '.join(line[i] + ' ' * (widths[i] - columns(line[i])) for i in kept)}".rstrip() for line in cells]


def columns(text: str) -> int:
    """How wide a terminal shows a text; East Asian characters take two columns."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def cells_of(row: Row) -> tuple[str, ...]:
    """A probe under ``HEAD``."""
    where = "{},{} to {},{}".format(*row.regions[0]["box"]) if row.regions else ""
    return row.title, str(row.verdict), row.effect, where, row.proof(brief=True), row.reason


# --- a run ------------------------------------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """What happened, in one sentence."""
    last, of, memorized = run.last, f"of {len(run.last.rows)} probes", run.memorized
    if not last.rows:
        return f"Step {last.step}: no probe has been judged yet."
    if found := len(memorized) or last.count(Verdict.SUSPICIOUS):
        what = f"memorized, since step {min(memorized.values())}" if memorized else "suspicious, and none is memorized"
        said = f"{found} {of} {'is' if found == 1 else 'are'} {what}"
    else:
        judged = last.count(Verdict.NO_EVIDENCE)
        said = f"No evidence in {judged} {of}" if judged else "No verdict yet: every probe is inconclusive"
    return f"{said}; memwatch decided to stop the training at step {run.stop.step}." if run.stop else f"{said}."


def advice_of(row: Row) -> str:
    """What to do about one probe."""
    if row.verdict is Verdict.MEMORIZED:
        what = "Look for training images with this caption or a similar one; keep one of them, or none."
        if row.is_reference:
            known = "flagged.jsonl lists those that memwatch knows"
            what = f"Find its duplicates and the images that share this region ({known}); keep one of them, or none."
        back = "a checkpoint from before it, or last_clean/, can be gone back to"
        before = f" Events before step {row.since} showed no evidence: {back}." if row.since else ""
        return f"Stop training on it. {what}{before} Fewer steps, a lower rate or a smaller LoRA rank store less."
    if row.verdict is Verdict.SUSPICIOUS:
        return "Watch the next events, and look for duplicates now. If the effect grows, treat it as memorized."
    if row.verdict is Verdict.INCONCLUSIVE:
        return f"No judgement is possible: {row.reason}."
    return "Nothing to do. This says nothing about images that are not watched."


def not_watched(run: Run) -> list[str]:
    """What this report cannot say, one sentence each."""
    about, last = run.about, run.last
    images = sum(p["is_reference"] for p in about.probes if p["role"] == "probe")
    if about.training_rows is None:
        said = [f"{images or len(last.rows)} probes are watched; other images of the training set are not."]
    else:
        rotated = sum(int(event.scalars.get("memwatch/rotated", 0)) for event in run.events)
        also = f", and rows of the rotation were screened {rotated} times" if rotated else ""
        said = [f"The training set has {about.training_rows} rows; {images} of them are watched{also}."]
    if timesteps := sorted({t for row in last.rows for t in row.timesteps}):
        said.append(f"Only the noise levels t = {', '.join(f'{t:g}' for t in timesteps)} are measured.")
    if unjudged := [row.title for row in last.rows if row.verdict is Verdict.INCONCLUSIVE]:
        said.append(f"At the last event no judgement was possible for {', '.join(unjudged)}.")
    if not last.calibrated:
        said.append("There are no controls: alerts are uncalibrated, and nothing can be called memorized.")
    elif 0 < len(last.controls) < MIN_CONTROLS:
        said.append(f"{len(last.controls)} controls were usable; judging takes {MIN_CONTROLS} of a probe's kind.")
    if lost := [str(event.step) for event in run.events if event.failure is not None]:
        said.append(f"Lost events: step {', '.join(lost)}.")
    said.append("A style, a celebrity or another concept spreads over the whole picture and does not localize.")
    said.append("'No evidence' is said of these probes alone. It never means that the model has memorized nothing.")
    return said


def as_markdown(run: Run) -> str:
    """What the page says, in the words and tables of a comment."""
    last = run.last
    lines = [f"# {headline(run)}", "", f"`{run.folder}`, step {last.step}: {last.counts()}. {last.calibration}.", ""]
    lines += markdown_table([HEAD, *map(cells_of, last.worst_first)])
    alerts = [f"- step {step}: {row.title} is {row.verdict}. {row.why}." for step, row in run.rows if row.alert]
    advice = [f"- {row.title}: {advice_of(row)}" for row in last.worst_first if row.verdict.is_evidence]
    unseen = [f"- {sentence}" for sentence in not_watched(run)]
    for title, items in (("Alerts", alerts), ("What to do", advice), ("What was not watched", unseen)):
        lines += ["", f"## {title}", "", *map(escaped, items)] if items else []
    return "\n".join(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as a table; the first one is its header."""
    head, *rows = [f"| {' | '.join(map(escaped, cells))} |" for cells in lines]
    return [head, "|---" * len(lines[0]) + "|", *rows]


def escaped(text: str) -> str:
    """A cell of a Markdown table, or a line."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
