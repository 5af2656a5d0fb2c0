"""Words: the table of an event, and what a run says to people and pipelines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.runs import memorized, write_run

from memwatch.judge.verdict import Verdict
from memwatch.report.about import About
from memwatch.report.history import Event, Row, Run
from memwatch.report.text import advice_of, as_markdown, columns, headline, not_watched, summary

PROOF = {"generations": 4, "copies": 3, "ratios": [0.1, 0.1, 0.2, 0.9], "is_copy": [1, 1, 1, 0], "of_others": {}}
SUSPICIOUS = {"verdict": "suspicious", "severity": 1.4, "p": 0.004, "reason": "evidence at 1 of 2"}
UNKNOWN = {"verdict": "inconclusive", "severity": 1.0, "p": None, "reason": "nothing earlier to compare with"}
REGION = {"box": (0, 0, 64, 64), "area": 0.25}
M, S, N, I = Verdict  # noqa: E741
ROWS = (
    Row("photo-7", "photo-7", verdict=N, severity=1.1, p=0.41, reason="the controls show as much"),
    Row("new", "new", verdict=I, reason="nothing earlier to compare with"),
    Row("banner", "a blue banner (banner)", verdict=M, severity=1.7, reason="since 20", regions=(REGION,)),
    Row("rocket", "rocket", verdict=M, severity=2.3, p=3e-10, reason="since 20", regions=(REGION,), copied=PROOF),
    Row("poster", "猫 (poster)", verdict=S, severity=9.0, p=0.004, reason="1 of 2", is_reference=False),
)
STANDING = "20 controls scored 2.9 at most so far, and memorized is called from a mean of 5.1 on"
EVENT = Event(40, ROWS, {"control/0": 1.0}, STANDING, calibrated=True, seconds=5.25, overhead=0.0213)
ABOUT = About(settings={"max_train_steps": 200})


def test_the_table_of_an_event():
    event = replace(EVENT, stop_reason="step 40: 2 probes memorized", errors=2)
    lines = summary(event, ABOUT).splitlines()
    assert lines == [
        "memwatch, step 40 of 200: 2 memorized, 1 suspicious, 1 no evidence, 1 inconclusive",
        "  probe                   verdict     effect                     region, px    generations     why",
        "  rocket                  memorized   2.3x reduction, p = 3e-10  0,0 to 64,64  3 of 4 copy it  since 20",
        "  a blue banner (banner)  memorized   1.7x reduction             0,0 to 64,64                  since 20",
        "  猫 (poster)             suspicious  9.0x reduction, p = 0.004                                1 of 2",
        "  1 more without evidence: photo-7; 1 more inconclusive (nothing earlier to compare with): new",
        f"  {STANDING}",
        "  5.2 s, 2.1 % of training time, 2 failures of memwatch so far",
        "  STOP: step 40: 2 probes memorized",
    ]
    assert len({columns(line[: line.index("memorized")]) for line in lines[2:4]}) == 1


def test_an_event_that_failed_and_one_where_no_probe_could_be_judged():
    failed = Event(8, seconds=0.25, errors=1, failure="looking at the model failed: OutOfMemoryError('8 GiB')")
    assert summary(failed, ABOUT).splitlines() == [
        "memwatch, step 8 of 200: this event is lost, because looking at the model failed: OutOfMemoryError('8 GiB')",
        "  0.2 s, 1 failure of memwatch so far",
    ]
    first = Event(0, tuple(Row(name, reason="nothing earlier to compare with") for name in "abcd"))
    assert summary(first, About()).splitlines() == [
        "memwatch, step 0: 4 inconclusive",
        "  nothing earlier to compare with",
        "  there are no controls, so alerts are uncalibrated",
        "  0.0 s",
    ]


@pytest.mark.parametrize(
    ("parts", "is_reference", "full", "brief"),
    [
        ({}, True, "3 of 4 generations copy it", "3 of 4 copy it"),
        ({"copies": 1}, True, "1 of 4 generations copies it", "1 of 4 copies it"),
        ({}, False, "3 of 4 generations show it", "3 of 4 show it"),
        ({"of_others": {"b": 1}}, True, "3 of 4 generations copy it; copies of other images: b (1)", "3 of 4 copy it"),
        (
            {"grade": 0.447},
            True,
            "3 of 4 generations copy it, graded 0.45: 0 is chance, 1 is identical",
            "3 of 4 copy it, graded 0.45",
        ),
        ({"ratios": [None]}, True, "4 generations: copies cannot be told", "copies cannot be told"),
    ],
)
def test_a_proof_in_words(parts, is_reference, full, brief):
    row = Row("a", is_reference=is_reference, copied=PROOF | parts)
    assert (row.proof(), row.proof(brief=True), replace(row, copied=None).proof()) == (full, brief, "")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"verdict": S, "severity": 2.66, "p": 0.004}, "2.7x reduction, p = 0.004: because"),
        ({"verdict": N, "severity": 1.04, "p": 1.0}, "no reduction, p = 1: because"),
        ({"verdict": S, "severity": 2.66}, "2.7x reduction: because"),
        ({"verdict": I}, "because"),
    ],
)
def test_what_a_verdict_rests_on_in_words(parts, expected):
    assert Row("a", reason="because", **parts).why == expected


def run_of(folder, *events, names=("cat", "dog"), **about) -> Run:
    return Run.read(write_run(folder, [{"name": name} for name in names], list(events), **about))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([{}], "No evidence in 2 of 2 probes."),
        ([{"rows": {"cat": SUSPICIOUS}}], "1 of 2 probes is suspicious, and none is memorized."),
        ([{"rows": {"cat": UNKNOWN, "dog": UNKNOWN}}], "No verdict yet: every probe is inconclusive."),
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


def test_advice_follows_the_verdict():
    def advice(verdict, **parts):
        return advice_of(Row("p", verdict=Verdict(verdict), **parts))

    assert "Find its duplicates" in advice("memorized", since=2)
    assert "Events before step 2 showed no evidence" in advice("memorized", since=2)
    assert "training images with this caption" in advice("memorized", is_reference=False)
    assert "Watch the next events" in advice("suspicious")
    assert "nothing earlier" in advice("inconclusive", reason="nothing earlier")
    assert "Nothing to do" in advice("no evidence")


def test_what_was_not_watched_is_said(tmp_path):
    lost = {"step": 1, "failure": "out of memory"}
    last = {"step": 2, "rows": {"cat": UNKNOWN}, "controls": {"a": 1.0}}
    said = not_watched(run_of(tmp_path, {"step": 0}, lost, last, training_rows=20_000))
    assert said[:5] == [
        "The training set has 20000 rows; 2 of them are watched.",
        "Only the noise levels t = 141, 501 are measured.",
        "At the last event no judgement was possible for a photo of cat (cat).",
        "1 controls were usable; judging takes 11 of a probe's kind.",
        "Lost events: step 1.",
    ]
    uncalibrated = {"step": 0, "controls": {}, "calibrated": False}
    assert "There are no controls" in " ".join(not_watched(run_of(tmp_path, uncalibrated)))


def test_markdown_is_a_table_that_nothing_breaks(tmp_path):
    told = memorized(2.0, 1, alert=True, copied=PROOF)
    run = run_of(tmp_path, {"step": 1, "rows": {"a|b <i>": told}}, names=("dog", "a|b <i>"))
    lines = as_markdown(run).splitlines()
    assert lines[0] == "# 1 of 2 probes is memorized, since step 1."
    name, effect = "a photo of a\\|b &lt;i> (a\\|b &lt;i>)", "2.0x reduction, p = 1e-09"
    reason = "evidence since step 1"
    assert f"| {name} | memorized | {effect} | 16,8 to 48,40 | 3 of 4 copy it | {reason} |" in lines
    assert f"- step 1: {name} is memorized. {effect}: {reason}." in lines
