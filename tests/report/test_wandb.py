"""W&B: what its own process has written offline, read back by its own reader."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.builders import EAGER, Loop, call_every_change, picture
from support.observations import seen
from support.wandb_runs import OfflineRun
from support.wandb_writing import ABOUT, Tracker, offline, report_of, write

from memwatch.config_file import load_config
from memwatch.judge.findings import Judgement
from memwatch.judge.verdict import ProbeState, Verdict
from memwatch.report.report import Report
from memwatch.report.wandb import COLUMNS, PICTURED, WandbSink, pictured


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path)


def test_a_run_keeps_our_rows_and_the_scripts(pretrained, pipeline, tmp_path, monkeypatch):
    import wandb

    call_every_change(monkeypatch)
    loop = Loop(pretrained, tmp_path, log_with="wandb")
    run = loop.accelerator.get_tracker("wandb", unwrap=True)
    watch = loop.watch(pipeline, **EAGER | {"stop": {"enabled": False}})

    def log_without_a_step(running):
        for part in range(3):  # moves W&B's own step far ahead of the optimizer's
            run.log({"train_loss": running.step + part / 10})

    reports = loop.run(watch, 4, each=log_without_a_step)
    loop.accelerator.end_training()
    wandb.teardown()
    (run,) = OfflineRun.all(tmp_path)
    losses = [row["train_loss"] for row in run.rows if "train_loss" in row]
    assert losses == [step + part / 10 for step in range(1, 5) for part in range(3)]
    assert [row["memwatch/step"] for row in run.ours] == [0, 2, 4]
    for report, row in zip(reports, run.ours[1:], strict=True):
        assert report.alerts or report.step > 2
        for key, value in report.scalars().items():
            assert row[key] == pytest.approx(value), key
        for name in ("cat", "poster"):
            assert np.array_equal(Image.open(run.media(row, f"memwatch/heatmap/{name}")), report.pictures[name])
    steps = [row["_step"] for row in run.rows]
    assert steps == sorted(set(steps))
    assert [cells["probe"] for cells in run.table()] == ["cat", "poster"] * 3
    assert run.config["memwatch"]["about"] == {
        "model": watch.about.model,
        "machine": watch.about.machine,
        "versions": watch.about.versions,
        "watched": {"probe": 2},
        "training_rows": 8,
    }


def test_every_event_is_a_row_of_its_own(wandb_run, wandb_reports):
    assert [row["memwatch/step"] for row in wandb_run.ours] == [0, 2, 4, 6]
    for report, row in zip(wandb_reports, wandb_run.ours, strict=True):
        assert {key: row[key] for key in report.scalars()} == pytest.approx(report.scalars())
        assert row.get("memwatch/alert") == (report.alert_text(report.findings[0]) if report.alerts else None)
    assert sum("train_loss" in row for row in wandb_run.rows) == 16


def test_a_failed_event_is_a_row_of_its_few_scalars(tmp_path, wandb_reports):
    failed = Report(4, load_config(None), Judgement(), True, 0.5, 1, None, failure="out of memory", about=ABOUT)
    write([wandb_reports[0], failed])
    (run,) = OfflineRun.all(tmp_path)
    row = run.ours[-1]
    assert {key for key in row if not key.startswith("_")} == set(failed.scalars())
    assert (row["memwatch/step"], row["memwatch/errors"], len(run.table())) == (4, 1, 1)


def test_the_summary_keeps_the_extremes_also_of_a_name_with_a_dot(tmp_path, wandb_run, wandb_reports):
    severities, ps = ([getattr(report.findings[0], key) for report in wandb_reports] for key in ("severity", "p"))
    for key, values in {"max_severity": severities, "severity/cat": severities, "min_p": ps, "p/cat": ps}.items():
        expected = {"last": values[-1], "min": min(values), "max": max(values)}
        assert len(set(expected.values())) >= 2
        assert wandb_run.summary[f"memwatch/{key}"] == pytest.approx(expected)
    assert wandb_run.summary["memwatch/step"] == 6
    named = [replace(r.findings[0], observation=seen("a.cat v1.5")) for r in wandb_reports]
    write([replace(r, judgement=Judgement((f,)), pictures={}) for r, f in zip(wandb_reports, named, strict=True)])
    (run,) = OfflineRun.all(tmp_path)
    assert run.summary["memwatch/severity/a.cat v1.5"]["max"] == pytest.approx(max(severities))


def test_every_series_has_memwatchs_step_as_its_axis(wandb_run):
    metrics = wandb_run.of_type("metric")
    assert {"name": "memwatch/step", "options": {"defined": True, "hidden": True}} in metrics
    by_key = {metric.get("name") or metric["glob_name"]: metric.get("step_metric") for metric in metrics}
    assert by_key["memwatch/*"] == "memwatch/step"


def test_an_event_with_news_sends_one_alert_with_a_level(tmp_path, wandb_run, wandb_reports):
    found = [(a["title"], a["level"], a["text"]) for a in wandb_run.of_type("alert")]
    texts = [report.alert_text(report.alerts[0]) for report in wandb_reports[1:3]]
    assert found == [
        ("memwatch, step 2: suspicious: a photo of cat (cat)", "WARN", texts[0]),
        ("memwatch, step 4: memorized: a photo of cat (cat)", "ERROR", texts[1]),
    ]
    (finding,) = report_of(2).alerts
    worst = replace(finding, observation=seen("b"), state=ProbeState(verdict=Verdict.MEMORIZED))
    report = replace(report_of(2), judgement=Judgement((finding, worst)))
    write([report])
    (run,) = OfflineRun.all(tmp_path)
    (alert,) = run.of_type("alert")
    assert (alert["title"], alert["level"]) == ("memwatch, step 2: memorized and 1 more: a photo of b (b)", "ERROR")
    assert all(report.alert_text(f) in alert["text"] for f in report.alerts)


def test_the_settings_lie_in_the_runs_config_beside_the_scripts(tmp_path, wandb_reports):
    later = replace(wandb_reports[1], about=replace(ABOUT, training_rows=9))
    write([wandb_reports[0], later], config={"learning_rate": 1e-4})
    (run,) = OfflineRun.all(tmp_path)
    assert run.config["memwatch"] == {
        "every_steps": 2,
        "levels": {"timesteps": [61, 301]},
        "max_train_steps": None,
        "about": {
            "model": "StableDiffusion, epsilon",
            "machine": "x86_64, 2 CPU cores",
            "versions": {"torch": "2.13.0"},
            "watched": {"probe": 1, "control": 2},
            "training_rows": 9,
        },
    }
    assert run.config["learning_rate"] == 1e-4


class Resumed:
    """A run that W&B has resumed on its server: it holds events up to step 4, and its own step is 90."""

    resumed, id, step = True, "run1", 90

    def __init__(self, mode="online"):
        self.settings = SimpleNamespace(mode=mode)
        self.rows, self.alerts, self.summary, self.config = [], [], {"memwatch/step": 4}, {}

    def define_metric(self, name, **options): ...

    def log(self, row, step=None):
        self.rows.append((step, row["memwatch/step"]))

    def log_artifact(self, artifact, aliases): ...

    def alert(self, title, **options):
        self.alerts.append(title)


def test_events_that_a_resumed_run_holds_already_are_not_written_again(wandb_reports, caplog):
    run = Resumed()
    sink = WandbSink(Tracker(run))
    with caplog.at_level(logging.INFO, "memwatch"):
        for report in wandb_reports:
            sink.write(report)
    assert run.rows == [(90, 6)]
    assert run.alerts == []
    assert caplog.messages == [
        f"the W&B run holds the event of step {step} already; its row stays as it is" for step in (0, 2, 4)
    ]


def test_a_run_that_several_processes_share_counts_no_steps(wandb_reports):
    """W&B takes no step there, and raises when it is asked for its own."""
    run = Resumed("shared")
    run.resumed, run.step = False, None  # no number, so that max() would raise
    sink = WandbSink(Tracker(run))
    sink.write(wandb_reports[0])
    sink.write(wandb_reports[1])
    assert run.rows == [(None, 0), (None, 2)]


# --- what W&B shows of a probe ---------------------------------------------------------------------------------------


def test_regions_are_a_mask_and_boxes_with_scores(wandb_run, wandb_reports):
    for report, row, number in zip(wandb_reports, wandb_run.ours, (None, 1, 2, 2), strict=True):
        (finding,) = report.findings
        key = "memwatch/regions/cat"
        assert np.array_equal(Image.open(wandb_run.media(row, key)), finding.observation.image)
        mask = np.asarray(Image.open(wandb_run.media(row, f"{key}.masks.regions")))
        expected = np.zeros((32, 32), np.uint8)
        boxes = []
        if number is not None:
            expected[:, :16] = number
            scores = {"factor": pytest.approx(finding.severity), "area": 0.5, "p": pytest.approx(finding.p)}
            boxes = [
                {
                    "position": {"minX": 0, "minY": 0, "maxX": 16, "maxY": 32},
                    "domain": "pixel",
                    "class_id": number,
                    "box_caption": f"{finding.severity:.1f}x, p = {finding.p:.2g}",
                    "scores": scores,
                }
            ]
        assert np.array_equal(mask, expected)
        drawn = json.loads(wandb_run.media(row, f"{key}.boxes.regions").read_text(encoding="utf-8"))["box_data"]
        assert drawn == boxes
    labels = wandb_run.config["_wandb"]["mask/class_labels"]["memwatch/regions/cat_wandb_delimeter_regions"]["value"]
    assert labels == {"1": "suspicious", "2": "memorized"}


def test_the_table_has_a_row_per_probe_and_event(wandb_run, wandb_reports):
    rows = wandb_run.table()
    assert [tuple(row) for row in rows] == [COLUMNS] * 4
    for row, report in zip(rows, wandb_reports, strict=True):
        (f,) = report.findings
        assert (row["step"], row["probe"], row["prompt"]) == (report.step, "cat", "a photo of cat")
        assert (row["verdict"], row["reason"], row["copied"]) == (f.verdict, f.reason, None)
        numbers = {"severity": f.severity, "p": f.p, "area": sum(region.area for region in f.regions)}
        assert {key: row[key] for key in numbers} == pytest.approx(numbers)
        assert np.array_equal(Image.open(row["image"]["file"]), f.observation.image)
        assert np.array_equal(Image.open(row["heatmap"]["file"]), report.pictures["cat"])
    assert [len(row["image"]["boxes"]["regions"]) for row in rows] == [0, 1, 1, 1]
    assert [row["memwatch/probes.nrows"] for row in wandb_run.ours] == [1, 2, 3, 4]


def test_a_probe_without_evidence_has_its_pictures_in_the_tables_first_row_alone(tmp_path):
    first = report_of(2, others=2)
    write([first, report_of(4, others=2, states=first.judgement.states)])
    (run,) = OfflineRun.all(tmp_path)
    have = [(row["step"], row["probe"]) for row in run.table() if row["image"] and row["heatmap"]]
    assert have == [(2, "cat"), (2, "other0"), (2, "other1"), (4, "cat")]
    assert all(f"memwatch/heatmap/other{i}.path" in row for row in run.ours for i in range(2))


def test_of_many_probes_those_with_evidence_are_pictured_first():
    many = report_of(2, others=40)
    names = [f.name for f in pictured(many.findings)]
    assert names == ["cat", *(f"other{i}" for i in range(PICTURED - 1))]
    everyone = [replace(f, is_alert=True) for f in many.findings]
    assert pictured(everyone) == everyone


def test_an_overview_is_logged_where_there_is_one(tmp_path, wandb_reports):
    overview = picture(9, 40)
    write([wandb_reports[0], replace(wandb_reports[1], overview=overview)])
    (run,) = OfflineRun.all(tmp_path)
    first, second = run.ours
    assert "memwatch/overview.path" not in first
    assert np.array_equal(Image.open(run.media(second, "memwatch/overview")), overview)
