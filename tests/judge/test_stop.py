"""The stop rule: a table of verdicts -> whether training ends."""

from __future__ import annotations

import math

import pytest
import torch

from memwatch import Probe
from memwatch.config import StopConfig
from memwatch.judge.alerts import Evidence, ProbeState, Verdict
from memwatch.judge.findings import Finding
from memwatch.judge.stop import StopState, decide_stop
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation

MEMORIZED, SUSPICIOUS, NO_EVIDENCE, INCONCLUSIVE = (
    Verdict.MEMORIZED,
    Verdict.SUSPICIOUS,
    Verdict.NO_EVIDENCE,
    Verdict.INCONCLUSIVE,
)


def found(name: str, verdict: Verdict, severity: float, p: float | None) -> Finding:
    nothing = Measurement(CurvatureMap(torch.ones(1, 2, 1, 1)), torch.zeros(1, 2, 1, 1, 1))
    observation = Observation(Probe(name, name=name), (61.0,), nothing)
    evidence = Evidence(severity=severity, severity_low=severity, p=p, smallest_p=0.001)
    return Finding(observation, None, evidence, ProbeState(verdict=verdict), "", (), None, False)


def stops(events, **rule):
    state, reached = StopState(), []
    for i, verdicts in enumerate(events, start=1):
        findings = [found(*values) for values in verdicts]
        state = decide_stop(state, findings, 100 * i, StopConfig(**rule))
        reached.append(state.reason is not None)
    return reached, state


A, B = ("a", MEMORIZED, 5.0, 0.01), ("b", MEMORIZED, 3.0, 0.05)


@pytest.mark.parametrize(
    ("rule", "events", "expected"),
    [
        ({}, [[A]], [True]),
        ({}, [[], [A], []], [False, True, True]),  # never taken back
        ({"enabled": False}, [[A, B]], [False]),
        ({"num_probes": 2}, [[A], [A, B]], [False, True]),
        ({"patience": 2}, [[A], [A]], [False, True]),
        ({"patience": 2}, [[A], [], [A], [A]], [False, False, False, True]),
        ({"patience": 2}, [[A], [B]], [False, True]),  # events in a row with that many, whichever
        ({"min_severity": 4.0}, [[B], [A]], [False, True]),
        ({"min_severity": 5.0}, [[A]], [True]),
        ({"max_p": 0.02}, [[B], [A]], [False, True]),
        (
            {},
            [[("c", SUSPICIOUS, 9.0, 0.001)], [("c", INCONCLUSIVE, 9.0, 0.001)], [("c", NO_EVIDENCE, 9.0, 0.001)]],
            [False] * 3,
        ),
        ({"max_p": 1.0}, [[("c", MEMORIZED, 9.0, None)]], [False]),  # uncalibrated never stops a run
        ({}, [[("c", MEMORIZED, math.nan, 0.01)], [("c", MEMORIZED, 5.0, math.nan)]], [False, False]),
    ],
)
def test_stop(rule, events, expected):
    assert stops(events, **rule)[0] == expected


def test_stop_reason_is_set_once():
    _, state = stops([[A], [A, B], []])
    assert state.reason == "step 100: 1 probe(s) memorized: a"
    assert stops([[A, B]])[1].reason == "step 100: 2 probe(s) memorized: a, b"


def test_deciding_is_pure():
    state, findings = StopState(streak=1), [found(*A)]
    decided = [decide_stop(state, findings, 200, StopConfig(patience=2)) for _ in range(2)]
    assert decided[0] == decided[1] == StopState(2, "step 200: 1 probe(s) memorized: a")
    assert state == StopState(streak=1)
