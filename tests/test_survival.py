"""A monitor survives: whatever fails costs the event, is reported, and is tried again at the next one."""

from __future__ import annotations

import logging

import pytest
import torch
from support.builders import EAGER, Loop, assert_same, history
from support.trackers import Recorder

import memwatch.callback
from memwatch.judge.stop import StopState
from memwatch.measure.baselines import Baselines
from memwatch.measure.observer import Observer
from memwatch.run_folder import RunFolder

PARTS = {
    "making room in output_dir": (RunFolder, "enter"),
    "looking at the model": (Observer, "observe"),
    "keeping what was seen": (Baselines, "remember"),
    "judging what was seen": (memwatch.callback, "judge_event"),
    "deciding whether to stop": (memwatch.callback, "decide_stop"),
}
LATER = [part for part in PARTS if part != "making room in output_dir"]  # that one has work at the first event only
OOM = torch.OutOfMemoryError("tried to allocate 8 GiB")


def break_at(monkeypatch, part: str, loop: Loop, steps, error: Exception) -> None:
    """Let what does this part raise after these optimizer steps."""
    owner, name = PARTS[part]
    real = getattr(owner, name)

    def failing(*args, **kwargs):
        if loop.step in steps:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("error", [OOM, ValueError("broken")], ids=["memory", "bug"])
@pytest.mark.parametrize("part", LATER)
def test_a_failure_costs_one_event_which_has_a_report(
    part, error, pretrained, pipeline, images, tmp_path, monkeypatch, caplog
):
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    watch = loop.watch(pipeline, controls=images)
    break_at(monkeypatch, part, loop, {2}, error)
    with caplog.at_level(logging.WARNING, "memwatch"):
        reports = loop.run(watch, 6)
    assert loop.step == 6
    assert [report.step for report in reports] == [2, 4, 6]
    assert [len(report.findings) for report in reports] == [0, 2, 2]
    assert [report.failure for report in reports] == [f"{part} failed: {error!r}", None, None]
    assert [report.errors for report in reports] == [1, 1, 1]
    rows = history(tmp_path)
    assert [(row["step"], row["errors"]) for row in rows] == [(0, 0), (2, 1), (4, 1), (6, 1)]
    assert [row["failure"] is not None for row in rows] == [False, True, False, False]
    logged = {step: row["memwatch/errors"] for step, row in recorder.rows if "memwatch/step" in row}
    assert logged == {0: 0, 2: 1, 4: 1, 6: 1}
    (said,) = [message for message in caplog.messages if repr(error) in message]
    assert said == f"memwatch: {part} failed ({error!r}); memwatch will try again at the next event. Training goes on."


@pytest.mark.parametrize("part", PARTS)
def test_three_failures_in_a_row_end_the_events_and_not_the_training(
    part, pretrained, pipeline, tmp_path, monkeypatch, caplog
):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    break_at(monkeypatch, part, loop, range(99), ValueError("broken"))
    with caplog.at_level(logging.WARNING, "memwatch"):
        reports = [watch.begin(), *loop.run(watch, 8)]
    assert loop.step == 8
    assert [report.step for report in reports] == [0, 2, 4]  # no event is due after that
    assert watch.faults.is_off(part)
    assert [row["errors"] for row in history(tmp_path)] == [1, 2, 3]
    assert sum("3 times in a row, so it is switched off" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("part", LATER)
def test_strict_raises_whatever_fails(part, pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, strict=True)
    break_at(monkeypatch, part, loop, {2}, ValueError("broken"))
    with pytest.raises(RuntimeError, match=f"memwatch: {part} failed: ValueError"):
        loop.run(watch, 4)


def test_training_is_bit_identical_around_a_judge_that_raised(pretrained, pipeline, tmp_path, monkeypatch):
    bare = Loop(pretrained)
    bare.run(None, 5)
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    break_at(monkeypatch, "judging what was seen", loop, {2}, ValueError("broken"))
    loop.run(watch, 5)
    assert_same(bare.state(), loop.state())


@pytest.mark.usefixtures("eager")
def test_a_failed_event_leaves_what_the_judge_remembers(pretrained, pipeline, images, tmp_path, monkeypatch):
    """Otherwise an alert that was decided in it would never be news again."""
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    watch = loop.watch(pipeline, controls=images, **EAGER | {"stop": {"enabled": False}})
    watch.begin()
    before = watch.state_dict()["states"]
    break_at(monkeypatch, "deciding whether to stop", loop, {2}, ValueError("broken"))
    (failed,) = loop.run(watch, 2)
    assert failed.alerts == ()
    assert watch.state_dict()["states"] == before
    loop.run(watch, 4)
    assert watch.state_dict()["states"] != before


def test_a_stop_that_was_decided_is_told_by_a_failed_event_as_well(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    watch.begin()
    monkeypatch.setattr(memwatch.callback, "decide_stop", lambda *args: StopState(1, "enough"))
    watch.on_step_end(2)
    loop.step = 4
    break_at(monkeypatch, "judging what was seen", loop, {4}, ValueError("broken"))
    assert watch.on_step_end(4).stop_reason == "enough"
    assert history(tmp_path)[-1]["scalars"]["memwatch/stop"] == 1


def test_a_first_event_that_failed_leaves_the_baseline_to_the_next(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    break_at(monkeypatch, "looking at the model", loop, {0}, OOM)
    assert watch.begin().failure is not None
    reports = loop.run(watch, 4)
    assert [{f.observation.baseline_step for f in report.findings} for report in reports] == [{None}, {2}]


def test_counts_in_a_row_survive_a_resume(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    watch.begin()
    break_at(monkeypatch, "looking at the model", loop, range(2, 99), OOM)
    loop.run(watch, 4)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline)
    again.accelerator.load_state(str(tmp_path / "checkpoint"))
    again.step = 4
    monkeypatch.undo()
    break_at(monkeypatch, "looking at the model", again, {6}, OOM)
    assert [report.errors for report in again.run(watch, 8)] == [3]
    assert watch.faults.is_off("looking at the model")
