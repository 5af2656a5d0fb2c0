"""What the quickstart says of its own run. The run itself is longer than a test may be: CI makes it, by ``--smoke``."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import quickstart
from quickstart import BOXES, PLANTED, SIZE, WHOLE, Run, photo_set, problems

from memwatch.judge.verdict import Verdict

STOPPED = "step 200: 5 probe(s) memorized"
LOWER, LEFT = (0, SIZE // 2, SIZE, SIZE), (0, 0, SIZE // 2, SIZE)


@pytest.fixture(scope="module")
def items():
    return photo_set(0, num_photos=3, num_template_images=2, num_repeats=1)[0]


def labels(box):
    """A 16x16 map with one region, or with none."""
    found = np.zeros((16, 16), dtype=np.int32)
    if box is not None:
        left, top, right, bottom = (edge * 16 // SIZE for edge in box)
        found[top:bottom, left:right] = 1
    return found


def report(items, step=200, **changes):
    """A report in which everything is found where it is, but for ``changes``: by name, (verdict, box)."""
    findings = []
    for row, item in enumerate(items):
        usual = Verdict.MEMORIZED if item.planted else Verdict.NO_EVIDENCE
        verdict, box = changes.get(item.name.replace("-", "_"), (usual, item.box))
        observation = SimpleNamespace(probe=SimpleNamespace(row=row))
        findings.append(SimpleNamespace(verdict=verdict, labels=labels(box), observation=observation))
    return SimpleNamespace(step=step, overhead=0.1, findings=findings)


def test_a_good_run_has_no_problem(items):
    assert problems([report(items, 100), report(items)], items, STOPPED) == []


@pytest.mark.parametrize("planted", PLANTED)
def test_of_what_was_planted_one_must_be_called(items, planted):
    names = [item.name.replace("-", "_") for item in items if item.planted == planted]
    missed = dict.fromkeys(names, (Verdict.SUSPICIOUS, BOXES["banner"]))
    got = ", ".join([Verdict.SUSPICIOUS] * len(names))
    assert problems([report(items, **missed)], items, STOPPED) == [f"{planted}: got {got}, expected memorized"]
    if len(names) > 1:
        assert problems([report(items, **{names[0]: (Verdict.SUSPICIOUS, None)})], items, STOPPED) == []


@pytest.mark.parametrize(("name", "box"), [("banner-0", LOWER), ("banner-1", None), ("sticker-0", LEFT)])
def test_one_box_in_the_wrong_place_fails_whatever_the_others_are(items, name, box):
    changes = {name.replace("-", "_"): (Verdict.MEMORIZED, box)}
    problem, *_ = problems([report(items, **changes)], items, STOPPED)
    assert problem.startswith(f"{name}: found in the wrong place; got IoU 0.0")


def test_regions_that_fill_the_picture_fail(items):
    changes = {f"banner_{i}": (Verdict.MEMORIZED, WHOLE) for i in range(2)}
    (problem,) = problems([report(items, **changes)], items, STOPPED)
    assert problem.startswith("banner: found too coarsely; got a mean IoU of 0.38")


def test_a_rare_photo_must_never_be_called(items):
    called = report(items, 100, photo_01_chelsea=(Verdict.MEMORIZED, None))
    expected = ["photo-01-chelsea: called memorized at step 100, though it is seen rarely"]
    assert problems([called, report(items)], items, STOPPED) == expected


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
