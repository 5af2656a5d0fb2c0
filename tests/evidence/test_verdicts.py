"""What memwatch called is counted right, on runs in which it is known who is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
from evidence.rivals.stops import copies_by
from evidence.runs.finished import Finished
from evidence.verdicts import tables
from evidence.verdicts.stored import State, copied_at, first_copy, state_of, unfinished
from evidence.worlds.items import Kind
from evidence.worlds.sets import MODERATE, STRONG
from support.planted import COPIED_FROM, LATER, STEPS, is_stored, pretend


def test_items_are_stored_on_their_way_or_never(products):
    run = products[0].run
    for item in run.watched:
        expected = State.NEVER
        if is_stored(item):
            expected = State.STORED if item.dose == STRONG else State.ON_ITS_WAY
        assert state_of(run, item) is expected, item.name
    strong, moderate = (next(i for i in run.planted if i.dose == dose) for dose in (STRONG, MODERATE))
    assert first_copy(run, strong) == copied_at(run, strong) == COPIED_FROM
    assert (first_copy(run, moderate), copied_at(run, moderate)) == (None, LATER)
    waiting = unfinished(run, products[0])  # what was called and is not copied by the run's end
    assert {item.dose for item in waiting} == {MODERATE}
    assert all(products[0].called(item) for item in waiting)


def test_memwatch_is_right_where_nothing_is_ambiguous(products):
    assert tables.precision(products).value == 1
    assert tables.recall(products).value >= 0.8
    assert not tables.mistakes(products)["called, never copied"]
    assert (
        tables.before_copy(products).value == tables.recall(products).value
    )  # called at the second event, copied at the third
    assert all(tables.region_iou(p, i) > 0.7 for p in products for i in tables.stored(p) if i.mask.mean() > 0.12)


def test_false_calls_lower_precision_and_are_listed(products):
    held_out = products[0].run.of_kind(Kind.HELD_OUT)
    more = {item.name: STEPS[1] for item in held_out}
    first = replace(products[0], first_alert=products[0].first_alert | more)
    spoiled, right = [first, products[1]], sum(len(p.first_alert) for p in products)
    assert tables.precision(spoiled).value == pytest.approx(right / (right + len(held_out)))
    assert tables.mistakes(spoiled)["called, never copied"] == [f"captions-0 {item.name}" for item in held_out]
    (captions, everything) = tables.world_table(spoiled)
    assert captions["never: held out"] == everything["never: held out"] == f"{len(held_out)}/{2 * len(held_out)}"
    assert captions["never: ordinary"].startswith("0/")
    (row,) = tables.null_table(spoiled)
    assert (row["probes"], row["runs with a memorized"], row["runs"]) == ("every run, held out", 1, 2)


def test_p_values_of_what_was_never_shown_are_not_too_small(products):
    rows = tables.calibration_table(products)
    assert rows[0]["looks"] == 2 * 10 * (len(STEPS) - 1)
    assert rows[0]["share"].value < 0.3
    assert [row["share"].value for row in rows] == sorted((row["share"].value for row in rows), reverse=True)


def test_siblings_that_are_never_shown_are_no_copies(tmp_path):
    pretend(tmp_path / "dreambooth-0", 0, "dreambooth")
    run = Finished(tmp_path / "dreambooth-0")
    instance, sibling = run.planted[0], run.of_kind(Kind.LEARNED)[0]
    assert instance.caption == sibling.caption
    assert run.share_of_caption(instance) == pytest.approx(1 / 6)
    assert run.copied(sibling, STEPS[-1]) == copies_by(run, STEPS[-1]) == 0
