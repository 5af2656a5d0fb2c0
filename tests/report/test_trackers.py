"""Trackers but W&B: what their libraries have written on this machine, read back."""

from __future__ import annotations

import logging
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from support import read_trackers
from support.builders import CONFIG, Loop, call_every_change
from support.observations import controls, measured, seen
from support.read_trackers import layout_of, pixels, read_tensorboard
from support.reports import report_of
from support.trackers import Recorder

from memwatch.faults import Faults
from memwatch.report.files import FileSink
from memwatch.report.report import Report
from memwatch.report.sinks import ADAPTERS, LAYOUT, TensorBoardSink, TrackerSink, ascii_key, sink_of


def noise(seed: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, width, 3), dtype=np.uint8))


@pytest.fixture
def events(tmp_path) -> list[Report]:
    """Two events: cat and café are suspicious, then memorized; the dog is neither. The files are written."""
    settings = {"output_dir": str(tmp_path / "memwatch")}
    reports: list[Report] = []
    for step, by in ((100, 1.7), (200, 6.0)):
        observations = [seen("cat", by), seen("dog", 1.0), seen("café", by), *controls(20, 1.0, spread=0.1)]
        pictures = {name: noise(step + i, 40) for i, name in enumerate(("cat", "dog", "café"))}
        parts = {"pictures": pictures, "overview": noise(step + 9, 60), "before": reports[-1] if reports else None}
        reports.append(report_of(*observations, step=step, settings=settings, **parts))
        FileSink(tmp_path / "memwatch").write(reports[-1])
    assert [len(report.alerts) for report in reports] == [2, 2]
    return reports


def texts_in(events: list[Report]) -> set[str]:
    return {report.alert_text(finding) for report in events for finding in report.alerts}


@pytest.fixture
def _offline(tmp_path, monkeypatch):
    """Every library writes into ``tmp_path`` and asks no server."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "MLFLOW_TRACKING_URI": str(tmp_path / "mlruns"),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "SWANLAB_MODE": "offline",
        "SWANLAB_LOG_DIR": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    for module in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it reads its folder as it is imported


@pytest.mark.parametrize("name", ["mlflow", "swanlab", "trackio"])
@pytest.mark.usefixtures("_offline")
def test_a_tracker_holds_scalars_pictures_and_alerts(name, events, tmp_path):
    pytest.importorskip(name)
    accelerator = Accelerator(cpu=True, log_with=name, project_dir=tmp_path)
    accelerator.init_trackers("run")
    sink = sink_of(accelerator.trackers[0], Faults(strict=True))
    for report in events:
        sink.write(report)
    accelerator.end_training()
    scalars, images, texts = getattr(read_trackers, f"read_{name}")(tmp_path)
    assert scalars == {(key, r.step): pytest.approx(v) for r in events for key, v in r.scalars().items()}
    shown = {(key, r.step): picture for r in events for key, picture in r.images().items() if "dog" not in key}
    clean = ascii_key if name == "mlflow" else str
    assert images.keys() == {(clean(key), step) for key, step in shown}
    assert all(np.array_equal(images[clean(key), step], shown[key, step]) for key, step in shown)
    assert texts == texts_in(events)


def test_keys_of_different_probes_stay_different():
    assert ascii_key("memwatch/heatmap/a-b_c.1") == "memwatch/heatmap/a-b_c.1"
    assert ascii_key("memwatch/heatmap/café:猫") == "memwatch/heatmap/caf_e9_3a_732b"
    assert ascii_key("犬") != ascii_key("猫")


def test_pictures_that_fail_cost_no_scalars(events, monkeypatch, caplog):
    """An MLflow server may take numbers and have no store for files."""

    def unauthorized(tracker, report):
        tried.append(report.step)
        raise PermissionError("403")

    tried, tracker, faults = [], Recorder(), Faults()
    monkeypatch.setitem(ADAPTERS, "recorder", unauthorized)
    sink = TrackerSink(tracker, faults)
    with caplog.at_level(logging.WARNING, "memwatch"):
        for report in 2 * events:
            sink.write(report)
    assert tried == [100, 200, 100]
    assert [step for step, _ in tracker.rows] == [100, 200, 100, 200]
    assert faults.count == 3
    again, off = caplog.messages
    assert again.startswith("the pictures of the sink 'recorder' failed (PermissionError('403')); memwatch will")
    assert "3 times in a row, so it is tried at every 10th event from now on" in off


# --- TensorBoard ------------------------------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path):
    """Sinks that write into one event file, and the folder of that."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "logs")) as opened:
        sink = lambda: TensorBoardSink(SimpleNamespace(tracker=opened))  # noqa: E731
        yield SimpleNamespace(sink=sink, read=lambda: read_tensorboard(opened.log_dir))


