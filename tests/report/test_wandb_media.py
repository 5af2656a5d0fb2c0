"""What W&B shows of a probe: its pictures with their layers, and its rows in the table."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.builders import picture
from support.observations import seen
from support.wandb_runs import OfflineRun
from support.wandb_writing import offline, report_of, write

from memwatch.report.wandb_media import COLUMNS, PICTURED, mask_of, pictured

SUSPICIOUS, MEMORIZED = 1, 2


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path)


def test_regions_are_a_mask_and_boxes_with_scores(wandb_run, wandb_reports):
    for report, row, number in zip(
        wandb_reports, wandb_run.ours, (None, SUSPICIOUS, MEMORIZED, MEMORIZED), strict=True
    ):
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
        assert boxes_in(wandb_run, row, key) == boxes
    labels = wandb_run.config["_wandb"]["mask/class_labels"]["memwatch/regions/cat_wandb_delimeter_regions"]["value"]
    assert labels == {"1": "suspicious", "2": "memorized"}


def boxes_in(run: OfflineRun, row: dict, key: str) -> list[dict]:
    return json.loads(run.media(row, f"{key}.boxes.regions").read_text(encoding="utf-8"))["box_data"]


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


def test_a_mask_needs_an_image():
    finding = report_of(2).findings[0]
    with pytest.raises(ValueError, match="got cat, which has no image"):
        mask_of(replace(finding, observation=seen("cat")))
    assert not mask_of(replace(finding, labels=None)).any()


def test_an_overview_is_logged_where_there_is_one(tmp_path, wandb_reports):
    overview = picture(9, 40)
    write([wandb_reports[0], replace(wandb_reports[1], overview=overview)])
    (run,) = OfflineRun.all(tmp_path)
    first, second = run.ours
    assert "memwatch/overview.path" not in first
    assert np.array_equal(Image.open(run.media(second, "memwatch/overview")), overview)
