"""Audit: how often the rule has called a control, and what that leaves of the promise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from scipy import stats
from support.observations import seen

from memwatch.config import AlertsConfig
from memwatch.judge.alerts import Evidence, ProbeState, Verdict
from memwatch.judge.audit import Audit, audit_of
from memwatch.judge.findings import Finding, capped


@dataclass(frozen=True)
class Control:
    state: ProbeState
    p: float | None


CALLED, QUIET = ProbeState(called=True), ProbeState()


@pytest.mark.parametrize(
    ("controls", "called", "rarest"),
    [
        ([], 0, 1.0),
        ([(QUIET, 1e-9), (QUIET, 0.5)], 0, 1.0),
        ([(CALLED, 0.02), (QUIET, 1e-9), (CALLED, 0.003)], 2, 0.003),
        ([(CALLED, None), (QUIET, 0.5)], 1, 1.0),  # called earlier, and not comparable now
    ],
)
def test_counts(controls, called, rarest):
    found = audit_of([Control(*c) for c in controls], 8, AlertsConfig(false_alarms_per_run=0.04))
    assert found == Audit(called, len(controls), 0.005, rarest)


@pytest.mark.parametrize(
    ("called", "of", "text"),
    [
        (0, 24, "0 of 24 controls called; at most 12 % at 95 % confidence"),
        (2, 24, "2 of 24 controls called; at most 24 % at 95 % confidence"),
        (3, 3, "3 of 3 controls called; at most 100 % at 95 % confidence"),
        (0, 0, "no controls could be audited"),
    ],
)
def test_text(called, of, text):
    assert str(Audit(called, of)) == text


def test_at_most_is_exact():
    found = Audit(2, 24, 0.01)
    assert stats.binom.cdf(2, 24, found.at_most) == pytest.approx(0.05)
    assert Audit().at_most == 1.0  # of nothing nothing is known


@pytest.mark.parametrize(
    ("called", "of", "promised", "expected"),
    [
        (0, 24, 0.05 / 8, False),
        (1, 24, 0.05 / 8, False),
        (2, 24, 0.05 / 8, True),
        (1, 24, 0.001, True),
        (0, 0, 0, False),
    ],
)
def test_contradicts(called, of, promised, expected):
    assert Audit(called, of, promised).contradicts is expected


# --- the cap ----------------------------------------------------------------------------------------------------------

FINDING = Finding(
    seen(),
    None,
    Evidence(4.0, 3.0, p=1e-6, rank_p=0.04, num_controls=24, any_controls=True),
    ProbeState(events=2, streak=2, since=100, verdict=Verdict.MEMORIZED, called=True),
    "4.0x, p = 1e-06, since step 100",
    (),
    None,
    True,
)
BEFORE = ProbeState(events=1, streak=1, since=100, verdict=Verdict.SUSPICIOUS)


@pytest.mark.parametrize(
    ("audit", "why"),
    [
        (Audit(2, 24, 0.05 / 8, 1e-3), "the same rule would call 2 of 24 controls, more than was promised"),
        (Audit(1, 24, 0.05 / 8, 1e-7), "a control that it would call as well is as rare (p = 1e-07)"),
        (Audit(1, 24, 0.05 / 8, 1e-6), "a control that it would call as well is as rare (p = 1e-06)"),  # so is a tie
    ],
)
def test_memorized_is_capped_at_suspicious(audit, why):
    found = capped(FINDING, audit, BEFORE)
    assert found.reason == f"4.0x, p = 1e-06, since step 100; not called memorized, because {why}"
    assert found.state == replace(FINDING.state, verdict=Verdict.SUSPICIOUS, called=False)  # its streak goes on
    assert not found.is_alert  # it was suspicious before
    assert capped(FINDING, audit, ProbeState()).is_alert
    assert capped(FINDING, audit, replace(BEFORE, called=True)).state.called  # at an earlier event


def test_what_the_audit_leaves_alone():
    assert capped(FINDING, Audit(0, 24, 0.05 / 8), BEFORE) is FINDING
    assert capped(FINDING, Audit(1, 24, 0.05 / 8, 1e-5), BEFORE) is FINDING  # rarer than the control
    suspicious = replace(FINDING, state=BEFORE)
    assert capped(suspicious, Audit(9, 9, 0.01, 1e-9), BEFORE) is suspicious
