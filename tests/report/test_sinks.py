"""What arrives in TensorBoard, W&B, any other tracker and on disk; and what happens when one of them fails."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image
from support.builders import Loop, history, maps

import memwatch.report.files


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")


class Recorder(GeneralTracker):
    """A tracker of another make, that may fail."""

    name = "recorder"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, fails_at: int | None = None):
        super().__init__()
        self.rows, self.fails_at, self.finished = [], fails_at, 0

    @property
    def tracker(self):
        return self

    def start(self): ...

    def store_init_configuration(self, values): ...

    def log(self, values, step=None, **kwargs):
        if self.fails_at is not None and step >= self.fails_at and "memwatch/step" in values:
            raise ConnectionError("the server is gone")
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


def wandb_records(path: Path) -> list:
    """Records of a ``.wandb`` file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, held, at = path.read_bytes(), [], b"", 7
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(held)
            records.append(record)
            held = b""
    return records


def wandb_rows(folder: Path) -> list[dict]:
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    rows = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                inner = row
                for key in outer:
                    inner = inner.setdefault(key, {})
                inner[last] = json.loads(item.value_json)
            rows.append(row)
    return rows


def test_files_hold_everything_and_agree(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path)
    reports = loop.run(loop.watch(pipeline, controls=images), 4)
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4]
    for report, row in zip(reports, rows[1:], strict=True):
        assert row == json.loads(json.dumps(report.to_dict()))
        assert {"memwatch/max_severity", "memwatch/min_p", "memwatch/collapse/cat", "memwatch/seconds"} <= row[
            "scalars"
        ].keys()
        found = maps(tmp_path, report.step)
        for finding in report.findings:
            for key, value in finding.signals.maps().items():
                assert (found[f"{finding.name}/{key}"] == value.mean).all()
                assert (found[f"{finding.name}/{key}.sem"] == value.sem).all()
                assert found[f"{finding.name}/{key}"].shape == (
                    (8, 8) if key == "decisive" else (len(finding.timesteps), 8, 8)
                )
            mean = float(found[f"{finding.name}/collapse"].mean())
            assert row["scalars"][f"memwatch/collapse/{finding.name}"] == pytest.approx(mean, abs=1e-6)
            png = Image.open(tmp_path / "memwatch" / "heatmaps" / finding.name / f"step_{report.step:07d}.png")
            assert np.array_equal(np.asarray(png), np.asarray(report.pictures[finding.name]))
    assert len(found) == 2 * sum(len(finding.signals.maps()) for finding in report.findings)
    assert not list((tmp_path / "memwatch").rglob("*.part*"))


def test_tensorboard_reads_back(pretrained, pipeline, images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop = Loop(pretrained, tmp_path, log_with="tensorboard")
    watch = loop.watch(pipeline, controls=images)
    reports = loop.run(watch, 4, each=lambda running: running.accelerator.log({"train_loss": 1.0}, step=running.step))
    loop.accelerator.end_training()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    for report in reports:
        for key, value in report.scalars().items():
            (found,) = [event.value for event in events.Scalars(key) if event.step == report.step]
            assert found == pytest.approx(value, rel=1e-5)
    assert [event.step for event in events.Scalars("memwatch/max_severity")] == [0, 2, 4]
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4]
    for name in ("cat", "poster"):
        shown = events.Images(f"memwatch/heatmap/{name}")
        assert [event.step for event in shown] == [0, 2, 4]
        assert (shown[-1].width, shown[-1].height) == reports[-1].pictures[name].size
    assert {tag for tag in events.Tags()["images"]} == {"memwatch/heatmap/cat", "memwatch/heatmap/poster"}


def test_wandb_keeps_its_rows_and_the_scripts(pretrained, pipeline, tmp_path):
    import wandb

    loop = Loop(pretrained, tmp_path, log_with="wandb")
    run = loop.accelerator.get_tracker("wandb", unwrap=True)
    eager = {
        "regions": {"min_factor": 1.0001, "min_area": 0.0},
        "stop": {"enabled": False},
        "alerts": {"max_p": 1.0, "min_severity": 1.0001, "uncalibrated_severity": 1.0001},
    }
    watch = loop.watch(pipeline, **eager)

    def log_without_a_step(running):
        for part in range(3):  # moves W&B's own step far ahead of the optimizer's
            run.log({"train_loss": running.step + part / 10})

    reports = loop.run(watch, 4, each=log_without_a_step)
    loop.accelerator.end_training()
    wandb.teardown()  # W&B's own process has written everything
    rows = wandb_rows(tmp_path)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses == [step + part / 10 for step in range(1, 5) for part in range(3)]
    ours = {row["memwatch/step"]: row for row in rows if "memwatch/step" in row}
    assert list(ours) == [0, 2, 4]
    for report in reports:
        for key, value in report.scalars().items():
            assert ours[report.step][key] == pytest.approx(value), key
        for name in ("cat", "poster"):
            shown = ours[report.step][f"memwatch/heatmap/{name}"]
            assert shown["_type"] == "image-file"
            (file,) = (tmp_path / "wandb").glob(f"offline-run-*/files/{shown['path']}")
            assert np.array_equal(np.asarray(Image.open(file)), np.asarray(report.pictures[name]))
    assert any(report.alerts for report in reports)
    assert any("memwatch/alert" in row for row in ours.values())
    steps = [row["_step"] for row in rows]
    assert steps == sorted(steps)


