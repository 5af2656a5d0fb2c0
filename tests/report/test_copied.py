"""What a proof says: in a sentence, as scalars, and in the history."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support.observations import seen

from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Evidence, ProbeState, Verdict
from memwatch.measure.copies import COPY, Proof
from memwatch.report.copied import copied_row, copied_scalars, copied_text


def found(*ratios: float, name: str = "a", reference: bool = True, others=(), num_others: int = 5) -> Finding:
    """A finding with a proof; without ratios it has none. ``others`` are also copied by the first generation."""
    proof = None
    if ratios:
        copies = [((name,) if ratio < COPY else ()) for ratio in ratios]
        copies[0] += tuple(others)
        proof = Proof(np.zeros((len(ratios), 2, 2, 3), np.uint8), ratios, tuple(copies), num_others)
    state = ProbeState(verdict=Verdict.MEMORIZED)
    return Finding(seen(name, reference=reference), None, Evidence(), state, "", (), None, True, proof)


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (found(), None),
        (found(0.1, 0.2, 0.3, 0.4), "3 of 4 generations copy this region"),
        (found(0.1, 0.9), "1 of 2 generations copies this region"),
        (found(0.9, 0.9, 0.9), "0 of 3 generations copy this region"),
        (
            found(0.9, 0.1, others=["b", "c"]),
            "1 of 2 generations copies this region; copies of other images: b (1), c (1)",
        ),
        (found(0.1, 0.2, 0.9, reference=False), "2 of 3 generations show the same in this region"),
        (found(math.inf, math.inf), "2 generations, but nobody can tell a copy here: the region is flat"),
        (
            found(math.inf, num_others=0),
            "1 generations, but nobody can tell a copy here: there are no other pictures to compare with",
        ),
    ],
)
def test_the_sentence(finding, text):
    assert copied_text(finding) == text


def test_scalars_are_of_what_was_generated():
    findings = [found(0.1, 0.9), found(0.9, 0.9, name="b"), found(name="c")]
    expected = {"memwatch/copied/a": 0.5, "memwatch/copied/b": 0, "memwatch/num_copied": 1}
    assert copied_scalars(findings) == expected
    assert copied_scalars([found()]) == {}


def test_the_row_of_the_history():
    row = copied_row(found(0.1, 0.9, others=["b"]))
    assert row == {"generations": 2, "copies": 1, "ratios": [0.1, 0.9], "is_copy": [True, False], "of_others": {"b": 1}}
    assert json.loads(json.dumps(row)) == row
    assert copied_row(found()) is None
