"""Any other tracker: what its library has written on this machine, read back; Comet and ClearML by their signatures."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from support import read_trackers
from support.builders import EAGER, Loop
from support.observations import controls, seen
from support.published import ClearML, Comet
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
        "GIT_CEILING_DIRECTORIES": str(tmp_path.parent),
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


@pytest.mark.parametrize("name", ["aim", "dvclive", "mlflow", "swanlab", "trackio"])
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
    assert texts == (set() if name == "dvclive" else texts_in(events))


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


@pytest.mark.parametrize(("name", "kind"), [("comet_ml", Comet), ("clearml", ClearML)])
def test_comet_and_clearml_are_called_as_they_publish(name, kind, events, tmp_path):
    tracker = Tracker(name, kind())
    write(events, tracker, tmp_path)
    assert tracker.rows == [(report.step, report.scalars()) for report in events]
    wanted = shown_in(events)
    assert [(key, step) for key, step, *_ in tracker.run.images] == list(wanted)
    assert all(np.array_equal(picture, wanted[key, step]) for key, step, picture, _ in tracker.run.images)
    assert [text for text, *_ in tracker.run.texts] == [r.alert_text(f) for r in events for f in r.alerts]
    if name == "comet_ml":
        assert tracker.run.images[0][3] == "step 100: 2 suspicious, 1 no evidence"
        assert [rest for _, *rest in tracker.run.texts[:2]] == [
            [100, "memwatch/alert/cat"],
            [100, "memwatch/alert/café"],
        ]


@pytest.mark.parametrize(
    ("library", "method", "kind"),
    [
        ("comet_ml", "CometExperiment.log_image", Comet),
        ("comet_ml", "CometExperiment.log_text", Comet),
        ("clearml", "Logger.report_image", ClearML),
        ("clearml", "Logger.report_text", ClearML),
    ],
)
def test_the_published_signatures_are_those(library, method, kind):
    """Asked in a process of its own, because both libraries change others as they are imported."""
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    code = f"import inspect, {library}; print(*inspect.signature({library}.{method}).parameters, sep=',')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    ours = inspect.signature(getattr(kind, method.partition(".")[2])).parameters
    assert run.stdout.strip().split(",") == list(ours)


def test_a_tracker_without_an_adapter_gets_paths_and_alerts_as_text(events, tmp_path):
    tracker = Recorder()
    write(events, tracker, tmp_path)
    assert tracker.rows == [(report.step, report.scalars()) for report in events]
    assert [step for step, _ in tracker.texts] == [100, 200]
    for (_, texts), report in zip(tracker.texts, events, strict=True):
        folder = tmp_path / "memwatch"
        alerts = {f"memwatch/alert/{f.name}": report.alert_text(f) for f in report.alerts}
        files = [f"overview/step_{report.step:07d}.jpg"]
        files += [f"heatmaps/{name}/step_{report.step:07d}.jpg" for name in ("cat", "café")]
        assert texts == dict(zip(SHOWN, (str(folder / file) for file in files), strict=True)) | alerts
        assert pixels(texts["memwatch/heatmap/cat"]).shape == pixels(report.pictures["cat"]).shape


def test_a_path_is_named_only_where_there_is_a_file(events, tmp_path):
    (tmp_path / "memwatch" / "overview" / "step_0000100.jpg").unlink()
    tracker = Recorder()
    write(events, tracker, tmp_path)
    assert ["memwatch/overview" in texts for _, texts in tracker.texts] == [False, True]


class Numbers(Recorder):
    """A tracker that raises at the first value that is no number, as Aim does; ``asked`` is every value."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def log(self, values, step=None, **kwargs):
        for value in values.values():
            self.asked.append(value)
            if not isinstance(value, float):
                raise ValueError(f"{type(value)} is no number")
        super().log(values, step)


def test_a_tracker_of_numbers_alone_gets_them_and_is_offered_text_once(events, tmp_path, caplog):
    tracker = Numbers()
    with caplog.at_level(logging.WARNING, "memwatch"):
        write(events, tracker, tmp_path)
    assert tracker.rows == [(report.step, report.scalars()) for report in events]
    assert sum(isinstance(value, str) for value in tracker.asked) == 1
    (message,) = caplog.messages
    assert message.startswith("memwatch: the tracker 'recorder' takes no text (ValueError(")
    assert message.endswith(f"so it gets numbers alone; pictures and alerts: {tmp_path / 'memwatch'}")


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
    assert again.startswith(
        "the pictures of the sink 'mlflow' failed (PermissionError('403')); memwatch will"
    )
    assert "3 times in a row, so it is tried at every 10th event from now on" in off


def test_a_training_loop_writes_into_any_tracker(pretrained, pipeline, tmp_path):
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    reports = loop.run(loop.watch(pipeline), 4)
    loop.accelerator.end_training()
    assert [step for step, _ in recorder.rows] == [0, 2, 4]
    assert recorder.rows[1:] == [(report.step, report.scalars()) for report in reports]
    assert recorder.finished == 1


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
