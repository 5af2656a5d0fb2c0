"""A run's folder read back: while it is written, after a resume, and what another version left."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from support.builders import SMALL, Loop
from support.runs import memorized, write_run

from memwatch.judge.verdict import Verdict
from memwatch.report.about import About
from memwatch.report.history import Event, Row, Run, append, read_lines, rewrite


def test_a_run_reads_back_as_it_was_reported(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL, max_train_steps=4)
    reports = [watch.begin(), *loop.run(watch, 4)]
    run = Run.read(tmp_path / "memwatch")
    assert run.events == tuple(report.event for report in reports)
    assert [event.step for event in run.events] == [0, 2, 4]
    assert run.about == About.read(tmp_path / "memwatch" / "about.json")
    assert run.losses == ()


def test_what_cannot_be_read_is_said_with_what_could_be(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"holds no history.jsonl; allowed: the output_dir of a run"):
            Run.read(folder)
    inside = write_run(tmp_path / "memwatch", [{"name": "a"}], [{"step": 0}])
    with pytest.raises(FileNotFoundError) as caught:
        Run.read(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds no history.jsonl; allowed: {inside}"
    file = inside / "history.jsonl"
    line = json.loads(file.read_text(encoding="utf-8"))
    del line["findings"][0]["timesteps"]
    file.write_text(json.dumps(line), encoding="utf-8")
    with pytest.raises(ValueError, match=r"was written by another version of memwatch.*'timesteps'"):
        Run.read(inside)
    file.write_text('{"step": 0, "find', encoding="utf-8")
    with pytest.raises(ValueError, match="holds no event yet"):
        Run.read(inside)


def test_the_last_event_the_alerts_and_what_was_ever_memorized(tmp_path):
    suspicious = {"verdict": "suspicious", "alert": True}
    events = [
        {"step": 10, "rows": {"p1": suspicious}},
        {"step": 20, "rows": {"p0": suspicious, "p1": memorized(since=10, alert=True)}},
        {"step": 30, "rows": {"p0": memorized(since=20)}},
        {"step": 40, "failure": "looking at the model failed"},
    ]
    run = Run.read(write_run(tmp_path, [{"name": "p0"}, {"name": "p1"}], events))
    assert (run.events[-1].failure, run.last.step) == ("looking at the model failed", 30)
    assert [(step, row.name, str(row.verdict)) for step, row in run.rows if row.alert] == [
        (10, "p1", "suspicious"),
        (20, "p0", "suspicious"),
        (20, "p1", "memorized"),
    ]
    assert run.memorized == {"p1": 10, "p0": 20}


def test_the_worst_come_first_and_what_is_left_out_is_named():
    kinds = [("a", "no evidence", 9.0), ("b", "suspicious", 1.2), ("c", "memorized", 1.5), ("d", "memorized", 2.0)]
    rows = tuple(Row(name, name, verdict=Verdict(verdict), severity=s) for name, verdict, s in kinds)
    found = Event(1, (Row("e", "e", reason="non-finite values in the model's output"), *rows))
    assert [row.name for row in found.worst_first] == ["d", "c", "b", "a", "e"]
    assert found.counts() == "2 memorized, 1 suspicious, 1 no evidence, 1 inconclusive"
    why = "(non-finite values in the model's output)"
    quiet = f"1 more without evidence: a; 1 more inconclusive {why}: e"
    assert found.left_out(1) == f"1 more memorized: c; 1 more suspicious: b; {quiet}"
    assert found.left_out(3, named=0) == f"1 more without evidence; 1 more inconclusive {why}"
    assert found.left_out(5) == ""
    assert replace(found, rows=()).counts() == "no probe was judged"


# --- the files of lines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (b"", []),
        (b'{"step": 0}\n{"step": 3, "find', [0]),
        (b'{"step": 0}\n{"st\n{"step": 6}\n', [0, 6]),
        (b'[1]\n7\n{"no": 1}\n\n{"step": 6}\n{"step": 7, "name": "\xff', [6]),
    ],
)
def test_a_line_that_is_not_whole_is_passed_over(text, steps, tmp_path):
    assert read_lines(tmp_path / "lines.jsonl") == []
    (tmp_path / "lines.jsonl").write_bytes(text)
    assert [row["step"] for row in read_lines(tmp_path / "lines.jsonl")] == steps


def test_what_follows_a_line_that_was_cut_off_is_not_lost(tmp_path):
    file = tmp_path / "lines.jsonl"
    append(file, [{"step": 0}, {"step": 1}])
    file.write_bytes(file.read_bytes()[:-5])  # the disk was full
    append(file, [{"step": 2}])
    append(file, [])
    append(file, [{"step": 3}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(file, [{"step": 4}, {"step": 5, "value": float("nan")}])
    assert file.read_text(encoding="utf-8") == '{"step": 0}\n{"step"\n{"step": 2}\n{"step": 3}\n'


def test_rewriting_is_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "lines.jsonl"
    append(file, [{"step": 0}, {"step": 1}])
    rewrite(file, [{"step": 0}])
    monkeypatch.delattr(os, "replace")
    with pytest.raises(AttributeError):
        rewrite(file, [])
    assert read_lines(file) == [{"step": 0}]
