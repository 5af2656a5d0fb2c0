"""Timelines: every event is in them, the worst probe is drawn last, and alerts, proofs and the stop have signs."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from support.runs import memorized, write_run

from memwatch.report.history import Run
from memwatch.report.timeline import level_curves, loss_timeline, rows_by_name, severity_timeline

PROOF = {"generations": 4, "copies": 3, "ratios": [0.1] * 3 + [0.9], "is_copy": [True] * 3 + [False], "of_others": {}}


@pytest.fixture
def run(tmp_path):
    events = [
        {"step": 0, "controls": {}},
        {"step": 100, "rows": {"cat": {"verdict": "suspicious", "severity": 1.6, "alert": True}}},
        {"step": 200, "failure": "looking at the model failed"},
        {"step": 300, "rows": {"cat": memorized(2.0, 100, alert=True, copied=PROOF)}, "stop_reason": "enough"},
    ]
    return Run.read(write_run(tmp_path, [{"name": "tree"}, {"name": "cat"}], events))


def drawn(markup) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def by_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [node for node in root.iter() if name in node.attrib.get("class", "").split()]


def test_every_probe_has_a_line_through_all_events_that_were_not_lost(run):
    root = drawn(severity_timeline(run))
    lines = [node for node in by_class(root, "line") if "data-probe" in node.attrib]
    assert [(node.attrib["data-probe"], node.find("title").text) for node in lines] == [("1", "tree"), ("0", "cat")]
    assert [len(node.find("polyline").attrib["points"].split()) for node in lines] == [3, 3]
    assert ["memorized" in node.attrib["class"].split() for node in lines] == [False, True]


def test_signs_say_what_they_mean(run):
    root = drawn(severity_timeline(run))
    said = {kind: [n.find("title").text for n in by_class(root, kind)] for kind in ("suspicion", "alert", "proof")}
    assert said == {
        "suspicion": ["step 100: cat is suspicious"],
        "alert": ["step 300: cat is memorized"],
        "proof": ["step 300: 3 of 4 generations copy cat"],
    }
    texts = [node.text for node in root.iter("text")]
    assert "stop, step 300" in texts
    assert "alert level 1.5x" in texts


def test_the_band_holds_the_events_that_have_controls(run):
    (band,) = by_class(drawn(severity_timeline(run)), "band")
    assert len(band.attrib["points"].split()) == 2 * 2  # steps 100 and 300; the lost event has none


def test_without_controls_there_is_no_band(tmp_path):
    run = Run.read(write_run(tmp_path, [{"name": "cat"}], [{"step": 0, "controls": {}, "calibrated": False}]))
    root = drawn(severity_timeline(run))
    assert by_class(root, "band") == []
    assert "suspicious from 2x, without controls" in [node.text for node in root.iter("text")]


def test_validation_losses_share_the_steps(tmp_path, run):
    assert loss_timeline(run) is None
    rows = [{"step": 50 * i, "key": key, "value": 0.5 - i / 100} for i in range(9) for key in ("val_loss", "eval/loss")]
    (tmp_path / "losses.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    again = Run.read(tmp_path)
    losses, severities = drawn(loss_timeline(again)), drawn(severity_timeline(again))
    assert losses.attrib["data-steps"] == severities.attrib["data-steps"] == "0,400"
    assert [root.attrib["viewBox"] for root in (severities, losses)] == ["0 0 740 240", "0 0 460 240"]  # side by side
    assert [node.find("title").text for node in by_class(losses, "line")] == ["val_loss", "eval/loss"]


def test_one_probe_by_noise_level(run):
    root = drawn(level_curves(run, rows_by_name(run)["cat"]))
    assert [node.find("title").text for node in by_class(root, "line")] == ["t = 141", "t = 501"]
    assert [len(node.find("polyline").attrib["points"].split()) for node in by_class(root, "line")] == [3, 3]


def test_a_probe_that_was_never_compared_has_no_curves(tmp_path):
    run = Run.read(write_run(tmp_path, [{"name": "cat"}], [{"step": 0, "rows": {"cat": {"levels": []}}}]))
    assert level_curves(run, rows_by_name(run)["cat"]) is None
    assert "cat" in severity_timeline(run)  # one event: a dot
