"""Validation losses that a loop logs: which they are, and that they stay with their run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import SMALL, Loop, assert_same, history
from support.trackers import Recorder

import memwatch.report.losses
from memwatch.report.history import Run
from memwatch.report.losses import LossSink, is_validation_loss
from memwatch.report.report import Report

YES = """val_loss val/loss validation_loss eval_loss loss/val loss/validation/step_average test_loss eval_cats_loss
valid_loss Validation/Loss val_loss_epoch loss_test train/val_loss eval/diffusion_loss loss/validation/epoch_average"""
NO = """train_loss loss interval_loss evaluator_time value_loss lr step_loss loss/average latest_loss eval_runtime
val_accuracy validation test loss/validation/step_divergence contest_loss loss/current glossy_val prior_loss"""


@pytest.mark.parametrize(("key", "expected"), [(k, True) for k in YES.split()] + [(k, False) for k in NO.split()])
def test_the_names_that_trainers_use(key, expected):
    assert is_validation_loss(key) is expected


def rows(folder: Path) -> list[tuple[int, str, float]]:
    """As they were written."""
    file = folder / "losses.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [(row["step"], row["key"], row["value"]) for row in map(json.loads, lines)]


@pytest.fixture
def report(pretrained, pipeline, tmp_path) -> Report:
    return Loop(pretrained, tmp_path / "elsewhere").watch(pipeline, config=SMALL).begin()


def test_numbers_of_any_make_are_kept_and_nothing_else(report, tmp_path):
    sink = LossSink(tmp_path)
    sink.note({"val_loss": torch.tensor(0.5), "test_loss": np.float32(0.25), "loss": 9.0, "eval/loss": 2}, np.int64(3))
    for value in (math.nan, math.inf, "many", None, torch.ones(2), [0.1], object()):
        sink.note({"val_loss": value}, 4)
    assert not (tmp_path / "losses.jsonl").exists()
    sink.write(report)
    assert rows(tmp_path) == [(3, "val_loss", 0.5), (3, "test_loss", 0.25), (3, "eval/loss", 2.0)]
    assert sink.count == 3


def test_after_the_first_report_a_loss_is_on_disk_at_once(report, tmp_path):
    sink = LossSink(tmp_path)
    sink.note({"val_loss": 0.5}, 1)
    sink.write(report)
    sink.write(report)
    sink.note({"val_loss": 0.4}, 2)
    assert rows(tmp_path) == [(1, "val_loss", 0.5), (2, "val_loss", 0.4)]
    sink.close()
    assert rows(tmp_path) == [(1, "val_loss", 0.5), (2, "val_loss", 0.4)]


def test_what_a_full_disk_refused_is_written_later(report, tmp_path, monkeypatch):
    sink = LossSink(tmp_path)
    sink.write(report)
    with monkeypatch.context() as patch:
        patch.setattr(memwatch.report.losses, "append", refuse)
        with pytest.raises(OSError, match="No space"):
            sink.note({"val_loss": 0.5}, 1)
    sink.note({"val_loss": 0.4}, 2)
    assert rows(tmp_path) == [(1, "val_loss", 0.5), (2, "val_loss", 0.4)]


def refuse(*args, **kwargs):
    raise OSError(28, "No space left on device")


# --- in a run ---------------------------------------------------------------------------------------------------------


def log_losses(loop: Loop) -> None:
    """A training loss at every step, and a validation loss at odd ones."""
    values = {"train_loss": 1.0} | ({"val_loss": loop.step / 10} if loop.step % 2 else {})
    loop.accelerator.log(values, step=loop.step)


def test_what_the_loop_logs_arrives_unchanged_and_its_validation_losses_are_kept(pretrained, pipeline, tmp_path):
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    loop.run(loop.watch(pipeline, config=SMALL), 4, each=log_losses)
    logged = [row for row in recorder.rows if "memwatch/step" not in row[1]]
    assert logged == [
        (step, {"train_loss": 1.0} | ({"val_loss": step / 10} if step % 2 else {})) for step in (1, 2, 3, 4)
    ]
    assert Run.read(tmp_path / "memwatch").losses == ((1, "val_loss", 0.1), (3, "val_loss", 0.3))


def test_losses_make_no_difference_to_training(pretrained, pipeline, tmp_path):
    states = []
    for watched in (False, True):
        loop = Loop(pretrained, tmp_path / str(watched), log_with=Recorder())
        watch = loop.watch(pipeline, config=SMALL) if watched else None
        loop.run(watch, 3, each=log_losses)
        states.append(loop.state())
    assert_same(*states)


def test_two_watches_of_one_accelerator_both_hear_and_a_closed_one_does_not(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, log_with=Recorder())
    first, second = (loop.watch(pipeline, config=SMALL, output_dir=str(tmp_path / name)) for name in "ab")
    for watch in (first, second):
        watch.begin()
    loop.accelerator.log({"val_loss": 0.5}, step=1)
    first.close()
    loop.accelerator.log({"val_loss": 0.4}, step=2)
    assert rows(tmp_path / "a") == [(1, "val_loss", 0.5)]
    assert rows(tmp_path / "b") == [(1, "val_loss", 0.5), (2, "val_loss", 0.4)]


def test_a_loss_before_the_first_event_never_lands_among_the_files_of_another_run(pretrained, pipeline, tmp_path):
    def watch_and_log(value: float):
        loop = Loop(pretrained, tmp_path, log_with=Recorder())
        watch = loop.watch(pipeline, config=SMALL)
        loop.accelerator.log({"val_loss": value}, step=0)
        return watch

    first = watch_and_log(0.5)
    first.begin()
    first.close()
    watch_and_log(0.6).close()  # without any event
    assert rows(tmp_path / "memwatch") == [(0, "val_loss", 0.5)]
    watch_and_log(0.7).begin()
    assert rows(tmp_path / "memwatch") == [(0, "val_loss", 0.7)]
    assert rows(tmp_path / "memwatch" / "earlier" / "0001") == [(0, "val_loss", 0.5)]


def test_a_resume_keeps_the_losses_up_to_the_checkpoint(pretrained, pipeline, tmp_path):
    """The checkpoint is of step 3, the last event before it of step 2."""
    killed = Loop(pretrained, tmp_path, log_with=Recorder())
    watch = killed.watch(pipeline, config=SMALL)
    killed.run(watch, 3, each=log_losses, epochs=1)
    killed.accelerator.save_state(str(tmp_path / "checkpoint"))
    killed.run(watch, 6, each=log_losses)
    assert [step for step, *_ in rows(tmp_path / "memwatch")] == [1, 3, 5]

    resumed = Loop(pretrained, tmp_path, log_with=Recorder())
    watch = resumed.watch(pipeline, config=SMALL)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert [step for step, *_ in rows(tmp_path / "memwatch")] == [1, 3]
    resumed.step = 3
    resumed.run(watch, 5, each=log_losses)
    assert [step for step, *_ in rows(tmp_path / "memwatch")] == [1, 3, 5]
    assert watch.state_dict()["losses"] == 3


def test_a_checkpoint_of_a_version_without_losses_can_be_gone_on_from(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL)
    watch.begin()
    state = watch.state_dict()
    del state["losses"]
    watch.load_state_dict(state)
    watch.note_losses({"val_loss": 0.5}, 1)
    assert rows(tmp_path / "memwatch") == [(1, "val_loss", 0.5)]


def test_a_disk_that_refuses_losses_costs_nothing_else(pretrained, pipeline, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memwatch.report.losses, "append", refuse)
    loop = Loop(pretrained, tmp_path, log_with=Recorder())
    watch = loop.watch(pipeline, config=SMALL, strict=False)
    with caplog.at_level(logging.WARNING, "memwatch"):
        loop.run(watch, 9, each=log_losses)
    assert loop.step == 9
    events = history(tmp_path)
    assert [row["step"] for row in events] == [0, 2, 4, 6, 8]
    assert events[-1]["errors"] > 0
    assert (tmp_path / "memwatch" / "heatmaps" / "cat" / "step_0000008.jpg").is_file()
    noting = [message for message in caplog.messages if "noting a validation loss failed" in message]
    assert ["writes it with the next one" in message for message in noting] == [True, True]  # said twice, then silent
    monkeypatch.undo()
    loop.run(watch, 11, each=log_losses)
    assert [step for step, *_ in rows(tmp_path / "memwatch")] == [1, 3, 5, 7, 9, 11]


def test_values_that_are_no_mapping_are_the_loops_own_affair(pretrained, pipeline, tmp_path, caplog):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL, strict=False)
    with caplog.at_level(logging.WARNING, "memwatch"):
        loop.accelerator.log(None, step=1)
    assert sum("noting a validation loss failed" in message for message in caplog.messages) == 1
    assert watch.faults.count == 1


def test_the_main_process_alone_keeps_losses(pretrained, pipeline, tmp_path, monkeypatch):
    from accelerate import Accelerator

    watch = Loop(pretrained, tmp_path).watch(pipeline, config=SMALL)
    watch.begin()
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    watch.note_losses({"val_loss": 0.5}, 1)
    assert rows(tmp_path / "memwatch") == []
