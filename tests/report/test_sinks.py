"""What happens when a sink fails: its row is lost, it is tried again, and rests after three failures in a row."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import pytest
from PIL import Image
from support.builders import Loop, history
from support.finding import event, found
from support.trackers import Recorder

import memwatch.measure.snapshots
import memwatch.report.files
import memwatch.report.sinks
import memwatch.report.trackers
from memwatch.faults import Faults
from memwatch.report.files import FileSink
from memwatch.report.sinks import Sinks
from memwatch.report.trackers import TrackerSink

FAILED = "the sink 'recorder' failed (ConnectionError('the server is gone')); "
AGAIN = FAILED + "memwatch will try again at the next event. Training goes on."
OFF = FAILED + "that was 3 times in a row, so it is tried at every 10th event from now on. Training goes on."


def test_a_failing_tracker_is_tried_again_and_then_rests(pretrained, pipeline, tmp_path, caplog):
    recorder = Recorder(fails_at=range(2, 99))
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    with caplog.at_level(logging.WARNING, "memwatch"):
        loop.run(loop.watch(pipeline), 8)
    assert loop.step == 8
    assert [m for m in caplog.messages if "the server is gone" in m] == [AGAIN, OFF]
    assert [step for step, _ in recorder.rows] == [0]
    assert recorder.tried == [0, 2, 4, 6]
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    assert [row["scalars"]["memwatch/errors"] for row in rows] == [0, 0, 1, 2, 3]  # the files are written first
    loop.accelerator.end_training()
    assert recorder.finished == 1


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["history", "maps", "pictures"])
def test_a_full_disk_costs_the_files_and_trackers_go_on(what, pretrained, pipeline, tmp_path, monkeypatch, caplog):
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    watch = loop.watch(pipeline)
    watch.begin()
    if what == "maps":
        monkeypatch.setattr(memwatch.report.files, "write_safetensors", no_space)
    elif what == "pictures":
        monkeypatch.setattr(Image.Image, "save", no_space)
    else:
        real = Path.open

        def opened(self, *args, **options):
            return no_space() if self.name == "history.jsonl" else real(self, *args, **options)

        monkeypatch.setattr(Path, "open", opened)
    with caplog.at_level(logging.WARNING, "memwatch"):
        reports = loop.run(watch, 8)
    assert [report.step for report in reports] == [2, 4, 6, 8]
    first, last = [m for m in caplog.messages if "sink 'files' failed" in m and "No space" in m]
    assert "will try again at the next event" in first
    assert "3 times in a row, so it is tried at every 10th event from now on" in last
    assert [step for step, _ in recorder.rows] == [0, 2, 4, 6, 8]
    assert [row["memwatch/errors"] for _, row in recorder.rows] == [0, 1, 2, 3, 3]


def test_a_full_disk_for_baselines_keeps_them_in_memory(pretrained, pipeline, tmp_path, monkeypatch, caplog):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, signals={"baseline": "previous"})
    watch.begin()
    monkeypatch.setattr(memwatch.measure.snapshots, "write_safetensors", no_space)
    with caplog.at_level(logging.WARNING, "memwatch"):
        reports = loop.run(watch, 4)
    steps = [{f.name: f.observation.baseline_step for f in report.findings} for report in reports]
    assert steps == [{"cat": 0, "poster": 0}, {"cat": 2, "poster": 2}]
    assert all(f.signals.snapshot.collapse.samples.any() for f in reports[-1].findings)
    assert any("No space" in message for message in caplog.messages)
    assert reports[-1].errors > 0


def test_a_tracker_whose_sink_cannot_be_made_costs_its_rows_alone(pretrained, pipeline, tmp_path, monkeypatch, caplog):
    """W&B's adapter asks the server when it is made. The old sinks were made outside of every try: training ended."""
    made = []

    class Gone(TrackerSink):
        def __init__(self, tracker, faults):
            made.append(tracker)
            if len(made) == 1:
                raise ConnectionError("the server is gone")
            super().__init__(tracker, faults)

    monkeypatch.setattr(memwatch.report.trackers, "TrackerSink", Gone)
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    with caplog.at_level(logging.WARNING, "memwatch"):
        loop.run(loop.watch(pipeline), 4)
    assert [m for m in caplog.messages if "the server is gone" in m] == [AGAIN]
    assert [step for step, _ in recorder.rows] == [2, 4]
    assert len(made) == 2
    assert [row["step"] for row in history(tmp_path)] == [0, 2, 4]


class FullDisk:
    """Refuses to write lines of history as long as ``is_full``; ``tried`` counts."""

    def __init__(self, monkeypatch):
        self.is_full, self.tried, self._real = True, 0, memwatch.report.files.append
        monkeypatch.setattr(memwatch.report.files, "append", self.append)

    def append(self, *args):
        self.tried += 1
        if self.is_full:
            no_space()
        self._real(*args)


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_sink_that_rests_is_tried_again_and_what_has_waited_is_written(tmp_path, monkeypatch, caplog):
    """Once it was off for good after three failures, though the disk had room again."""
    disk, faults = FullDisk(monkeypatch), Faults()
    sinks = Sinks(FileSink(tmp_path), faults)
    with caplog.at_level(logging.WARNING, "memwatch"):
        for step in range(22):
            sinks.write(event(step, found("cat")), [])
        assert disk.tried == faults.count == 4  # steps 0, 1, 2 and 12
        disk.is_full = False
        for step in range(22, 25):
            sinks.write(event(step, found("cat")), [])
    assert steps_in(tmp_path) == list(range(25))
    assert len({line for line in (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()}) == 25
    assert sorted(file.name for file in (tmp_path / "heatmaps" / "cat").iterdir()) == [
        f"step_{step:07d}.jpg" for step in (22, 23, 24)
    ]
    again, rests, works = caplog.messages
    assert again.endswith("memwatch will try again at the next event. Training goes on.")
    assert rests.endswith(
        "that was 3 times in a row, so it is tried at every 10th event from now on. Training goes on."
    )
    assert works == (
        "the sink 'files' works again, after 4 failures in a row; "
        "pictures and maps of the events in between are missing."
    )


def test_pictures_that_cannot_be_drawn_cost_no_numbers(pretrained, pipeline, tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise OSError("no such font")

    monkeypatch.setattr(memwatch.report.sinks, "pictures_of", broken)
    loop = Loop(pretrained, tmp_path)
    with caplog.at_level(logging.WARNING, "memwatch"):
        reports = loop.run(loop.watch(pipeline), 4)
    assert [len(report.findings) for report in reports] == [2, 2]
    assert [report.pictures for report in reports] == [{}, {}]
    rows = history(tmp_path)
    assert [(row["step"], row["errors"], row["failure"]) for row in rows] == [(0, 1, None), (2, 2, None), (4, 3, None)]
    assert [m for m in caplog.messages if "drawing the pictures failed (OSError('no such font'))" in m]


def test_a_sink_that_fails_on_closing_is_survived(tmp_path, monkeypatch, caplog):
    faults = Faults()
    monkeypatch.setattr(FileSink, "close", no_space)
    with caplog.at_level(logging.WARNING, "memwatch"):
        Sinks(FileSink(tmp_path), faults).close()
    assert faults.count == 1
    (message,) = caplog.messages
    assert message.startswith("closing the sink 'files' failed")
    assert message.endswith("; what it wrote before stays. Training goes on.")
