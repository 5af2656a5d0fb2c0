"""Alerts: from numbers to verdicts, with patience and a budget; a table of evidence -> expected verdicts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memwatch.config import AlertsConfig
from memwatch.judge.statistic import largest_p
from memwatch.judge.verdict import Evidence, ProbeState, Verdict, judge

MEMORIZED, SUSPICIOUS, NO_EVIDENCE, INCONCLUSIVE = (
    Verdict.MEMORIZED,
    Verdict.SUSPICIOUS,
    Verdict.NO_EVIDENCE,
    Verdict.INCONCLUSIVE,
)
PROBES = 8
RULE = {"min_severity": 1.5, "max_p": 0.01, "false_alarms_per_run": 0.05, "patience": 2, "uncalibrated_severity": 2.0}
ALLOWED = largest_p(1, false_alarms_per_run=0.05, num_probes=PROBES)  # at each of the first 16 events: 0.0002

HIT = Evidence(4.0, 3.0, p=1e-5, rank_p=1 / 21, z_score=8.0, num_controls=20, any_controls=True)
EDGE = replace(HIT, severity=1.5, severity_low=1.01, p=ALLOWED, rank_p=0.05)  # the limits themselves count
MILD = replace(HIT, severity=1.49, severity_low=1.4)
NOISY = replace(HIT, severity_low=1.0)
COMMON = replace(HIT, p=0.011)
RARE = replace(HIT, p=0.01)  # as suspicious probes are, but not rare enough for a run
JUST = replace(HIT, p=ALLOWED * 1.01)
TIED = replace(HIT, rank_p=2 / 21)
FEW_ABOVE = replace(HIT, num_controls=10, rank_p=1 / 11)  # the smallest that ten controls can give
FEW_TIED = replace(HIT, num_controls=10, rank_p=2 / 11)
AS_PEERS = replace(HIT, rank_p_peers=2 / 13, num_peers=12, severity_peers=1.2)
ABOVE_PEERS = replace(AS_PEERS, rank_p_peers=1 / 13)
STORED_PEERS = replace(AS_PEERS, severity_peers=1.5)
BLIND = Evidence(4.0, 3.0)
BLIND_MILD = Evidence(1.9, 1.8)
FEW = Evidence(4.0, 3.0, num_controls=9, any_controls=True)
OTHER_KIND = replace(FEW, num_controls=0)
QUIET_FEW = Evidence(1.0, 1.0, num_controls=9, any_controls=True)
NOTHING = Evidence(1.0, 1.0, p=1.0, rank_p=1.0, num_controls=20, any_controls=True)
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
        (3, [HIT, HIT, HIT], [SUSPICIOUS, SUSPICIOUS, MEMORIZED]),
        (2, [HIT, NOTHING, HIT, HIT], [SUSPICIOUS, NO_EVIDENCE, SUSPICIOUS, MEMORIZED]),
        (2, [HIT, HIT, NOTHING], [SUSPICIOUS, MEMORIZED, NO_EVIDENCE]),
        (2, [HIT, COMMON, HIT], [SUSPICIOUS, NO_EVIDENCE, SUSPICIOUS]),
        (2, [EDGE, EDGE], [SUSPICIOUS, MEMORIZED]),
        (2, [MILD, MILD, MILD], [SUSPICIOUS] * 3),  # real perhaps, but less than what ordinary learning does
        (2, [MILD, HIT, MILD, HIT], [SUSPICIOUS, MEMORIZED, SUSPICIOUS, MEMORIZED]),  # but it is evidence
        (3, [RARE, MILD, HIT], [SUSPICIOUS, SUSPICIOUS, MEMORIZED]),
        (1, [NOISY, COMMON], [NO_EVIDENCE] * 2),
        (2, [RARE, RARE, JUST, JUST], [SUSPICIOUS] * 4),
        (2, [TIED, TIED], [SUSPICIOUS] * 2),
        (2, [FEW_ABOVE, FEW_ABOVE], [SUSPICIOUS, MEMORIZED]),
        (2, [FEW_TIED, FEW_TIED], [SUSPICIOUS] * 2),
        (2, [AS_PEERS, AS_PEERS], [SUSPICIOUS] * 2),
        (2, [ABOVE_PEERS, ABOVE_PEERS], [SUSPICIOUS, MEMORIZED]),
        (2, [STORED_PEERS, STORED_PEERS], [SUSPICIOUS, MEMORIZED]),  # the whole set is stored: no excuse
        (1, [FIRST, HIT], [INCONCLUSIVE, MEMORIZED]),
        (1, [FEW, FEW], [INCONCLUSIVE] * 2),
        (1, [OTHER_KIND], [INCONCLUSIVE]),
        (1, [QUIET_FEW], [NO_EVIDENCE]),  # nothing to judge: the controls do not matter
        (1, [BLIND, BLIND, BLIND], [SUSPICIOUS] * 3),  # uncalibrated never becomes memorized
        (1, [BLIND_MILD], [NO_EVIDENCE]),
        (2, [BLIND, HIT], [SUSPICIOUS] * 2),  # one of these two had no p-value
        (2, [HIT, BROKEN, HIT, HIT], [SUSPICIOUS, INCONCLUSIVE, SUSPICIOUS, MEMORIZED]),
        (2, [HIT, FEW, HIT], [SUSPICIOUS, INCONCLUSIVE, SUSPICIOUS]),
        (2, [HIT, FIRST, HIT], [SUSPICIOUS, INCONCLUSIVE, SUSPICIOUS]),
    ],
)
def test_verdicts(patience, evidences, verdicts):
    assert [state.verdict for state in run(evidences, patience=patience)[0]] == verdicts


def test_since_and_last_clean():
    states, _ = run([NOTHING, HIT, HIT, MILD, HIT])
    assert [s.streak for s in states] == [0, 1, 2, 3, 4]
    assert [s.since for s in states] == [None, 200, 200, 200, 200]
    assert [s.is_enough for s in states] == [False, True, True, False, True]
    assert [s.last_clean for s in states] == [100] * 5


def test_inconclusive_is_not_clean():
    states, _ = run([NOTHING, HIT, BROKEN, FEW, FIRST])
    assert [s.last_clean for s in states] == [100] * 5
    assert [s.finite for s in states] == [True, True, False, True, True]
    assert [s.is_enough for s in states] == [False, True, False, False, False]
    assert states[2].since is None


def test_events_are_those_that_were_compared():
    """The budget is spent by them alone: whoever was not looked at has spent nothing."""
    assert [s.events for s in run([FIRST, HIT, BROKEN, FEW, NOTHING, BLIND])[0]] == [0, 1, 1, 2, 3, 4]


def test_a_later_event_allows_less():
    early = [s.verdict for s in run([JUST] * 3, num_probes=1)[0]]
    assert early == [SUSPICIOUS, MEMORIZED, MEMORIZED]
    late = [s.verdict for s in run([NOTHING] * 16 + [EDGE] * 3)[0]][16:]
    assert late == [SUSPICIOUS] * 3
    assert [s.verdict for s in run([NOTHING] * 15 + [EDGE, EDGE])[0]][15:] == [SUSPICIOUS] * 2  # 16 counts, 17 does not


def test_more_probes_leave_less_to_each():
    assert [s.verdict for s in run([EDGE] * 2, num_probes=PROBES)[0]][-1] is MEMORIZED
    assert [s.verdict for s in run([EDGE] * 2, num_probes=PROBES + 1)[0]][-1] is SUSPICIOUS


def test_called_is_never_taken_back():
    states, _ = run([HIT, HIT, NOTHING, BROKEN, HIT])
    assert [s.called for s in states] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (HIT, "4.0x, p = 1e-05, event 1 of 2"),
        (MILD, "1.5x, p = 1e-05, an effect below 1.5x"),
        (NOISY, "variance reduction 4.0x: its error bar reaches 1x"),
        (COMMON, "4.0x, p = 0.011: controls show as much"),
        (RARE, "4.0x, p = 0.01, not rare enough to call in a whole run (p <= 0.0002)"),
        (TIED, "4.0x, p = 1e-05, but as many controls are as high (rank p = 0.10)"),
        (AS_PEERS, "4.0x, p = 1e-05, but no more than ordinary training images show (rank p = 0.15)"),
        (BLIND, "4.0x, uncalibrated (no controls)"),
        (BLIND_MILD, "1.9x, uncalibrated: without controls it takes 2x"),
        (FEW, "4.0x, but there are 9 usable controls of its kind, and it takes 11"),
        (OTHER_KIND, "4.0x, but there are 0 usable controls of its kind, and it takes 11"),
        (FIRST, "nothing earlier to compare with"),
        (BROKEN, "non-finite values in the model's output"),
    ],
)
def test_reasons(evidence, reason):
    assert run([evidence])[1] == [reason]


def test_memorized_says_since_when():
    assert run([HIT, HIT])[1][1] == "4.0x, p = 1e-05, since step 100"


def test_judge_is_pure():
    state = ProbeState(streak=1, since=100, events=1)
    found = [judge(state, HIT, 200, AlertsConfig(), PROBES) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0][0] == ProbeState(
        events=2, streak=2, since=100, is_enough=True, verdict=MEMORIZED, called=True, rarest_p=1e-5
    )
    assert state == ProbeState(streak=1, since=100, events=1)


def test_what_uncalibrated_takes_is_a_setting():
    assert run([BLIND_MILD], uncalibrated_severity=1.9)[0][0].verdict is SUSPICIOUS
    assert run([BLIND], uncalibrated_severity=4.1)[0][0].verdict is NO_EVIDENCE
