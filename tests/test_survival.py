"""A monitor survives: whatever fails costs the event, is reported, and is tried again at the next one."""

from __future__ import annotations

import logging

import pytest
import torch
from support.builders import Loop, assert_same, history, stop_at
from support.trackers import Recorder

import memwatch.event
from memwatch.event import JUDGING, MEASURING, REMEMBERING, STOPPING
from memwatch.measure.baselines import Baselines
from memwatch.measure.observer import Observer
from memwatch.run_folder import RunFolder

PARTS = {  # the first one has work at the first event only
    "preparing output_dir": (RunFolder, "enter"),
    MEASURING: (Observer, "observe"),
    REMEMBERING: (Baselines, "remember"),
    JUDGING: (memwatch.event, "judge_event"),
    STOPPING: (memwatch.event, "decide_stop"),
}
OOM = torch.OutOfMemoryError("tried to allocate 8 GiB")
BUG = ValueError("broken")


@pytest.fixture
def loop(pretrained, tmp_path) -> Loop:
    return Loop(pretrained, tmp_path)


def break_at(monkeypatch, part: str, loop: Loop, steps, error: Exception = BUG) -> None:
    """Let what does this part raise after these optimizer steps."""
    owner, name = PARTS[part]
    real = getattr(owner, name)

    def failing(*args, **kwargs):
        if loop.step in steps:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(("part", "error"), [(MEASURING, OOM), *((part, BUG) for part in list(PARTS)[1:])])
def test_a_failure_costs_one_event_which_has_a_report(
    part, error, pretrained, pipeline, images, tmp_path, monkeypatch, caplog
):
    bare, recorder = Loop(pretrained), Recorder()
    bare.run(None, 6)
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    watch = loop.watch(pipeline, controls=images)
    break_at(monkeypatch, part, loop, {2}, error)
    with caplog.at_level(logging.WARNING, "memwatch"):
        reports = loop.run(watch, 6)
    assert_same(bare.state(), loop.state())
    assert [report.step for report in reports] == [2, 4, 6]
    assert [len(report.findings) for report in reports] == [0, 2, 2]
    assert [report.failure for report in reports] == [f"{part} failed: {error!r}", None, None]
    errors = {0: 0, 2: 1, 4: 1, 6: 1}
    assert {row["step"]: row["errors"] for row in history(tmp_path)} == errors
    assert {step: row["memwatch/errors"] for step, row in recorder.rows if "memwatch/step" in row} == errors
    (said,) = [message for message in caplog.messages if repr(error) in message]
    assert said == f"{part} failed ({error!r}); memwatch will try again at the next event. Training goes on."


@pytest.mark.parametrize("part", PARTS)
def test_three_failures_in_a_row_end_the_events_and_not_the_training(
    part, loop, pipeline, tmp_path, monkeypatch, caplog
):
    watch = loop.watch(pipeline)
    break_at(monkeypatch, part, loop, range(99))
    with caplog.at_level(logging.WARNING, "memwatch"):
        reports = [watch.begin(), *loop.run(watch, 8)]
    assert loop.step == 8
    assert [report.step for report in reports] == [0, 2, 4]  # no event is due after that
    assert watch.faults.is_off(part)
    assert [row["errors"] for row in history(tmp_path)] == [1, 2, 3]
    assert sum("3 times in a row, so it is switched off" in message for message in caplog.messages) == 1


@pytest.mark.usefixtures("eager")
def test_a_failed_event_leaves_what_the_judge_remembers(pretrained, pipeline, images, tmp_path, monkeypatch):
    """Otherwise an alert that was decided in it would never be news again."""
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    watch = loop.watch(pipeline, controls=images, stop={"enabled": False})
    watch.begin()
    before = watch.state_dict()["states"]
    break_at(monkeypatch, STOPPING, loop, {2})
    (failed,) = loop.run(watch, 2)
    assert failed.alerts == ()
    assert watch.state_dict()["states"] == before
    stop_at(4, monkeypatch)
    loop.run(watch, 4)
    assert watch.state_dict()["states"] != before
    break_at(monkeypatch, JUDGING, loop, {4})
    assert watch.on_step_end(6).stop_reason == "enough"  # a stop that was decided is told by a failed event as well


def test_a_first_event_that_failed_leaves_the_baseline_to_the_next(loop, pipeline, monkeypatch):
    watch = loop.watch(pipeline)
    break_at(monkeypatch, MEASURING, loop, {0}, OOM)
    assert watch.begin().failure is not None
    reports = loop.run(watch, 4)
    assert [{f.observation.baseline_step for f in report.findings} for report in reports] == [{None}, {2}]


def test_counts_in_a_row_survive_a_resume(loop, pretrained, pipeline, tmp_path, monkeypatch):
    watch = loop.watch(pipeline)
    watch.begin()
    break_at(monkeypatch, MEASURING, loop, range(2, 99), OOM)
    loop.run(watch, 4)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline)
    again.accelerator.load_state(str(tmp_path / "checkpoint"))
    again.step = 4
    monkeypatch.undo()
    break_at(monkeypatch, MEASURING, again, {6}, OOM)
    assert [report.errors for report in again.run(watch, 8)] == [3]
    assert watch.faults.is_off(MEASURING)
