"""TensorBoard: what its own reader finds in the event files."""

from __future__ import annotations

import io
import logging
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.builders import CONFIG, EAGER, Loop, call_every_change
from support.observations import controls, measured, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.report.files import FileSink
from memwatch.report.report import Report
from memwatch.report.tensorboard import LAYOUT, TensorBoardSink

EVERYTHING = {"images": 0, "histograms": 0, "tensors": 0, "scalars": 0}


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance=EVERYTHING).Reload()


@pytest.fixture
def writer(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "logs")) as opened:
        yield opened


def sink(writer):
    return TensorBoardSink(SimpleNamespace(tracker=writer))


def event(folder, step, *observations):
    config = replace(load_config(None), output_dir=str(folder))
    return Report(step, config, judge_event(observations, {}, step, config), True, 1.0, 0, None)


def texts(events):
    tensors = events.Tensors("memwatch/alerts/text_summary")
    return {each.step: each.tensor_proto.string_val[0].decode() for each in tensors}


def layout_of(events):
    from tensorboard.plugins.custom_scalar import layout_pb2

    (found,) = events.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(found.tensor_proto.string_val[0]).category
    return {chart.title: chart for chart in category.chart}


def test_tensorboard_reads_back(pretrained, pipeline, images, tmp_path, monkeypatch):
    call_every_change(monkeypatch)
    loop = Loop(pretrained, tmp_path, log_with="tensorboard")
    watch = loop.watch(pipeline, controls=images, config=CONFIG | EAGER, stop={"enabled": False})
    reports = loop.run(watch, 4, each=lambda running: running.accelerator.log({"train_loss": 1.0}, step=running.step))
    loop.accelerator.end_training()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out*")}
    events = read(folder)
    for report in reports:
        for key, value in report.scalars().items():
            (found,) = [each.value for each in events.Scalars(key) if each.step == report.step]
            assert found == pytest.approx(value, rel=1e-5)
    assert [each.step for each in events.Scalars("memwatch/max_severity")] == [0, 2, 4]
    assert [each.step for each in events.Scalars("train_loss")] == [1, 2, 3, 4]
    tags, last = events.Tags(), reports[-1]
    pictures = {f"memwatch/heatmap/{name}": picture for name, picture in last.pictures.items()}
    pictures["memwatch/overview"] = last.overview
    assert (
        set(tags["images"]) == set(pictures) == {f"memwatch/{t}" for t in ("heatmap/cat", "heatmap/poster", "overview")}
    )
    for tag, picture in pictures.items():
        shown = events.Images(tag)
        assert [each.step for each in shown] == [0, 2, 4]
        decoded = Image.open(io.BytesIO(shown[-1].encoded_image_string))
        assert np.array_equal(np.asarray(decoded.convert("RGB")), np.asarray(picture))
    assert set(tags["histograms"]) == {"memwatch/map/cat", "memwatch/map/poster"}
    alerts = [(report.step, finding.observation.probe.title) for report in reports for finding in report.alerts]
    assert alerts
    assert sorted(texts(events)) == sorted({step for step, _ in alerts})
    rows = texts(events)[alerts[-1][0]].splitlines()[2:]
    assert [tuple(row.split(" | ")[:2]) for row in rows] == [(f"| {step}", title) for step, title in alerts]


def test_the_histogram_is_of_the_finite_factors_of_the_map_that_decides(writer, tmp_path):
    report = event(tmp_path, 100, seen("a", 4.0), seen("b", now=measured(math.nan)), seen("c", baseline=None))
    decisive = report.findings[0].signals.decisive
    samples = decisive.samples.clone()
    samples[:, 0, 0], samples[:, 1, 1] = math.nan, math.inf
    signals = replace(report.findings[0].signals, decisive=replace(decisive, samples=samples))
    findings = (replace(report.findings[0], signals=signals), *report.findings[1:])
    sink(writer).write(replace(report, judgement=replace(report.judgement, findings=findings)))
    events = read(writer.log_dir)
    assert events.Tags()["histograms"] == ["memwatch/map/a"]
    (found,) = events.Histograms("memwatch/map/a")
    factors = np.exp(decisive.mean.double().numpy().ravel())
    value = found.histogram_value
    assert (found.step, value.num) == (100, 14)
    assert (value.min, value.max) == (pytest.approx(factors.min()), pytest.approx(factors.max()))
    assert factors.max() > 2


def test_after_a_resume_the_table_still_holds_the_earlier_alerts(writer, tmp_path):
    """The sink is a new one then; what was before lies in ``output_dir``."""
    first = event(tmp_path, 100, seen("early", 4.0), *controls(20, 1.0))
    second = event(tmp_path, 200, seen("late", 4.0), *controls(20, 1.0))
    quiet = event(tmp_path, 300, seen("late", 1.0), *controls(20, 1.0))
    assert [len(report.alerts) for report in (first, second, quiet)] == [1, 1, 0]
    files = FileSink(tmp_path)
    for report in (first, second, quiet):
        files.write(report)
        sink(writer).write(report)
    found = texts(read(writer.log_dir))
    assert list(found) == [100, 200]
    assert [line.split(" | ")[1] for line in found[200].splitlines()[2:]] == [
        "a photo of early (early)",
        "a photo of late (late)",
    ]
    assert found[100].splitlines() == found[200].splitlines()[:3]


def test_the_charts_show_the_logged_keys(writer, tmp_path):
    report = replace(event(tmp_path, 100, seen("a", 4.0), seen("ab", 2.0), *controls(20, 1.2)), overhead=0.02)
    one = sink(writer)
    one.write(report)
    one.write(replace(report, step=200))
    charts = layout_of(read(writer.log_dir))  # one layout, though there were two events
    assert list(charts) == list(LAYOUT["memwatch"])
    severities, band, overhead = charts.values()
    keys = set(report.scalars())

    def shown(chart):
        return {key for key in keys if any(re.match(tag, key) for tag in chart.multiline.tag)}

    assert shown(severities) == {"memwatch/severity/a", "memwatch/severity/ab", "memwatch/alert_level"}
    assert shown(overhead) == {"memwatch/overhead"}
    (series,) = band.margin.series
    level = {name: report.scalars()[getattr(series, name)] for name in ("lower", "value", "upper")}
    assert level["lower"] <= level["value"] <= level["upper"]
    assert level["upper"] == max(report.controls.values())


def test_how_to_see_all_pictures_is_said_once(writer, tmp_path, caplog):
    one = sink(writer)
    with caplog.at_level(logging.INFO, "memwatch"):
        for step in (100, 200):
            one.write(event(tmp_path, step, seen("a", 1.0), *controls(20, 1.0)))
    (said,) = caplog.messages
    assert said.endswith(f"tensorboard --samples_per_plugin images=1000 --logdir {tmp_path / 'logs'}")
