"""The stop rule: a table of verdicts -> whether training ends."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from support.finding import found

from memwatch.act.stop import StopState, decide_stop
from memwatch.config import StopConfig
from memwatch.judge.copied import Proof

A, B = found("a"), found("b")
QUIET = [found("c", verdict) for verdict in ("suspicious", "no evidence", "inconclusive")]


def proven(finding, *ratios: float):
    return replace(finding, proof=Proof(np.zeros((len(ratios), 2, 2, 3), np.uint8), ratios, ((),) * len(ratios), 5))


@pytest.mark.parametrize(
    ("rule", "events", "expected"),
    [
        ({}, [[A]], [True]),
        ({}, [[], [A], []], [False, True, True]),  # never taken back
        ({}, [QUIET], [False]),
        ({"enabled": False}, [[A, B]], [False]),
        ({"num_probes": 2}, [[A], [A, B]], [False, True]),
        ({"require_copy": True}, [[A]], [False]),  # nobody has generated it
        ({"require_copy": True}, [[proven(A, 0.5, 0.9)]], [False]),  # nothing came out
        ({"require_copy": True}, [[proven(A, 0.5, 0.2)]], [True]),
        ({"require_copy": True}, [[proven(found("a", "suspicious"), 0.2)], [], [A]], [False, False, True]),
        ({"require_copy": True}, [[proven(B, 0.2)], [A]], [True, True]),
        ({"require_copy": True}, [[proven(found("b", "suspicious"), 0.2)], [A]], [False, False]),  # another one's copy
    ],
)
def test_stop(rule, events, expected):
    state, reached = StopState(), []
    for findings in events:
        before = asdict(state)
        decided = decide_stop(state, findings, 1, StopConfig(**rule))
        assert asdict(state) == before  # it is pure
        state = StopState(**json.loads(json.dumps(asdict(decided))))  # as a checkpoint keeps it
        reached.append(state.reason is not None)
    assert reached == expected


def test_the_reason_is_set_once_and_copies_are_remembered():
    state = decide_stop(StopState(), [proven(found("c", "suspicious"), 0.1)], 50, StopConfig())
    assert state == StopState(None, ("c",))
    state = decide_stop(state, [A, B], 100, StopConfig())
    assert state.reason == "step 100: 2 probes memorized: a photo of a (a), a photo of b (b)"
    assert decide_stop(state, [A], 200, StopConfig()) is state
