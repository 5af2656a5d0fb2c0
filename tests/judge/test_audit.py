"""Audit: how often the rule has called a control, and what that leaves of the promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy import stats
from support.observations import seen

from memwatch.judge.findings import Finding, capped
from memwatch.judge.verdict import Audit, Evidence, ProbeState, Verdict, audit_of


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
        ([(replace(CALLED, rarest_p=0.02), 0.5), (QUIET, 1e-9), (replace(CALLED, rarest_p=0.003), 0.9)], 2, 0.003),
    ],
)
def test_counts(controls, called, rarest):
    assert audit_of([Control(*c) for c in controls]) == Audit(called, len(controls), rarest)


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
    found = Audit(2, 24)
    assert stats.binom.cdf(2, 24, found.at_most) == pytest.approx(0.05)
    assert Audit().at_most == 1.0  # of nothing nothing is known


def test_a_called_control_doubles_the_evidence_that_it_takes():
    assert Audit(0, 24).largest_p == 1.0
    assert Audit(1, 24, 1e-3).largest_p == pytest.approx(1e-6)


def test_twice_the_largest_of_n_is_rare():
    """Evidence with an exponential tail, of any rate: a probe exceeds twice the largest of 20 with chance 1 / 231."""
    rng = np.random.default_rng(0)
    p = np.exp(-rng.exponential(3.0, (200_000, 21)))  # three times too small
    share = (p[:, 0] <= p[:, 1:].min(1) ** 2).mean()
    expected = 2 / (21 * 22)  # the mean square of the smallest of 20 uniform numbers
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / 200_000))


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


@pytest.mark.parametrize("audit", [Audit(2, 24, 1e-2 * 0.09), Audit(1, 24, 1e-7)])
def test_memorized_is_capped_at_suspicious(audit):
    found = capped(FINDING, audit, BEFORE)
    why = f"the same rule calls {audit.called} of 24 controls, against its promise (p = {audit.rarest_p:.2g})"
    assert found.reason == f"4.0x, p = 1e-06, since step 100; not called memorized, because {why}"
    assert found.state == replace(FINDING.state, verdict=Verdict.SUSPICIOUS, called=False)  # its streak goes on
    assert not found.is_alert  # it was suspicious before
    assert capped(FINDING, audit, ProbeState()).is_alert
    assert capped(FINDING, audit, replace(BEFORE, called=True)).state.called  # at an earlier event


def test_what_the_audit_leaves_alone():
    assert capped(FINDING, Audit(0, 24), BEFORE) is FINDING
    assert capped(FINDING, Audit(1, 24, 1.1e-3), BEFORE) is FINDING  # twice the control's evidence
    suspicious = replace(FINDING, state=BEFORE)
    assert capped(suspicious, Audit(9, 9, 1e-9), BEFORE) is suspicious
