"""The rule: a table of numbers -> verdicts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memwatch.judge.verdict import Evidence, ProbeState, Verdict, is_alert, judge

MEMORIZED, SUSPICIOUS, NO_EVIDENCE, INCONCLUSIVE = Verdict
MAX_P, MEMORIZED_P = 0.01, 3e-4

HIT = Evidence(4.0, p=1e-5, z_score=8.0, lasting_p=1e-5, num_controls=20, any_controls=True)
EDGE = replace(HIT, severity=1.5, lasting_p=MEMORIZED_P)  # the limits themselves count
MILD = replace(HIT, severity=1.49)
NEW = replace(HIT, lasting_p=1.01 * MEMORIZED_P)
JUST = replace(NEW, p=1.01 * MEMORIZED_P)
FADING = replace(HIT, p=MAX_P)  # it was so strong before that the mean still is
RARE = replace(HIT, p=MAX_P, lasting_p=MAX_P)
COMMON = replace(HIT, p=0.011)
BLIND = Evidence(2.0)
BLIND_MILD = Evidence(1.99)
FEW = Evidence(4.0, num_controls=9, any_controls=True)
OTHER_KIND = replace(FEW, num_controls=0)
NOTHING = Evidence(p=1.0, z_score=0.0, num_controls=20, any_controls=True)
FIRST = replace(NOTHING, p=None, z_score=None, compared=False)
BROKEN = replace(HIT, z_score=None, finite=False)


def run(*evidences: Evidence) -> tuple[list[ProbeState], list[str]]:
    state, states, reasons = ProbeState(), [], []
    for i, evidence in enumerate(evidences, start=1):
        state, reason = judge(state, evidence, 100 * i, MAX_P, MEMORIZED_P)
        states.append(state)
        reasons.append(reason)
    return states, reasons


@pytest.mark.parametrize(
    ("evidence", "verdict", "reason"),
    [
        (HIT, MEMORIZED, "evidence since step 100"),
        (EDGE, MEMORIZED, "evidence since step 100"),
        (FADING, MEMORIZED, "evidence since step 100"),
        (MILD, SUSPICIOUS, "memorized takes 1.5x, and this is 1.49x"),
        (NEW, SUSPICIOUS, "memorized takes p = 0.0003, by the mean of three events"),
        (JUST, SUSPICIOUS, "memorized takes p = 0.0003, which keeps the run's false-alarm rate"),
        (RARE, SUSPICIOUS, "memorized takes p = 0.0003, which keeps the run's false-alarm rate"),
        (COMMON, NO_EVIDENCE, "the controls show as much"),
        (NOTHING, NO_EVIDENCE, "the controls show as much"),
        (FEW, INCONCLUSIVE, "9 controls of its kind are usable, and a p-value takes 11"),
        (OTHER_KIND, INCONCLUSIVE, "0 controls of its kind are usable, and a p-value takes 11"),
        (BLIND, SUSPICIOUS, "uncalibrated: there are no controls"),  # never memorized
        (BLIND_MILD, NO_EVIDENCE, "without controls a probe is suspicious from 2x on"),
        (FIRST, INCONCLUSIVE, "nothing earlier to compare with"),
        (BROKEN, INCONCLUSIVE, "non-finite values in the model's output"),
    ],
)
def test_the_numbers_of_an_event_decide(evidence, verdict, reason):
    (found,), reasons = run(evidence)
    assert (found.verdict, reasons) == (verdict, [reason])
    (*_, later), reasons = run(HIT, evidence)
    assert later.verdict is verdict  # the event before is in the numbers


def test_what_is_remembered():
    states, _ = run(NOTHING, RARE, NEW, JUST, COMMON, HIT, BROKEN, FEW, FIRST)
    assert [s.scores for s in states[:4]] == [(0,), (8, 0), (8, 8, 0), (8, 8, 8)]
    assert [s.scores for s in states[5:]] == [(8, 8, 8), (), (), ()]
    assert [s.has_begun for s in states] == [False, False, True, False, False, True, False, False, False]
    assert [s.since for s in states] == [None, 200, 200, 200, None, 600, None, None, None]
    assert [s.last_clean for s in states] == [100] * 4 + [500] * 5  # inconclusive is not clean
    assert [s.finite for s in states] == [True] * 6 + [False, True, True]
    assert not run(MILD)[0][0].has_begun


@pytest.mark.parametrize(
    ("before", "after", "alert"),
    [
        (NO_EVIDENCE, SUSPICIOUS, True),
        (SUSPICIOUS, SUSPICIOUS, False),
        (SUSPICIOUS, MEMORIZED, True),
        (MEMORIZED, MEMORIZED, False),
        (MEMORIZED, SUSPICIOUS, False),
        (INCONCLUSIVE, MEMORIZED, True),
        (SUSPICIOUS, NO_EVIDENCE, False),
        (NO_EVIDENCE, INCONCLUSIVE, False),
    ],
)
def test_a_worse_verdict_is_news(before, after, alert):
    assert is_alert(ProbeState(verdict=before), ProbeState(verdict=after)) is alert


def test_output_that_is_no_longer_finite_is_news_once():
    broken = ProbeState(finite=False)
    assert is_alert(ProbeState(verdict=MEMORIZED), broken)
    assert not is_alert(broken, broken)
