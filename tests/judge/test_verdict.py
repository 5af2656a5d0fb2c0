"""The rule: a table of numbers -> verdicts, with patience and a budget; and the false-alarm check on the controls."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.observations import seen

from memwatch.config import AlertsConfig
from memwatch.judge.findings import Finding, capped
from memwatch.judge.statistic import largest_p
from memwatch.judge.verdict import Audit, Evidence, ProbeState, Verdict, audit_of, is_alert, judge

MEMORIZED, SUSPICIOUS, NO_EVIDENCE, INCONCLUSIVE = Verdict
PROBES = 8
RULE = {"min_severity": 1.5, "max_p": 0.01, "false_alarms_per_run": 0.05, "patience": 2}
ALLOWED = largest_p(1, false_alarms_per_run=0.05, num_probes=PROBES)  # at each of the first 16 events: 0.0002

HIT = Evidence(4.0, 3.0, p=1e-5, z_score=8.0, num_controls=20, any_controls=True)
EDGE = replace(HIT, severity=1.5, severity_low=1.01, p=ALLOWED)  # the limits themselves count
MILD = replace(HIT, severity=1.49, severity_low=1.4)
NOISY = replace(HIT, severity_low=1.0)
COMMON = replace(HIT, p=0.011)
RARE = replace(HIT, p=0.01)  # as suspicious probes are, but not rare enough for a run
JUST = replace(HIT, p=ALLOWED * 1.01)
AS_PEERS = replace(HIT, rank_p_peers=2 / 13, num_peers=12, severity_peers=1.2)
ABOVE_PEERS = replace(AS_PEERS, rank_p_peers=1 / 13)
STORED_PEERS = replace(AS_PEERS, severity_peers=1.5)
BLIND = Evidence(4.0, 3.0)
BLIND_MILD = Evidence(1.9, 1.8)
FEW = Evidence(4.0, 3.0, num_controls=9, any_controls=True)
OTHER_KIND = replace(FEW, num_controls=0)
QUIET_FEW = Evidence(1.0, 1.0, num_controls=9, any_controls=True)
NOTHING = Evidence(1.0, 1.0, p=1.0, num_controls=20, any_controls=True)
FIRST = replace(NOTHING, compared=False)
BROKEN = replace(HIT, finite=False)


def run(evidences, num_probes=PROBES, **rule):
    state, states, reasons = ProbeState(), [], []
    for i, evidence in enumerate(evidences, start=1):
        state, reason = judge(state, evidence, 100 * i, AlertsConfig(**(RULE | rule)), num_probes)
        states.append(state)
        reasons.append(reason)
    return states, reasons


@pytest.mark.parametrize(
    ("patience", "evidences", "verdicts"),
    [
        (2, [HIT, HIT, HIT], [SUSPICIOUS, MEMORIZED, MEMORIZED]),
        (1, [HIT], [MEMORIZED]),
        (2, [HIT, NOTHING, HIT, HIT], [SUSPICIOUS, NO_EVIDENCE, SUSPICIOUS, MEMORIZED]),
        (2, [HIT, HIT, NOTHING], [SUSPICIOUS, MEMORIZED, NO_EVIDENCE]),
        (2, [EDGE, EDGE], [SUSPICIOUS, MEMORIZED]),
        (2, [MILD, MILD, MILD], [SUSPICIOUS] * 3),  # real perhaps, but less than what ordinary learning does
        (2, [MILD, HIT, MILD, HIT], [SUSPICIOUS, MEMORIZED, SUSPICIOUS, MEMORIZED]),  # but it is evidence
        (1, [NOISY, COMMON], [NO_EVIDENCE] * 2),
        (2, [RARE, RARE, JUST, JUST], [SUSPICIOUS] * 4),
        (2, [AS_PEERS, AS_PEERS], [SUSPICIOUS] * 2),
        (2, [ABOVE_PEERS, ABOVE_PEERS], [SUSPICIOUS, MEMORIZED]),  # the smallest that twelve peers can give
        (2, [STORED_PEERS, STORED_PEERS], [SUSPICIOUS, MEMORIZED]),  # the whole set is stored: no excuse
        (1, [FIRST, HIT], [INCONCLUSIVE, MEMORIZED]),
        (1, [FEW, OTHER_KIND], [INCONCLUSIVE] * 2),
        (1, [QUIET_FEW], [NO_EVIDENCE]),  # nothing to judge: the controls do not matter
        (1, [BLIND, BLIND, BLIND], [SUSPICIOUS] * 3),  # uncalibrated never becomes memorized
        (1, [BLIND_MILD], [NO_EVIDENCE]),
        (2, [BLIND, HIT], [SUSPICIOUS] * 2),  # one of these two had no p-value
        (2, [HIT, BROKEN, HIT, HIT], [SUSPICIOUS, INCONCLUSIVE, SUSPICIOUS, MEMORIZED]),
    ],
)
def test_verdicts(patience, evidences, verdicts):
    assert [state.verdict for state in run(evidences, patience=patience)[0]] == verdicts


def test_what_is_remembered():
    states, _ = run([NOTHING, HIT, HIT, MILD, HIT, BROKEN, FEW, FIRST])
    assert [s.streak for s in states] == [0, 1, 2, 3, 4, 0, 0, 0]
    assert [s.since for s in states] == [None, 200, 200, 200, 200, None, None, None]
    assert [s.is_enough for s in states] == [False, True, True, False, True, False, False, False]
    assert [s.last_clean for s in states] == [100] * 8  # inconclusive is not clean
    assert [s.finite for s in states] == [True] * 5 + [False, True, True]
    assert [s.called for s in states] == [False, False] + [True] * 6  # never taken back
    assert [s.events for s in states] == [1, 2, 3, 4, 5, 5, 6, 6]  # the budget is spent where something is compared


def test_the_budget_is_spent_by_events_and_shared_by_probes():
    def last(*args, **options):
        return run(*args, **options)[0][-1].verdict

    assert [last([JUST] * 2, num_probes=n) for n in (1, PROBES)] == [MEMORIZED, SUSPICIOUS]
    assert [last([EDGE] * 2, num_probes=n) for n in (PROBES, PROBES + 1)] == [MEMORIZED, SUSPICIOUS]
    assert [last([NOTHING] * n + [EDGE] * 2) for n in (14, 15)] == [
        MEMORIZED,
        SUSPICIOUS,
    ]  # event 16 counts, 17 does not


def test_reasons():
    assert run([MILD, RARE, FEW])[1] == [
        "memorized takes 1.5x, and this is 1.49x",
        "p must be at most 0.0002 to keep the run's false-alarm rate",
        "there are 9 usable controls of its kind, and a p-value takes 11",
    ]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (NO_EVIDENCE, SUSPICIOUS, True),
        (NO_EVIDENCE, MEMORIZED, True),
        (SUSPICIOUS, MEMORIZED, True),
        (SUSPICIOUS, SUSPICIOUS, False),
        (MEMORIZED, NO_EVIDENCE, False),
        (SUSPICIOUS, "broken", True),
        ("broken", "broken", False),
        ("broken", SUSPICIOUS, True),
        (MEMORIZED, SUSPICIOUS, False),  # as the audit may have it: no worse than before
    ],
)
def test_an_alert_is_news(before, after, expected):
    broken = ProbeState(finite=False)
    assert is_alert(*(broken if v == "broken" else ProbeState(verdict=v) for v in (before, after))) is expected


def test_called_controls_are_counted():
    called = [ProbeState(called=True, rarest_p=p) for p in (0.02, 0.003)]
    assert audit_of([]) == Audit()
    assert audit_of([*called, ProbeState()]) == Audit(2, 3, 0.003)
    assert stats.binom.cdf(2, 24, Audit(2, 24).at_most) == pytest.approx(0.05)
    assert Audit().at_most == 1.0  # of nothing nothing is known


def test_a_called_control_doubles_the_evidence_that_a_probe_needs():
    """Evidence with an exponential tail, of any rate: a probe exceeds twice the largest of 20 with chance 1 / 231."""
    assert Audit(0, 24).p_needed == 1.0
    assert Audit(1, 24, 1e-3).p_needed == pytest.approx(1e-6)
    p = np.exp(-np.random.default_rng(0).exponential(3.0, (200_000, 21)))  # three times too small
    expected = 2 / (21 * 22)  # the mean square of the smallest of 20 uniform numbers
    assert (p[:, 0] <= p[:, 1:].min(1) ** 2).mean() == pytest.approx(expected, abs=4 * math.sqrt(expected / 200_000))


CALLED = ProbeState(events=2, streak=2, since=100, verdict=MEMORIZED, called=True)
BEFORE = ProbeState(events=1, streak=1, since=100, verdict=SUSPICIOUS)
FINDING = Finding(seen(), None, replace(HIT, p=1e-6), CALLED, "evidence since step 100", (), None, True)


@pytest.mark.parametrize("audit", [Audit(2, 24, 1e-2 * 0.09), Audit(1, 24, 1e-7)])
def test_memorized_is_capped_at_suspicious(audit):
    found = capped(FINDING, audit, BEFORE)
    why = f"the same rule called {audit.called} of 24 controls memorized (p = {audit.rarest_p:.2g})"
    assert found.reason == f"evidence since step 100; not called memorized, because {why}"
    assert found.state == replace(CALLED, verdict=SUSPICIOUS, called=False)  # its streak goes on
    assert not found.is_alert  # it was suspicious before
    assert capped(FINDING, audit, ProbeState()).is_alert
    assert capped(FINDING, audit, replace(BEFORE, called=True)).state.called  # at an earlier event


def test_what_the_check_leaves_alone():
    assert capped(FINDING, Audit(0, 24), BEFORE) is FINDING
    assert capped(FINDING, Audit(1, 24, 1.1e-3), BEFORE) is FINDING  # twice the control's evidence
    suspicious = replace(FINDING, state=BEFORE)
    assert capped(suspicious, Audit(9, 9, 1e-9), BEFORE) is suspicious
