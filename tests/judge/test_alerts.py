"""Alerts: from numbers to verdicts, with patience; a table of evidence -> expected verdicts."""

from __future__ import annotations

import pytest

from memwatch.config import AlertsConfig
from memwatch.judge.alerts import Evidence, ProbeState, Verdict, judge

MEMORIZED, SUSPICIOUS, NO_EVIDENCE, INCONCLUSIVE = (
    Verdict.MEMORIZED,
    Verdict.SUSPICIOUS,
    Verdict.NO_EVIDENCE,
    Verdict.INCONCLUSIVE,
)

HIT = Evidence(severity=4.0, severity_low=3.0, p=0.02, smallest_p=0.02)
MILD = Evidence(severity=1.5, severity_low=1.4, p=0.02, smallest_p=0.02)
EDGE = Evidence(severity=2.0, severity_low=1.01, p=0.05, smallest_p=0.02)
NOISY = Evidence(severity=4.0, severity_low=1.0, p=0.02, smallest_p=0.02)
COMMON = Evidence(severity=4.0, severity_low=3.0, p=0.06, smallest_p=0.02)
BLIND = Evidence(severity=4.0, severity_low=3.0, p=None, smallest_p=1.0)
FEW = Evidence(severity=4.0, severity_low=3.0, p=0.1, smallest_p=0.1)
FIRST = Evidence(severity=1.0, severity_low=1.0, p=None, smallest_p=0.02, compared=False)
BROKEN = Evidence(severity=4.0, severity_low=3.0, p=0.02, smallest_p=0.02, finite=False)
QUIET_FEW = Evidence(severity=1.0, severity_low=1.0, p=1.0, smallest_p=0.1)


def run(evidences, **rule):
    state, states, reasons = ProbeState(), [], []
    for i, evidence in enumerate(evidences, start=1):
        state, reason = judge(state, evidence, 100 * i, AlertsConfig(min_severity=2.0, **rule))
        states.append(state)
        reasons.append(reason)
    return states, reasons


@pytest.mark.parametrize(
    ("patience", "evidences", "verdicts"),
    [
        (2, [HIT, HIT, HIT], [SUSPICIOUS, MEMORIZED, MEMORIZED]),
        (1, [HIT], [MEMORIZED]),
        (3, [HIT, HIT, HIT], [SUSPICIOUS, SUSPICIOUS, MEMORIZED]),
        (2, [HIT, MILD, HIT, HIT], [SUSPICIOUS, NO_EVIDENCE, SUSPICIOUS, MEMORIZED]),
        (2, [HIT, HIT, MILD], [SUSPICIOUS, MEMORIZED, NO_EVIDENCE]),
        (2, [HIT, COMMON, HIT], [SUSPICIOUS, NO_EVIDENCE, SUSPICIOUS]),
        (2, [EDGE, EDGE], [SUSPICIOUS, MEMORIZED]),  # the limits themselves count
        (1, [MILD, NOISY, COMMON], [NO_EVIDENCE] * 3),
        (1, [FIRST, HIT], [INCONCLUSIVE, MEMORIZED]),
        (1, [FEW, FEW], [INCONCLUSIVE] * 2),  # so few controls that no p-value could be small enough
        (1, [QUIET_FEW], [NO_EVIDENCE]),  # nothing to judge: the controls do not matter
        (1, [BLIND, BLIND, BLIND], [SUSPICIOUS] * 3),  # uncalibrated never becomes memorized
        (2, [HIT, BROKEN, HIT, HIT], [SUSPICIOUS, INCONCLUSIVE, SUSPICIOUS, MEMORIZED]),
        (2, [HIT, FEW, HIT], [SUSPICIOUS, INCONCLUSIVE, SUSPICIOUS]),
        (2, [HIT, FIRST, HIT], [SUSPICIOUS, INCONCLUSIVE, SUSPICIOUS]),
    ],
)
def test_verdicts(patience, evidences, verdicts):
    assert [state.verdict for state in run(evidences, patience=patience)[0]] == verdicts


def test_since_and_last_clean():
    states, _ = run([MILD, HIT, HIT, MILD, HIT])
    assert [s.streak for s in states] == [0, 1, 2, 0, 1]
    assert [s.since for s in states] == [None, 200, 200, None, 500]
    assert [s.last_clean for s in states] == [100, 100, 100, 400, 400]


def test_inconclusive_is_not_clean():
    states, _ = run([MILD, HIT, BROKEN, FEW, FIRST])
    assert [s.last_clean for s in states] == [100] * 5
    assert [s.finite for s in states] == [True, True, False, True, True]
    assert states[2].since is None


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (HIT, "4.0x, p = 0.020, event 1 of 2"),
        (MILD, "variance reduction 1.5x (an alert needs 2x)"),
        (COMMON, "4.0x, but p = 0.060: controls show as much"),
        (BLIND, "4.0x, uncalibrated (no controls)"),
        (FEW, "4.0x, but these controls cannot give p below 0.100 (max_p 0.05)"),
        (FIRST, "nothing earlier to compare with"),
        (BROKEN, "non-finite values in the model's output"),
    ],
)
def test_reasons(evidence, reason):
    assert run([evidence])[1] == [reason]


def test_memorized_says_since_when():
    assert run([HIT, HIT])[1][1] == "4.0x, p = 0.020, since step 100"


def test_judge_is_pure():
    state = ProbeState(streak=1, since=100)
    assert judge(state, HIT, 200, AlertsConfig()) == judge(state, HIT, 200, AlertsConfig())
    assert state == ProbeState(streak=1, since=100)


def test_uncalibrated_events_do_not_count_towards_memorized():
    """memorized needs severity *and* p-value in ``patience`` events in a row; one of these two had no p-value."""
    assert [state.verdict for state in run([BLIND, HIT], patience=2)[0]] == [SUSPICIOUS, SUSPICIOUS]


def test_without_controls_it_takes_more():
    blind = Evidence(severity=1.5, severity_low=1.4, p=None, smallest_p=1.0)
    state, reason = judge(ProbeState(), blind, 1, AlertsConfig())
    assert (state.verdict, reason) == (NO_EVIDENCE, "variance reduction 1.5x (an alert needs 2x)")
    assert judge(ProbeState(), blind, 1, AlertsConfig(uncalibrated_severity=1.2))[0].verdict is SUSPICIOUS
    both = AlertsConfig(min_severity=1.6, uncalibrated_severity=1.2)
    assert judge(ProbeState(), blind, 1, both)[0].verdict is NO_EVIDENCE
