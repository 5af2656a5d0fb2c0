"""A run's folder read back: while it is written, after a resume, and as an older version left it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.builders import SMALL, Loop

from memwatch.judge.verdict import Verdict
from memwatch.report.about import About
from memwatch.report.history import Event, Row, Run

OLD_ROW = {  # as the first version wrote it
    "name": "banner",
    "prompt": "a photo with a banner",
    "is_reference": True,
    "reason": "2.2x, p = 6.5e-12, since step 100",
    "severity": 2.24,
    "severity_low": 2.1,
    "p": 6.5e-12,
    "z_score": 15.2,
    "baseline_step": 0,
    "since": 100,
    "verdict": "memorized",
    "alert": False,
    "timesteps": [141, 501],
    "regions": [{"box": [0, 0, 64, 28], "area": 0.4, "level": 501, "p": 6.5e-12}],
    "copied": {"generations": 8, "copies": 0, "ratios": [0.9, None], "of_others": {}},
}
OLD = [
    {"step": 0, "findings": [OLD_ROW | {"verdict": "inconclusive", "p": None, "regions": []}], "controls": {}},
    {"step": 100, "findings": [OLD_ROW], "controls": {"control/a": 1.1}, "audit": "0 of 1 controls called"},
]


def write(folder, rows, cut_off=""):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + cut_off
    (folder / "history.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_run_reads_back_as_it_was_reported(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL, max_train_steps=4)
    reports = [watch.begin(), *loop.run(watch, 4)]
    run = Run.read(tmp_path / "memwatch")
    assert run.events == tuple(report.to_event() for report in reports)
    assert [event.step for event in run.events] == [0, 2, 4]
    assert [(row.name, row.is_reference) for row in run.last.rows] == [("cat", True), ("poster", False)]
    assert run.about == About.from_dict(json.loads(json.dumps(watch.about.to_dict())))
    assert run.about.settings["max_train_steps"] == 4
    assert run.losses == ()


def test_a_row_of_an_older_version_keeps_what_it_said():
    row = Row.from_dict(OLD_ROW)
    assert (row.verdict, row.severity, row.p, row.since) == (Verdict.MEMORIZED, 2.24, 6.5e-12, 100)
    assert (row.timesteps, row.regions[0]["box"], row.area) == ((141, 501), [0, 0, 64, 28], 0.4)
    assert (row.levels, row.baseline, row.alert_text) == ((), "", None)  # what it did not say
    assert Row.from_dict({"name": "a"}) == Row("a")


def test_a_run_of_an_older_version_can_be_read(tmp_path):
    run = Run.read(write(tmp_path, OLD))
    assert run.about == About()
    assert [event.calibrated for event in run.events] == [True, True]  # its last event names a control
    assert run.memorized == ["banner"]
    assert run.last.counts() == "1 memorized"
    assert not Run.read(write(tmp_path, [OLD[0]])).events[0].calibrated


def test_a_line_and_settings_of_a_newer_version_are_read_without_what_is_new(tmp_path):
    write(tmp_path, [OLD[1] | {"colour": "red", "findings": [OLD_ROW | {"shape": "round"}]}])
    (tmp_path / "about.json").write_text(json.dumps({"model": "SD", "new": 1, "probes": [{"name": "a"}]}), "utf-8")
    run = Run.read(tmp_path)
    assert (run.about.model, run.about.probes) == ("SD", ({"name": "a"},))
    assert run.events[0].rows == (Row.from_dict(OLD_ROW),)


def test_a_half_written_line_is_not_there_yet(tmp_path):
    half = json.dumps(OLD[1])[:200]
    assert [event.step for event in Run.read(write(tmp_path, OLD[:1], half)).events] == [0]
    with pytest.raises(ValueError, match="holds no event yet"):
        Run.read(write(tmp_path, [], half))


def test_what_is_no_run_is_said_with_what_would_be_one(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"holds no history.jsonl; allowed: the output_dir of a run"):
            Run.read(folder)
    inside = write(tmp_path / "memwatch", OLD)
    with pytest.raises(FileNotFoundError) as caught:
        Run.read(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds no history.jsonl; allowed: {inside}"


def event(step: int, *verdicts: str, alert: bool = False, **parts) -> dict:
    found = [OLD_ROW | {"name": f"p{i}", "verdict": verdict, "alert": alert} for i, verdict in enumerate(verdicts)]
    return {"step": step, "findings": found} | parts


def test_the_last_event_is_the_last_one_with_findings(tmp_path):
    lost = event(30, failure="looking at the model failed")
    run = Run.read(write(tmp_path, [event(10, "suspicious"), event(20, "memorized"), lost]))
    assert (run.events[-1].step, run.events[-1].failure) == (30, "looking at the model failed")
    assert run.last.step == 20
    assert Run.read(write(tmp_path, [lost])).last.step == 30


def test_alerts_and_what_was_ever_memorized(tmp_path):
    rows = [
        event(10, "no evidence", "suspicious"),
        event(20, "suspicious", "memorized", alert=True),
        event(30, "memorized", "no evidence"),
    ]
    run = Run.read(write(tmp_path, rows))
    assert [(step, row.name, row.verdict) for step, row in run.alerts] == [
        (20, "p0", Verdict.SUSPICIOUS),
        (20, "p1", Verdict.MEMORIZED),
    ]
    assert run.memorized == ["p1", "p0"]
    assert run.until(20).memorized == ["p1"]
    assert run.until(10).alerts == ()


def test_a_run_up_to_a_step_has_its_losses_only(tmp_path):
    write(tmp_path, [event(10), event(20)])
    lines = [{"step": step, "key": "val_loss", "value": 1 / step} for step in (10, 20)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "ke'
    (tmp_path / "losses.jsonl").write_text(text, encoding="utf-8")
    run = Run.read(tmp_path)
    assert run.losses == ((10, "val_loss", 0.1), (20, "val_loss", 0.05))
    earlier = run.until(10)
    assert (earlier.losses, [e.step for e in earlier.events]) == (run.losses[:1], [10])


def test_the_worst_come_first_and_counts_name_every_verdict():
    kinds = [("a", "no evidence", 9.0), ("b", "suspicious", 1.2), ("c", "memorized", 1.5), ("d", "memorized", 2.0)]
    rows = tuple(Row(name, verdict=Verdict(verdict), severity=s) for name, verdict, s in kinds)
    found = Event(1, (Row("e"), *rows))
    assert [row.name for row in found.worst_first] == ["d", "c", "b", "a", "e"]
    assert found.counts() == "2 memorized, 1 suspicious, 1 no evidence, 1 inconclusive"
    assert [found.count(verdict) for verdict in Verdict] == [2, 1, 1, 1]
    assert replace(found, rows=()).counts() == "no probe was judged"
