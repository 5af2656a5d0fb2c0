"""What memwatch called is counted right, on runs in which it is known who is stored."""

from dataclasses import replace

import numpy as np
import pytest
from evidence.old.alternatives import (
    CHOICES,
    SHIPPED_CHOICE,
    Choice,
    chosen_elsewhere,
    grid_table,
    judged_again,
    rejudged,
)
from evidence.rivals.stops import CLOSE, copies_by, held_out_loss, stop_table
from evidence.runs.finished import Finished
from evidence.verdicts.product import Product
from evidence.verdicts.stored import State, copied_at, first_copy, state_of, unfinished
from evidence.verdicts.tables import (
    before_copy,
    calibration_table,
    lead_table,
    mistakes,
    null_table,
    precision,
    recall,
    region_iou,
    separation,
    separation_table,
    size_table,
    stored,
    world_table,
)
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
    strong = next(i for i in run.planted if i.dose == STRONG)
    assert first_copy(run, strong) == copied_at(run, strong) == COPIED_FROM
    moderate = next(i for i in run.planted if i.dose == MODERATE)
    assert first_copy(run, moderate) is None
    assert copied_at(run, moderate) == LATER


def test_a_run_goes_on_for_what_was_called_and_is_not_copied_by_its_end(products):
    product = products[0]
    waiting = unfinished(product.run, product)
    assert {i.dose for i in waiting} == {MODERATE}
    assert all(product.called(i) for i in waiting)


def test_memwatch_is_right_where_nothing_is_ambiguous(products):
    assert precision(products).value == 1
    assert recall(products).value >= 0.8
    assert not mistakes(products)["called, never copied"]
    assert before_copy(products).value == recall(products).value  # called at the second event, copied at the third
    assert all(region_iou(p, i) > 0.7 for p in products for i in stored(p) if i.mask.mean() > 0.12)
    auc, rate = separation(products, Kind.HELD_OUT, Kind.ORDINARY, Kind.LEARNED)
    assert auc.value > 0.95
    assert rate.value > 0.8


def wrong(product: Product) -> Product:
    """The same, but it also called every held-out picture, at the first event."""
    more = {item.name: STEPS[1] for item in product.run.of_kind(Kind.HELD_OUT)}
    return replace(product, first_alert=product.first_alert | more, first_suspicion=product.first_suspicion | more)


def test_false_calls_lower_precision_and_are_listed(products):
    spoiled = [wrong(products[0]), products[1]]
    held_out = products[0].run.of_kind(Kind.HELD_OUT)
    right = sum(len(p.first_alert) for p in products)
    assert precision(spoiled).value == pytest.approx(right / (right + len(held_out)))
    assert mistakes(spoiled)["called, never copied"] == [f"captions-0 {item.name}" for item in held_out]
    (captions, everything) = world_table(spoiled)
    assert captions["never: held out"] == everything["never: held out"] == f"{len(held_out)}/{2 * len(held_out)}"
    assert captions["never: ordinary"].startswith("0/")
    (row,) = [row for row in null_table(spoiled) if row["probes"] == "every run, held out"]
    assert (row["runs with a memorized"], row["runs"]) == (1, 2)


def test_late_calls_do_not_count_as_before_the_copy(products):
    late = [replace(p, first_alert=dict.fromkeys(p.first_alert, COPIED_FROM)) for p in products]
    assert before_copy(late).value == 0
    (captions, _) = lead_table(late)
    assert captions["at the same event"] == captions["stored and called"] > 0
    assert captions["showings from call to copy, median"] == "0 [0, 0]"
    (captions, _) = lead_table(products)
    assert captions["call before copy"] == captions["stored and called"]


def test_tables_by_size_and_by_kind_of_negative(products):
    rows = {row["size"]: row for row in size_table(products)}
    assert rows["30% or more"]["stored"] == 2
    assert rows["the whole picture"]["IoU"] is None
    assert rows["30% or more"]["IoU"].value > 0.7
    assert sum(row["stored"] for row in rows.values()) == sum(len(stored(p)) for p in products)
    against = {row["against"]: row for row in separation_table(products)}
    assert against["held out"]["items"] == 20
    assert against["learned"]["AUC"].value > 0.9


def test_p_values_of_what_was_never_shown_are_not_too_small(products):
    rows = calibration_table(products)
    assert rows[0]["looks"] == 2 * 10 * (len(STEPS) - 1)
    assert rows[0]["share"].value < 0.3
    assert [row["share"].value for row in rows] == sorted((row["share"].value for row in rows), reverse=True)


def test_stopping_early_spares_copies(products):
    rows = {row["rule"]: row for row in stop_table(products)}
    assert rows["memwatch"]["stopped"] == 2
    assert rows["memwatch"]["nothing copied"].value == 1
    assert rows["never"]["stopped"] == 0
    assert rows["never"]["nothing copied"].value == 0
    assert rows["never"]["items copied, mean"] > rows["memwatch"]["items copied, mean"] == 0
    run = products[0].run
    assert copies_by(run, COPIED_FROM - 1) == 0 < copies_by(run, COPIED_FROM)
    assert held_out_loss(run, 0) == pytest.approx(held_out_loss(run, STEPS[-1]), rel=CLOSE - 1)


def test_the_world_without_captions_has_no_unconditional_branch(tmp_path):
    pretend(tmp_path / "uncaptioned-0", 0, "uncaptioned")
    run = Finished(tmp_path / "uncaptioned-0")
    assert run.is_complete
    item = run.planted[0]
    assert run.observation(item.name, STEPS[1], True).unconditional is None
    everything = sum(i.dose for i in run.everything)
    assert run.share_of_caption(item) == pytest.approx(item.dose / everything)
    assert run.generated(item, STEPS[-1]).shape == (4, 64, 64, 3)
    assert np.asarray(run.numbers[STEPS[-1]]["copy_ratio"][item.name]).min() == 0.2


def test_the_same_evidence_under_the_same_rule_is_the_same(products):
    for product in products:
        again = judged_again(product, SHIPPED_CHOICE.rule)
        assert again.first_alert == product.first_alert
        assert again.first_suspicion == product.first_suspicion


def test_a_rule_is_chosen_on_the_other_worlds(products):
    strict, loose = Choice(2.0, 2), Choice(1.1, 1)
    assert len(judged_again(products[0], strict.rule).first_alert) <= len(products[0].first_alert)
    early = judged_again(products[0], loose.rule)
    assert min(early.first_alert.values()) == STEPS[1] < min(products[0].first_alert.values())
    everything = rejudged(products)
    rows = {row["floor, patience"]: row for row in grid_table(everything)}
    assert len(rows) == len(CHOICES)
    assert rows[f"**{SHIPPED_CHOICE}**"]["recall"] == recall(products)
    (row,) = chosen_elsewhere(everything)  # there is no other world to choose on, so that all choices are as good
    assert row["world"] == "captions"
    assert row["recall as shipped"] == recall(products)


def test_siblings_that_are_never_shown_are_no_copies(tmp_path):
    pretend(tmp_path / "dreambooth-0", 0, "dreambooth")
    run = Finished(tmp_path / "dreambooth-0")
    instance, sibling = run.planted[0], run.of_kind(Kind.LEARNED)[0]
    assert instance.caption == sibling.caption
    assert run.share_of_caption(instance) == pytest.approx(1 / 6)
    assert run.copied(sibling, STEPS[-1]) == 0
    assert copies_by(run, STEPS[-1]) == 0
