"""What the quickstart says of its own run. The run itself is longer than a test may be: CI makes it, by ``--smoke``."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import quickstart
from quickstart import BOXES, SIZE, WHOLE, Run, photo_set, problems

from memwatch.judge.verdict import Verdict

STOPPED = "step 200: 5 probes memorized"
MEMORIZED, SUSPICIOUS = Verdict.MEMORIZED, Verdict.SUSPICIOUS
LOWER, LEFT = (0, SIZE // 2, SIZE, SIZE), (0, 0, SIZE // 2, SIZE)


@pytest.fixture(scope="module")
def items():
    return photo_set(0, num_photos=3, num_template_images=2, num_repeats=1)[0]


def report(items, step=200, **changes):
    """Everything is found where it is, but for ``changes``: (verdict, box) by how names start."""
    findings = []
    for row, item in enumerate(items):
        usual = (MEMORIZED if item.planted else Verdict.NO_EVIDENCE, item.box)
        differs = (change for start, change in changes.items() if item.name.startswith(start))
        verdict, box = next(differs, usual)
        labels = np.zeros((16, 16), dtype=np.int32)
        if box is not None:
            left, top, right, bottom = (edge * 16 // SIZE for edge in box)
            labels[top:bottom, left:right] = 1
        observation = SimpleNamespace(probe=SimpleNamespace(row=row))
        findings.append(SimpleNamespace(verdict=verdict, labels=labels, observation=observation))
    return SimpleNamespace(step=step, overhead=0.1, findings=findings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"rocket": (SUSPICIOUS, WHOLE)}, ["rocket: got suspicious, expected memorized"]),
        ({"banner": (SUSPICIOUS, BOXES["banner"])}, ["banner: got suspicious, suspicious, expected memorized"]),
        ({"sticker": (SUSPICIOUS, None)}, ["sticker: got suspicious, suspicious, expected memorized"]),
        ({"sticker-0": (SUSPICIOUS, None)}, []),  # one of what was planted must be called
        # one box in the wrong place fails, whatever the others are
        ({"banner-0": (MEMORIZED, LOWER)}, ["banner-0: found in the wrong place; 0.00 of its regions"]),
        ({"banner-1": (MEMORIZED, None)}, ["banner-1: found in the wrong place; 0.00 of its regions"]),
        ({"sticker-0": (MEMORIZED, LEFT)}, ["sticker-0: found in the wrong place; 0.00 of its regions"]),
        ({"banner-0": (MEMORIZED, WHOLE)}, ["banner-0: found in the wrong place; 0.38 of its regions"]),
        (
            {"photo-01": (MEMORIZED, None)},
            [f"photo-01-chelsea: called memorized at step {n}00" for n in (1, 2)],
        ),
    ],
)
def test_what_is_wrong_is_said_and_nothing_else(items, changes, said):
    found = problems([report(items, step, **changes) for step in (100, 200)], items, STOPPED)
    assert len(found) == len(said)
    assert all(map(str.startswith, found, said)), found


@pytest.mark.parametrize("stop_reason", [STOPPED, None])
def test_each_problem_is_one_line_on_stderr_and_the_exit_code_is_1(items, stop_reason, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--smoke", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(quickstart, "photo_set", lambda *args: (items, []))
    run = Run([report(items)], 60, None, SimpleNamespace(stop_reason=stop_reason))
    monkeypatch.setattr(quickstart, "train", lambda *args: run)
    monkeypatch.setattr(quickstart, "show", lambda *args: None)
    assert quickstart.main() == (0 if stop_reason else 1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("quickstart: ") for line in lines] == ([] if stop_reason else [True])
