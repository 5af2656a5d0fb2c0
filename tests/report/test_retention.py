"""Retention: the disk holds a stated number of bytes for any number of events, spread over the whole run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.finding import event, found
from support.observations import seen
from support.trackers import Recorder

import memwatch.report.sinks
from memwatch import Report
from memwatch.cli import main
from memwatch.faults import Faults
from memwatch.report.files import FileSink
from memwatch.report.frames import frames_of
from memwatch.report.history import Run
from memwatch.report.retention import NEWEST, Retention, is_shown
from memwatch.report.sinks import Sinks


@pytest.mark.parametrize("every", [3001, 1, 7], ids=["no news", "always news", "some news"])
def test_the_bound_holds_for_any_number_of_events(every):
    """The rule without a disk: every event has 13 bytes."""
    rule = Retention(Path("nowhere"), 1000)
    for number in range(3000):
        rule.begin(number, number % every == every - 1).files = {Path("nowhere/file"): 13}
        rule.thin()
        steps = [kept.step for kept in rule.events]
        assert sum(kept.size for kept in rule.events) <= 1000
        assert steps[-NEWEST:] == list(range(max(0, number + 1 - NEWEST), number + 1))
    assert (len(steps), steps[0]) == (1000 // 13, 0)
    older = steps[:-NEWEST]
    assert max(np.diff(older)) <= 4 * 3000 / len(older)  # spread over the whole run


SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
PICTURED = ("heatmaps/cat", "heatmaps/dog", "images/dog", "overview")


def report(step: int, *, is_news: bool = False) -> Report:
    """A training image and a prompt, with pictures of their own."""
    cat, dog = found("cat", box=None), found("dog", "no evidence", box=None)
    cat = replace(cat, observation=replace(seen("cat"), image=cat.observation.image), is_alert=is_news)
    return replace(event(step, cat, dog), pictures={"cat": SMALL, "dog": SMALL}, overview=SMALL)


def steps_of(folder: Path) -> list[int]:
    return sorted(int(file.stem[5:]) for file in folder.glob("step_*"))


def run_of(folder: Path, steps: range, sink: FileSink | None = None, *, kept: int = 30) -> FileSink:
    """Events at ``steps``, with news at every 50th, and room for the pictures of ``kept``."""
    sink = sink or FileSink(folder)
    for step in steps:
        sink.write(report(step, is_news=step % 50 == 20))
        if not sink.retention.events[1:]:
            sink.retention.budget = kept * sink.retention.events[0].size
    return sink


def test_several_hundred_events_leave_their_numbers_and_the_pictures_of_some(tmp_path, capsys):
    run_of(tmp_path, range(300))
    steps = steps_of(tmp_path / "overview")
    assert len(steps) == 30
    assert {0, 20, 70, 120, 170, 220, 270, *range(292, 300)} <= set(steps)
    quiet = [step for step in steps if step < 292 and step % 50 != 20]
    assert max(np.diff(quiet)) <= 45  # a sixth of the run
    for folder in PICTURED:
        assert steps_of(tmp_path / folder) == steps
    assert (tmp_path / "images" / "cat.png").is_file()
    run = Run.read(tmp_path)
    assert [each.step for each in run.events] == list(range(300))
    frames = frames_of(run)
    assert frames.steps == steps
    assert main(["report", str(tmp_path)]) == 3
    page = " ".join((tmp_path / "report.html").read_text(encoding="utf-8").split())
    assert "The slider stops at 30 of 300 events: the first, the last, those with news" in page
    assert "<td>300: " in page


def test_a_run_that_is_resumed_keeps_the_same_pictures(tmp_path):
    """Also what the run had deleted or written after the checkpoint makes no difference."""
    budget = run_of(tmp_path / "whole", range(150)).retention.budget
    run_of(tmp_path / "broken", range(130))
    resumed = FileSink(tmp_path / "broken")
    resumed.retention.budget = budget
    resumed.rewind(99)
    assert max(steps_of(tmp_path / "broken" / "overview")) <= 99
    run_of(tmp_path / "broken", range(100, 150), resumed)
    for folder in PICTURED:
        assert steps_of(tmp_path / "broken" / folder) == steps_of(tmp_path / "whole" / folder)


def test_files_that_are_nobodys_are_left_alone(tmp_path):
    sink = run_of(tmp_path, range(3))
    others = [tmp_path / name for name in ("overview/mine.png", "maps/step_by_step.txt", "heatmaps/readme.md")]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"mine")
    sink.rewind(-1)
    assert steps_of(tmp_path / "overview") == []
    assert all(other.is_file() for other in others)


def test_trackers_get_pictures_of_news_and_of_ever_fewer_quiet_events(tmp_path, monkeypatch):
    shown: list[int] = []
    picture = lambda tracker, report: report.overview and shown.append(report.step)  # noqa: E731
    monkeypatch.setitem(memwatch.report.sinks.ADAPTERS, "recorder", picture)
    monkeypatch.setattr(memwatch.report.sinks, "picture_of", lambda report, finding: SMALL)
    monkeypatch.setattr(memwatch.report.sinks, "overview_of", lambda report: SMALL)
    sinks, tracker = Sinks(FileSink(tmp_path), Faults()), Recorder()
    for step in range(70):
        sinks.write(report(step, is_news=step in (31, 57)), [tracker])
    assert [step for step, _ in tracker.rows] == list(range(70))
    assert len(shown) == len(set(shown)) < 40
    assert {*range(16), 31, 57} <= set(shown)
    assert steps_of(tmp_path / "overview") == list(range(70))
    assert sum(map(is_shown, range(500))) == 56
    assert sum(map(is_shown, range(100_000))) < 120
