"""The stop rule: a table of verdicts -> whether training ends."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from memwatch import Probe
from memwatch.config import StopConfig
from memwatch.judge.findings import Finding
from memwatch.judge.stop import StopState, decide_stop
from memwatch.judge.verdict import Evidence, ProbeState, Verdict
from memwatch.measure.copies import Proof
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
    evidence = Evidence(severity=severity, severity_low=severity, p=p)
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


def proven(finding: Finding, *ratios: float) -> Finding:
    return replace(finding, proof=Proof(np.zeros((len(ratios), 2, 2, 3), np.uint8), ratios, ((),) * len(ratios), 5))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([[found(*A)]], [False]),  # nobody has generated it
        ([[proven(found(*A), 0.5, 0.9)]], [False]),  # nothing came out
        ([[proven(found(*A), 0.5, 0.2)]], [True]),
        ([[proven(found("a", SUSPICIOUS, 5.0, 0.01), 0.2)], [], [found(*A)]], [False, False, True]),  # remembered
        ([[proven(found("b", SUSPICIOUS, 5.0, 0.01), 0.2)], [found(*A)]], [False, False]),  # another one's copy
    ],
)
def test_a_stop_may_wait_for_a_copy(events, expected):
    state, reached = StopState(), []
    for findings in events:
        state = decide_stop(state, findings, 1, StopConfig(require_copy=True))
        state = StopState(**json.loads(json.dumps(asdict(state))))  # as a checkpoint keeps it
        reached.append(state.reason is not None)
    assert reached == expected


def test_without_that_key_a_copy_changes_nothing():
    for finding in (proven(found(*A), 0.9), found(*A), proven(found(*A), 0.1)):
        assert decide_stop(StopState(), [finding], 1, StopConfig()).reason is not None
    quiet = decide_stop(StopState(), [proven(found("a", SUSPICIOUS, 5.0, 0.01), 0.1)], 1, StopConfig())
    assert (quiet.reason, quiet.copied) == (None, ("a",))


def test_deciding_is_pure():
    state, findings = StopState(streak=1), [found(*A)]
    decided = [decide_stop(state, findings, 200, StopConfig(patience=2)) for _ in range(2)]
    assert decided[0] == decided[1] == StopState(2, "step 200: 1 probe(s) memorized: a")
    assert state == StopState(streak=1)
