"""W&B: what its own process has written offline, read back by its own reader."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.builders import Loop, call_every_change, picture
from support.observations import seen
from support.reports import ABOUT, event_of_a_cat, offline, run_of_a_cat, write
from support.wandb_runs import OfflineRun

from memwatch.judge.findings import Judgement
from memwatch.judge.verdict import ProbeState, Verdict
from memwatch.report.report import Report
from memwatch.report.wandb import COLUMNS, PICTURED, WandbSink, images_of


@pytest.fixture(scope="module")
def wandb_reports() -> list[Report]:
    return run_of_a_cat()


@pytest.fixture(scope="module")
def wandb_run(wandb_reports, tmp_path_factory) -> OfflineRun:
    """Those reports in a run of a script that logs without a step."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, folder)
        write(wandb_reports, lambda run: [run.log({"train_loss": 0.5}) for _ in range(4)], id="run1")
    return OfflineRun.all(folder)[0]


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Writes reports offline, and reads the run back."""
    offline(monkeypatch, tmp_path)

    def of(reports, **options) -> OfflineRun:
        write(reports, **options)
        return OfflineRun.all(tmp_path)[-1]

    return of


def pixels(file):
    return np.asarray(Image.open(file))


def test_a_run_keeps_our_rows_and_the_scripts(pretrained, pipeline, tmp_path, monkeypatch):
    import wandb

    offline(monkeypatch, tmp_path)
    call_every_change(monkeypatch)
    loop = Loop(pretrained, tmp_path, log_with="wandb")
    run = loop.accelerator.get_tracker("wandb", unwrap=True)
    watch = loop.watch(pipeline, stop={"enabled": False})

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
        assert {key: row[key] for key in report.scalars()} == pytest.approx(report.scalars())
        for key, shown in report.images().items():
            assert np.array_equal(pixels(run.media(row, key)), shown)
    steps = [row["_step"] for row in run.rows]
    assert steps == sorted(set(steps))
    assert [cells["probe"] for cells in run.table()] == ["cat", "poster"] * 3
    assert run.config["memwatch"]["about"]["watched"] == {"probe": 2}


def test_every_event_is_a_row_of_its_own_with_memwatchs_step_as_its_axis(wandb_run, wandb_reports):
    assert [row["memwatch/step"] for row in wandb_run.ours] == [0, 2, 4, 6]
    for report, row in zip(wandb_reports, wandb_run.ours, strict=True):
        assert row.get("memwatch/alert") == (report.alert_text(report.findings[0]) if report.alerts else None)
    metrics = wandb_run.of_type("metric")
    assert {"name": "memwatch/step", "options": {"defined": True, "hidden": True}} in metrics
    by_key = {metric.get("name") or metric["glob_name"]: metric.get("step_metric") for metric in metrics}
    assert by_key["memwatch/*"] == "memwatch/step"


def test_a_failed_event_is_a_row_of_its_few_scalars(written, wandb_reports):
    failed = replace(wandb_reports[1], judgement=Judgement(), pictures={}, failure="out of memory")
    run = written([wandb_reports[0], failed])
    row = run.ours[-1]
    assert {key for key in row if not key.startswith("_")} == set(failed.scalars())
    assert (row["memwatch/step"], len(run.table())) == (2, 1)


def test_the_summary_keeps_the_extremes_also_of_a_name_with_a_dot(written, wandb_run, wandb_reports):
    severities, ps = ([getattr(report.findings[0], key) for report in wandb_reports] for key in ("severity", "p"))
    for key, values in {"max_severity": severities, "severity/cat": severities, "min_p": ps, "p/cat": ps}.items():
        expected = {"last": values[-1], "min": min(values), "max": max(values)}
        assert len(set(expected.values())) >= 2
        assert wandb_run.summary[f"memwatch/{key}"] == pytest.approx(expected)
    assert wandb_run.summary["memwatch/step"] == 6
    named = [replace(r.findings[0], observation=seen("a.cat v1.5")) for r in wandb_reports]
    run = written(
        [replace(r, judgement=Judgement((f,)), pictures={}) for r, f in zip(wandb_reports, named, strict=True)]
    )
    assert run.summary["memwatch/severity/a.cat v1.5"]["max"] == pytest.approx(max(severities))


def test_an_event_with_news_sends_one_alert_with_a_level(written, wandb_run, wandb_reports):
    found = [(a["title"], a["level"], a["text"]) for a in wandb_run.of_type("alert")]
    texts = [report.alert_text(report.alerts[0]) for report in wandb_reports[1:3]]
    assert found == [
        ("memwatch, step 2: suspicious: a photo of cat (cat)", "WARN", texts[0]),
        ("memwatch, step 4: memorized: a photo of cat (cat)", "ERROR", texts[1]),
    ]
    (finding,) = wandb_reports[1].alerts
    worst = replace(finding, observation=seen("b"), state=ProbeState(verdict=Verdict.MEMORIZED))
    report = replace(wandb_reports[1], judgement=Judgement((finding, worst)))
    (alert,) = written([report]).of_type("alert")
    assert (alert["title"], alert["level"]) == ("memwatch, step 2: memorized and 1 more: a photo of b (b)", "ERROR")
    assert all(report.alert_text(f) in alert["text"] for f in report.alerts)


def test_the_settings_lie_in_the_runs_config_beside_the_scripts_and_an_overview_is_logged(written, wandb_reports):
    overview = picture(9, 40)
    later = replace(wandb_reports[1], about=replace(ABOUT, training_rows=9), overview=overview)
    run = written([wandb_reports[0], later], config={"learning_rate": 1e-4})
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
    first, second = run.ours
    assert "memwatch/overview.path" not in first
    assert np.array_equal(pixels(run.media(second, "memwatch/overview")), overview)


def run_of_wandb(*, resumed: bool, step: int | None, mode: str = "online"):
    """As much of W&B's run as the sink asks for; it holds events up to step 4. ``rows`` are those that it got."""
    rows, alerts = [], []
    return SimpleNamespace(
        resumed=resumed,
        step=step,
        settings=SimpleNamespace(mode=mode),
        summary={"memwatch/step": 4},
        config={},
        define_metric=lambda name, **options: None,
        log=lambda row, step=None: rows.append((step, row["memwatch/step"])),
        alert=lambda **options: alerts.append(options),
        rows=rows,
        alerts=alerts,
    )


