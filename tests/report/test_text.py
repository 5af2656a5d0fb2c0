"""What a run says to people and pipelines: Markdown, plain values, advice, and what was not watched."""

from __future__ import annotations

import json

import pytest
from support.runs import memorized, write_run

from memwatch.report.advice import advice_of, headline, not_watched
from memwatch.report.copied import proof_words
from memwatch.report.history import Row, Run
from memwatch.report.text import as_json, as_markdown

PROOF = {"generations": 4, "copies": 1, "ratios": [0.1], "is_copy": [True], "of_others": {}}
SUSPICIOUS = {"verdict": "suspicious", "severity": 1.4, "p": 0.004, "reason": "1.4x, p = 0.004"}
UNKNOWN = {"verdict": "inconclusive", "severity": 1.0, "p": None, "reason": "nothing earlier to compare with"}


def run_of(folder, *events, names=("cat", "dog"), **about) -> Run:
    return Run.read(write_run(folder, [{"name": name} for name in names], list(events), **about))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([{}], "No evidence of anything stored on 2 of 2 probes."),
        ([{"rows": {"cat": SUSPICIOUS}}], "1 of 2 probes is suspicious, and none is memorized."),
        ([{"rows": {"cat": UNKNOWN, "dog": UNKNOWN}}], "Nothing can be said yet: every probe is inconclusive."),
        ([{"rows": {"cat": UNKNOWN}}], "No evidence of anything stored on 1 of 2 probes."),
        ([{"rows": {"cat": memorized(since=5)}}, {}], "1 of 2 probes is memorized, since step 5."),
        (
            [{"rows": {"cat": memorized(since=7), "dog": memorized(since=9)}, "stop_reason": "enough"}] * 2,
            "2 of 2 probes are memorized, since step 7; memwatch decided to stop the training at step 0.",
        ),
        ([{"failure": "out of memory"}], "Step 0: no probe has been judged yet."),
    ],
)
def test_the_headline_says_what_happened(events, expected, tmp_path):
    assert headline(run_of(tmp_path, *({"step": i} | event for i, event in enumerate(events)))) == expected


def test_advice_follows_the_verdict(tmp_path):
    run = run_of(tmp_path, {"step": 3, "rows": {"cat": memorized(since=2), "dog": SUSPICIOUS}})
    cat, dog = run.last.worst_first
    assert "Find its duplicates" in advice_of(cat)
    assert "Events before step 2 showed none of it" in advice_of(cat)
    assert "Watch the next events" in advice_of(dog)
    prompt = Row.from_dict(memorized(since=0) | {"name": "p", "is_reference": False})
    assert "training images with this caption" in advice_of(prompt)
    assert "Events before" not in advice_of(prompt)
    assert "nothing earlier to compare with" in advice_of(Row.from_dict(UNKNOWN | {"name": "p"}))
    assert "Nothing to do" in advice_of(Row.from_dict({"name": "p", "verdict": "no evidence"}))


def test_a_proof_in_words():
    row = {"name": "p", "verdict": "no evidence"}
    assert proof_words(Row.from_dict(row)) is None
    assert proof_words(Row.from_dict(row | {"copied": PROOF})) == "1 of 4 generations copies it"
    assert proof_words(Row.from_dict(row | {"copied": PROOF | {"copies": 0}})) == "0 of 4 generations copy it"
    prompt = Row.from_dict(row | {"copied": PROOF | {"copies": 2}, "is_reference": False})
    assert proof_words(prompt, brief=True) == "2 of 4 show it"
    flat = Row.from_dict(row | {"copied": PROOF | {"copies": 0, "ratios": [None]}})
    assert proof_words(flat) == "4 generations, but nobody can tell a copy here"


def test_what_was_not_watched_is_said(tmp_path):
    lost = {"step": 1, "failure": "out of memory"}
    last = {"step": 2, "rows": {"cat": UNKNOWN}, "controls": {"a": 1.0}}
    said = " ".join(not_watched(run_of(tmp_path, {"step": 0}, lost, last, training_rows=20_000)))
    assert "The training set has 20000 rows, and 2 images are watched." in said
    assert "Noise levels other than t = 141, 501" in said
    assert "no judgement was possible of cat." in said
    assert "1 controls were usable, and it takes 11" in said
    assert "Lost events: step 1." in said
    assert "never means that the model has memorized nothing" in said
    uncalibrated = {"step": 0, "controls": {}, "calibrated": False}
    assert "There are no controls" in " ".join(not_watched(run_of(tmp_path, uncalibrated)))


def test_markdown_is_a_table_that_nothing_breaks(tmp_path):
    told = memorized(2.0, 1, alert=True, copied=PROOF)
    run = run_of(tmp_path, {"step": 1, "rows": {"a|b <i>": told}}, names=("dog", "a|b <i>"))
    lines = as_markdown(run).splitlines()
    assert lines[0] == "# 1 of 2 probes is memorized, since step 1."
    table = [line for line in lines if line.startswith("|")]
    assert table[2] == ("| a\\|b &lt;i> | memorized | 2.00x | 1e-09 | 16, 8 to 48, 40 | 25% | 1 of 4 copies it | 1 |")
    assert table[3].startswith("| dog | no evidence | 1.05x | 0.5 | - | 0% | - | - |")
    assert "- step 1: a\\|b &lt;i> is memorized. 2.0x, p = 1e-09, since step 1." in lines
    assert "## What to do" in lines


def test_plain_values_can_be_read_by_a_pipeline(tmp_path):
    run = run_of(tmp_path, {"step": 1, "rows": {"cat": memorized(2.0, 1, alert=True)}}, {"step": 2})
    found = json.loads(json.dumps(as_json(run), allow_nan=False))
    assert (found["step"], found["is_memorized"], found["memorized"]) == (2, True, ["cat"])
    assert [alert["name"] for alert in found["alerts"]] == ["cat"]
    assert [probe["verdict"] for probe in found["probes"]] == ["no evidence", "no evidence"]
    assert found["alerts"][0]["regions"][0]["box"] == [16, 8, 48, 40]