def test_any_other_tracker_gets_the_scalars(pretrained, pipeline, tmp_path):
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    reports = loop.run(loop.watch(pipeline), 4)
    loop.accelerator.end_training()
    assert [step for step, _ in recorder.rows] == [0, 2, 4]
    assert recorder.rows[1:] == [(report.step, report.scalars()) for report in reports]
    assert recorder.finished == 1


def test_a_failing_tracker_is_switched_off_with_one_warning(pretrained, pipeline, tmp_path, caplog):
    recorder = Recorder(fails_at=2)
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    with caplog.at_level(logging.WARNING, "memwatch"):
        loop.run(loop.watch(pipeline), 6)
    assert loop.step == 6
    assert [m for m in caplog.messages if "the server is gone" in m] == [
        "memwatch: sink 'recorder' failed and is switched off, training goes on: ConnectionError('the server is gone')"
    ]
    assert [step for step, _ in recorder.rows] == [0]
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert [row["scalars"]["memwatch/errors"] for row in rows][::3] == [0, 1]
    loop.accelerator.end_training()
    assert recorder.finished == 1


def test_a_failing_tracker_raises_when_strict(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, log_with=Recorder(fails_at=2))
    with pytest.raises(RuntimeError, match=r"sink 'recorder' failed.*the server is gone"):
        loop.run(loop.watch(pipeline, strict=True), 6)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["history", "maps", "pictures"])
def test_a_full_disk_switches_the_files_off_and_trackers_go_on(
    what, pretrained, pipeline, tmp_path, monkeypatch, caplog
):
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
        monkeypatch.setattr(
            Path,
            "open",
            lambda self, *args, **kw: no_space() if self.name == "history.jsonl" else real(self, *args, **kw),
        )
    with caplog.at_level(logging.WARNING, "memwatch"):
        reports = loop.run(watch, 6)
    assert [report.step for report in reports] == [2, 4, 6]
    assert len([m for m in caplog.messages if "sink 'files' failed" in m and "No space" in m]) == 1
    assert [step for step, _ in recorder.rows] == [0, 2, 4, 6]
    assert recorder.rows[-1][1]["memwatch/errors"] == 1


def test_a_full_disk_for_baselines_keeps_them_in_memory(pretrained, pipeline, tmp_path, monkeypatch, caplog):
    import memwatch.measure.snapshots

    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, signals={"baseline": "previous"})
    watch.begin()
    monkeypatch.setattr(memwatch.measure.snapshots, "write_safetensors", no_space)
    with caplog.at_level(logging.WARNING, "memwatch"):
        reports = loop.run(watch, 4)
    assert [{f.name: f.baseline_step for f in report.findings} for report in reports] == [
        {"cat": 0, "poster": 0},
        {"cat": 2, "poster": 2},
    ]
    assert all(f.signals.collapse.samples.any() for f in reports[-1].findings)
    assert any("No space" in message for message in caplog.messages)
    assert reports[-1].errors > 0


def test_a_full_disk_raises_when_strict(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, strict=True)
    monkeypatch.setattr(memwatch.report.files, "write_safetensors", no_space)
    with pytest.raises(RuntimeError, match=r"sink 'files' failed.*No space"):
        loop.run(watch, 2)


def test_a_line_cut_off_by_a_crash_is_forgotten_on_rewinding(tmp_path):
    sink = memwatch.report.files.FileSink(tmp_path)
    sink.rewind(3)  # nothing there yet
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"step": 3}\n{"step": 6}\n{"ste', encoding="utf-8")
    sink.rewind(3)
    assert (tmp_path / "history.jsonl").read_text(encoding="utf-8") == '{"step": 0}\n{"step": 3}\n'