def texts(events):
    tensors = events.Tensors("memwatch/alerts/text_summary")
    return {each.step: each.tensor_proto.string_val[0].decode().splitlines() for each in tensors}


def test_tensorboard_reads_back(pretrained, pipeline, images, tmp_path, monkeypatch):
    call_every_change(monkeypatch)
    loop = Loop(pretrained, tmp_path, log_with="tensorboard")
    watch = loop.watch(pipeline, controls=images, config=CONFIG, stop={"enabled": False})
    reports = loop.run(watch, 4, each=lambda running: running.accelerator.log({"train_loss": 1.0}, step=running.step))
    loop.accelerator.end_training()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out*")}
    events = read_tensorboard(folder)
    for report in reports:
        for key, value in report.scalars().items():
            (found,) = [each.value for each in events.Scalars(key) if each.step == report.step]
            assert found == pytest.approx(value, rel=1e-5)
    assert [each.step for each in events.Scalars("memwatch/max_severity")] == [0, 2, 4]
    assert [each.step for each in events.Scalars("train_loss")] == [1, 2, 3, 4]
    pictures = reports[-1].images()
    assert set(events.Tags()["images"]) == set(pictures)
    assert set(pictures) == {f"memwatch/{tag}" for tag in ("heatmap/cat", "heatmap/poster", "overview")}
    for tag, picture in pictures.items():
        assert [each.step for each in events.Images(tag)] == [0, 2, 4]
        assert np.array_equal(pixels(events.Images(tag)[-1].encoded_image_string), picture)
    assert set(events.Tags()["histograms"]) == {"memwatch/map/cat", "memwatch/map/poster"}
    alerts = [(report.step, finding.observation.probe.title) for report in reports for finding in report.alerts]
    assert sorted(texts(events)) == sorted({step for step, _ in alerts})
    rows = texts(events)[alerts[-1][0]][2:]
    assert [tuple(row.split(" | ")[:2]) for row in rows] == [(f"| {step}", title) for step, title in alerts]


def test_the_histogram_is_of_the_finite_factors_of_the_heatmap(board):
    report = report_of(seen("a", 4.0), seen("b", now=measured(math.nan)), seen("c", baseline=None))
    samples = report.findings[0].signals.heatmap.samples
    factors = np.exp(samples.double().mean(0).numpy())
    samples[:, 0, 0], samples[:, 1, 1] = math.nan, math.inf
    board.sink().write(report)
    events = board.read()
    assert events.Tags()["histograms"] == ["memwatch/map/a"]
    value = events.Histograms("memwatch/map/a")[0].histogram_value
    assert (value.num, value.min, value.max) == (14, pytest.approx(factors.min()), pytest.approx(factors.max()))


def test_after_a_resume_the_table_still_holds_the_earlier_alerts(board, tmp_path):
    """The sink is a new one then; what was before lies in ``output_dir``."""
    for step, name, fallen in ((100, "early", 4.0), (200, "late", 4.0), (300, "late", 1.0)):
        report = report_of(seen(name, fallen), *controls(20, 1.0), step=step, settings={"output_dir": str(tmp_path)})
        FileSink(tmp_path).write(report)
        board.sink().write(report)
    found = texts(board.read())
    assert list(found) == [100, 200]
    titles = [line.split(" | ")[1] for line in found[200][2:]]
    assert titles == ["a photo of early (early)", "a photo of late (late)"]
    assert found[100] == found[200][:3]


def test_the_charts_show_the_logged_keys_and_how_to_see_all_pictures_is_said_once(board, tmp_path, caplog):
    report, sink = report_of(seen("a", 4.0), seen("ab", 2.0), *controls(20, 1.2), overhead=0.02), board.sink()
    with caplog.at_level(logging.INFO, "memwatch"):
        for step in (100, 200):
            sink.write(replace(report, step=step))
    (said,) = caplog.messages
    assert said.endswith(f"tensorboard --samples_per_plugin images=1000 --logdir {tmp_path / 'logs'}")
    charts, scalars = layout_of(board.read()), report.scalars()  # one layout, though there were two events
    assert list(charts) == list(LAYOUT["memwatch"])
    severities, band, overhead = charts.values()
    for chart, keys in ((severities, {"severity/a", "severity/ab"}), (overhead, {"overhead"})):
        shown = {key for key in scalars if any(re.match(tag, key) for tag in chart.multiline.tag)}
        assert shown == {f"memwatch/{key}" for key in keys}
    (series,) = band.margin.series
    assert scalars[series.lower] <= scalars[series.value] <= scalars[series.upper] == max(report.controls.values())
