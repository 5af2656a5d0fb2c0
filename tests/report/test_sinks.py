"""What happens when a sink fails: its row is lost, it is tried again, and rests after three failures in a row."""

from __future__ import annotations

import errno
import logging

import pytest
from PIL import Image
from support.builders import Loop, history
from support.finding import event, found
from support.trackers import Recorder

import memwatch.report.files
import memwatch.report.sinks
from memwatch.faults import Faults
from memwatch.report.files import FileSink
from memwatch.report.history import read_lines
from memwatch.report.sinks import Sinks, sink_of

FAILED = "the sink 'recorder' failed (ConnectionError('the server is gone')); "
AGAIN = "memwatch will try again at the next event. Training goes on."
OFF = "that was 3 times in a row, so it is tried at every 10th event from now on. Training goes on."


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING, "memwatch")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failing_tracker_is_tried_again_and_then_rests(pretrained, pipeline, tmp_path, caplog):
    recorder = Recorder(fails_at=range(2, 99))
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    loop.run(loop.watch(pipeline), 8)
    assert loop.step == 8
    assert [m for m in caplog.messages if "the server is gone" in m] == [FAILED + AGAIN, FAILED + OFF]
    assert [step for step, _ in recorder.rows] == [0]
    assert recorder.tried == [0, 2, 4, 6]
    rows = [(row["step"], row["scalars"]["memwatch/errors"]) for row in history(tmp_path)]
    assert rows == [(0, 0), (2, 0), (4, 1), (6, 2), (8, 3)]  # the files are written first
    loop.accelerator.end_training()
    assert recorder.finished == 1


@pytest.mark.parametrize("what", ["history", "maps", "pictures"])
def test_a_full_disk_costs_the_files_and_trackers_go_on(what, pretrained, pipeline, tmp_path, monkeypatch, caplog):
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    watch = loop.watch(pipeline)
    watch.begin()
    where, name = {
        "history": (memwatch.report.files, "append"),
        "maps": (memwatch.report.files, "write_safetensors"),
        "pictures": (Image.Image, "save"),
    }[what]
    monkeypatch.setattr(where, name, no_space)
    reports = loop.run(watch, 8)
    assert [report.step for report in reports] == [2, 4, 6, 8]
    first, last = [m for m in caplog.messages if "sink 'files' failed" in m and "No space" in m]
    assert (first.endswith(AGAIN), last.endswith(OFF)) == (True, True)
    assert [(step, row["memwatch/errors"]) for step, row in recorder.rows] == [(0, 0), (2, 1), (4, 2), (6, 3), (8, 3)]


def test_a_tracker_whose_sink_cannot_be_made_costs_its_rows_alone(pretrained, pipeline, tmp_path, monkeypatch, caplog):
    """W&B's sink asks the server when it is made."""
    made = []

    def gone(tracker, faults):
        made.append(tracker)
        if len(made) == 1:
            raise ConnectionError("the server is gone")
        return sink_of(tracker, faults)

    monkeypatch.setattr(memwatch.report.sinks, "sink_of", gone)
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    loop.run(loop.watch(pipeline), 4)
    assert [m for m in caplog.messages if "the server is gone" in m] == [FAILED + AGAIN]
    assert ([step for step, _ in recorder.rows], len(made)) == ([2, 4], 2)
    assert [row["step"] for row in history(tmp_path)] == [0, 2, 4]


def test_a_sink_that_rests_is_tried_again_and_what_has_waited_is_written(tmp_path, monkeypatch, caplog):
    faults, tried = Faults(), []
    sinks = Sinks(FileSink(tmp_path), faults)

    def full(*args):
        tried.append(args)
        no_space()

    with monkeypatch.context() as patch:
        patch.setattr(memwatch.report.files, "append", full)
        for step in range(22):
            sinks.write(event(step, found("cat")), [])
    assert len(tried) == faults.count == 4  # steps 0, 1, 2 and 12
    for step in range(22, 25):
        sinks.write(event(step, found("cat")), [])
    assert [row["step"] for row in read_lines(tmp_path / "history.jsonl")] == list(range(25))
    pictures = sorted(file.name for file in (tmp_path / "heatmaps" / "cat").iterdir())
    assert pictures == [f"step_{step:07d}.jpg" for step in (22, 23, 24)]
    again, rests, works = caplog.messages
    assert (again.endswith(AGAIN), rests.endswith(OFF)) == (True, True)
    lost = "pictures and maps of the events in between are missing."
    assert works == f"the sink 'files' works again, after 4 failures in a row; {lost}"


def test_pictures_that_cannot_be_drawn_cost_no_numbers(pretrained, pipeline, tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise OSError("no such font")

    monkeypatch.setattr(memwatch.report.sinks, "picture_of", broken)
    loop = Loop(pretrained, tmp_path)
    reports = loop.run(loop.watch(pipeline), 4)
    assert [(len(report.findings), report.pictures) for report in reports] == [(2, {})] * 2
    rows = [(row["step"], row["errors"], row["failure"]) for row in history(tmp_path)]
    assert rows == [(0, 1, None), (2, 2, None), (4, 3, None)]
    assert [m for m in caplog.messages if "drawing the pictures failed (OSError('no such font'))" in m]


def test_a_sink_that_fails_on_closing_is_survived(tmp_path, monkeypatch, caplog):
    faults = Faults()
    monkeypatch.setattr(FileSink, "close", no_space)
    Sinks(FileSink(tmp_path), faults).close()
    assert faults.count == 1
    (message,) = caplog.messages
    assert message.startswith("closing the sink 'files' failed")
    assert message.endswith("; what it wrote before stays. Training goes on.")
