"""Any other tracker: what its library has written on this machine, read back."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from support import read_trackers
from support.builders import EAGER, Loop
from support.observations import controls, seen
from support.read_trackers import pixels
from support.trackers import Recorder

from memwatch.config_file import load_config
from memwatch.faults import Faults
from memwatch.judge.findings import judge_event
from memwatch.report.files import FileSink
from memwatch.report.report import Report
from memwatch.report.trackers import ADAPTERS, TrackerSink, ascii_key

SHOWN = ("memwatch/overview", "memwatch/heatmap/cat", "memwatch/heatmap/café")


def noise(seed: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, width, 3), dtype=np.uint8))


@pytest.fixture
def events(tmp_path) -> list[Report]:
    """Two events: cat and café are suspicious, then memorized; the dog is neither. The files are written."""
    config = load_config({"output_dir": str(tmp_path / "memwatch")})
    observations = [seen("cat", 8.0), seen("dog", 1.0), seen("café", 6.0), *controls(20, 1.2, spread=0.2)]
    states, reports = {}, []
    for step in (100, 200):
        judgement = judge_event(observations, states, step, config)
        states = judgement.states
        pictures = {name: noise(step + i, 40) for i, name in enumerate(("cat", "dog", "café"))}
        report = Report(step, config, judgement, True, 1.5, 0, None, pictures, overview=noise(step + 9, 60))
        FileSink(tmp_path / "memwatch").write(report)
        reports.append(report)
    assert [len(report.alerts) for report in reports] == [2, 2]
    return reports


def shown_in(events: list[Report]) -> dict[tuple[str, int], np.ndarray]:
    """The pixels that a dashboard should show, by key and step."""
    names = {key: key.rpartition("/")[2] for key in SHOWN}
    return {
        (key, report.step): pixels(report.pictures.get(name, report.overview))
        for report in events
        for key, name in names.items()
    }


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


def write(events: list[Report], log_with, folder) -> None:
    """What a run writes into its only tracker."""
    accelerator = Accelerator(cpu=True, log_with=log_with, project_dir=folder)
    accelerator.init_trackers("run")
    sink = TrackerSink(accelerator.trackers[0], Faults(strict=True))
    for report in events:
        sink.write(report)
    accelerator.end_training()


@pytest.mark.parametrize("name", ["mlflow", "swanlab", "trackio"])
@pytest.mark.usefixtures("_offline")
def test_a_tracker_holds_scalars_pictures_and_alerts(name, events, tmp_path):
    pytest.importorskip(name)
    write(events, name, tmp_path)
    scalars, images, texts = getattr(read_trackers, f"read_{name}")(tmp_path)
    assert scalars == {(key, r.step): pytest.approx(v) for r in events for key, v in r.scalars().items()}
    clean = ascii_key if name == "mlflow" else str
    wanted = {(clean(key), step): picture for (key, step), picture in shown_in(events).items()}
    assert images.keys() == wanted.keys()
    assert all(np.array_equal(images[key], wanted[key]) for key in wanted)
    assert texts == texts_in(events)


def test_keys_of_different_probes_stay_different():
    assert ascii_key("memwatch/heatmap/a-b_c.1") == "memwatch/heatmap/a-b_c.1"
    assert ascii_key("memwatch/heatmap/café:猫") == "memwatch/heatmap/caf_e9_3a_732b"
    assert ascii_key("犬") != ascii_key("猫")


class Tracker(Recorder):
    """A tracker of a known name; it takes the scalars itself, and ``run`` the rest."""

    def __init__(self, name, run):
        super().__init__()
        self.name, self.run = name, run

    @property
    def tracker(self):
        return self.run


def test_pictures_that_fail_cost_no_scalars(events, monkeypatch, caplog):
    """An MLflow server may take numbers and have no store for files."""

    def unauthorized(tracker, report):
        tried.append(report.step)
        raise PermissionError("403")

    tried = []
    monkeypatch.setitem(ADAPTERS, "mlflow", unauthorized)
    tracker, faults = Tracker("mlflow", None), Faults()
    sink = TrackerSink(tracker, faults)
    with caplog.at_level(logging.WARNING, "memwatch"):
        for report in 2 * events:
            sink.write(report)
    assert tried == [100, 200, 100]
    assert [step for step, _ in tracker.rows] == [100, 200, 100, 200]
    assert faults.count == 3
    again, off = caplog.messages
    assert again.startswith("the pictures of the sink 'mlflow' failed (PermissionError('403')); memwatch will")
    assert "3 times in a row, so it is tried at every 10th event from now on" in off


@pytest.mark.usefixtures("_offline", "eager")
def test_a_training_loop_writes_its_alerts_into_mlflow(pretrained, pipeline, tmp_path):
    pytest.importorskip("mlflow")
    loop = Loop(pretrained, tmp_path, log_with="mlflow")
    reports = loop.run(loop.watch(pipeline, **EAGER | {"stop": {"enabled": False}}), 4)
    loop.accelerator.end_training()
    scalars, images, texts = read_trackers.read_mlflow(tmp_path)
    assert [step for key, step in sorted(scalars) if key == "memwatch/max_severity"] == [0, 2, 4]
    assert texts == texts_in(reports) != set()
    for report in reports:
        assert np.array_equal(images["memwatch/overview", report.step], pixels(report.overview))
        for f in report.findings:
            shown = images.get((f"memwatch/heatmap/{f.name}", report.step))
            assert f.verdict.is_evidence == (shown is not None)
            assert shown is None or np.array_equal(shown, pixels(report.pictures[f.name]))
