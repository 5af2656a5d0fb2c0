"""The quickstart's own verdict. The run itself takes longer than a test may: CI makes it, ``quickstart.py --smoke``."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import quickstart
from PIL import Image
from quickstart import BOXES, WHOLE, Item, problems

from memwatch.judge.alerts import Verdict

PICTURE = Image.new("RGB", (quickstart.SIZE, quickstart.SIZE))
ITEMS = [
    Item("banner-0", "", PICTURE, box=BOXES["banner"]),
    Item("sticker-0", "", PICTURE, box=BOXES["sticker"]),
    Item("repeated-rocket", "", PICTURE, box=WHOLE),
    Item("photo-00-cat", "", PICTURE),
]


def labels(box):
    """A 16x16 map with one region."""
    left, top, right, bottom = (edge // 4 for edge in box)
    found = np.zeros((16, 16), dtype=np.int32)
    found[top:bottom, left:right] = 1
    return found


def report(step=200, **changes):
    """Everything found where it is, but for ``changes``: by name, (verdict, box)."""
    found = {item.name: (Verdict.MEMORIZED, item.box) for item in ITEMS if item.box}
    found |= {"photo-00-cat": (Verdict.NO_EVIDENCE, None)}
    found |= {name.replace("_", "-"): change for name, change in changes.items()}
    findings = [
        SimpleNamespace(name=name, verdict=verdict, labels=labels(box) if box else np.zeros((16, 16), dtype=np.int32))
        for name, (verdict, box) in found.items()
    ]
    return SimpleNamespace(step=step, findings=findings)


def test_a_good_run_has_no_problem():
    assert problems([report(100), report()], ITEMS, "step 200: ...") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"banner_0": (Verdict.SUSPICIOUS, BOXES["banner"])}, "banner-0 is not called memorized"),
        ({"repeated_rocket": (Verdict.NO_EVIDENCE, None)}, "repeated-rocket is not called memorized"),
        ({"banner_0": (Verdict.MEMORIZED, (0, 40, 64, 64))}, "the banner is found in the wrong place: mean IoU 0.00"),
        ({"sticker_0": (Verdict.MEMORIZED, (0, 28, 32, 64))}, "the sticker is found in the wrong place: mean IoU 0.00"),
        ({"banner_0": (Verdict.MEMORIZED, WHOLE)}, "the banner is found in the wrong place: mean IoU 0.38"),
        (
            {"photo_00_cat": (Verdict.MEMORIZED, None)},
            "photo-00-cat, a photo seen rarely, is called memorized at step 200",
        ),
    ],
)
def test_each_problem_is_named(changes, message):
    (problem,) = problems([report(**changes)], ITEMS, "step 200: ...")
    assert problem.startswith(message)


def test_a_photo_called_earlier_is_a_problem_too():
    reports = [report(100, photo_00_cat=(Verdict.MEMORIZED, None)), report()]
    assert problems(reports, ITEMS, "step 200: ...") == [
        "photo-00-cat, a photo seen rarely, is called memorized at step 100"
    ]


def test_a_run_that_nothing_stopped_and_a_run_without_events():
    assert problems([report()], ITEMS, None) == ["memwatch did not stop the run"]
    assert len(problems([], ITEMS, None)) == 1 + len(BOXES)