def test_events_that_a_resumed_run_holds_already_are_not_written_again(wandb_reports, caplog):
    run = run_of_wandb(resumed=True, step=90)
    sink = WandbSink(SimpleNamespace(tracker=run))
    with caplog.at_level(logging.INFO, "memwatch"):
        for report in wandb_reports:
            sink.write(report)
    assert (run.rows, run.alerts) == ([(90, 6)], [])
    assert caplog.messages == [
        f"the W&B run holds the event of step {step} already; its row stays as it is" for step in (0, 2, 4)
    ]


def test_a_run_that_several_processes_share_counts_no_steps(wandb_reports):
    """W&B takes no step there, and raises when it is asked for its own."""
    run = run_of_wandb(resumed=False, step=None, mode="shared")  # no number, so that max() would raise
    sink = WandbSink(SimpleNamespace(tracker=run))
    for report in wandb_reports[:2]:
        sink.write(report)
    assert run.rows == [(None, 0), (None, 2)]


# --- what W&B shows of a probe ---------------------------------------------------------------------------------------


def test_regions_are_a_mask_and_boxes_with_scores(wandb_run, wandb_reports):
    for report, row, number in zip(wandb_reports, wandb_run.ours, (None, 1, 2, 2), strict=True):
        (finding,) = report.findings
        key = "memwatch/regions/cat"
        assert np.array_equal(pixels(wandb_run.media(row, key)), finding.observation.image)
        expected, boxes = np.zeros((32, 32), np.uint8), []
        if number is not None:
            (region,) = finding.regions
            wide = region.box[2]
            expected[:, :wide] = number
            factor = math.exp(region.effect)
            scores = {"factor": pytest.approx(factor), "area": region.area}
            box = {"position": {"minX": 0, "minY": 0, "maxX": wide, "maxY": 32}, "domain": "pixel", "class_id": number}
            boxes = [box | {"box_caption": f"{factor:.1f}x", "scores": scores}]
        assert np.array_equal(pixels(wandb_run.media(row, f"{key}.masks.regions")), expected)
        drawn = json.loads(wandb_run.media(row, f"{key}.boxes.regions").read_text(encoding="utf-8"))
        assert drawn["box_data"] == boxes
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
        assert np.array_equal(pixels(row["image"]["file"]), f.observation.image)
        assert np.array_equal(pixels(row["heatmap"]["file"]), report.pictures["cat"])
    assert [len(row["image"]["boxes"]["regions"]) for row in rows] == [0, 1, 1, 1]
    assert [row["memwatch/probes.nrows"] for row in wandb_run.ours] == [1, 2, 3, 4]


def test_a_probe_without_evidence_has_its_pictures_in_the_tables_first_row_alone(written):
    first = event_of_a_cat(2, others=2)
    run = written([first, event_of_a_cat(4, others=2, before=first)])
    have = [(row["step"], row["probe"]) for row in run.table() if row["image"] and row["heatmap"]]
    assert have == [(2, "cat"), (2, "other0"), (2, "other1"), (4, "cat")]
    assert all(f"memwatch/heatmap/other{i}.path" in row for row in run.ours for i in range(2))


def test_of_many_probes_those_with_evidence_are_pictured_first():
    many = event_of_a_cat(2, others=40)
    heatmaps = [key.rpartition("/")[2] for key in images_of(many) if "heatmap" in key]
    assert heatmaps == ["cat", *(f"other{i}" for i in range(PICTURED - 1))]
    everyone = tuple(replace(f, is_alert=True) for f in many.findings)
    assert len(images_of(replace(many, judgement=replace(many.judgement, findings=everyone)))) == 2 * 41
