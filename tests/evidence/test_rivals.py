"""The contest: who is compared with whom, and what a rival's numbers are."""

from __future__ import annotations

import numpy as np
import pytest
from evidence.metrics import auc, iou
from evidence.rivals.cases import NEGATIVES, STORED, cases_of
from evidence.rivals.contest import detection_table, first_table, localization_table
from evidence.rivals.rivals import ALL_ONES, RIVALS, clid, fallen_loss, held_out_loss, risen_loss
from evidence.rivals.stops import CLOSE, copies_by, stop_table
from evidence.runs.protocol import LEVELS
from evidence.worlds.items import Kind
from evidence.worlds.sets import MODERATE, STRONG, WEAK
from support.planted import COPIED_FROM, STEPS

LAST = STEPS[-1]


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_what_is_on_its_way_is_neither_right_nor_wrong(products):
    cases = cases_of(products)
    groups = {(case.product.run.name, case.item.name): case.group for case in cases}
    for product in products:
        for item in product.run.watched:
            expected = str(item.kind)
            if item.dose == STRONG:
                expected = STORED
            elif item.dose == MODERATE and item.mask.any():
                expected = None
            elif item.dose == WEAK and item.kind in (Kind.TEMPLATE, Kind.LOGO):
                expected = "planted"
            assert groups.get((product.run.name, item.name)) == expected
    assert {case.group for case in cases} == {STORED, *NEGATIVES}


def test_memwatch_and_rivals_are_judged_on_the_same_items(products):
    rows, parts = localization_table(products), [case for case in cases_of(products) if case.is_part]
    assert only(rows, way="items")["all"] == len(parts)
    shipped = [iou(case.product.region(case.item), case.item.mask) for case in parts]
    assert only(rows, way="memwatch", threshold="as shipped")["all"] == pytest.approx(np.mean(shipped))
    assert only(rows, way=ALL_ONES.name)["all"] == pytest.approx(np.mean([case.item.mask.mean() for case in parts]))
    ways = {(row["way"], row["sampling"]) for row in rows}
    assert {(rival.name, rival.sampling) for rival in RIVALS if rival.map_of} < ways


@pytest.mark.parametrize("prompts", [False, True])
def test_detection(products, prompts):
    rows = detection_table(products, prompts)
    cases, counts = cases_of(products), rows[0]
    stored = sum(case.group == STORED for case in cases)
    assert counts["AUC all"] == len(cases) - stored == sum(counts[f"AUC {name}"] for name in NEGATIVES)
    assert {row["items"] for row in rows} == {stored}
    assert all(row.keys() == counts.keys() for row in rows)
    scores = [[c.product.score(c.item) for c in cases if (c.group == STORED) is is_] for is_ in (True, False)]
    assert only(rows, way="memwatch")["AUC all"] == auc(*scores) == 1.0
    assert only(rows, way="f_mem")["AUC all"] == 1.0  # what is stored is what they generate here
    named = {row["way"] for row in rows}
    assert ("Wen norm" in named, "CLiD" in named, ALL_ONES.name in named) == (prompts, True, False)


def test_who_speaks_first(products):
    rows = first_table(products)
    copy, f_mem, ours = (only(rows, way=way) for way in ("the first copy itself", "f_mem", "memwatch, memorized"))
    assert (copy["before the first copy"], copy["at or before it"]) == (0.0, 1.0)
    assert (f_mem["called"], f_mem["before the first copy"], f_mem["at or before it"]) == (1.0, 0.0, 1.0)
    assert f_mem["exposures"] == copy["exposures"]
    stored = [case for case in cases_of(products) if case.group == STORED]
    alerts = [case.product.first_alert[case.item.name] for case in stored]
    assert ours["before the first copy"] == pytest.approx(np.mean([alert < COPIED_FROM for alert in alerts]))
    shown = [case.product.run.exposures(case.item, alert) for case, alert in zip(stored, alerts, strict=True)]
    assert ours["exposures"] == pytest.approx(np.median(shown))
    assert ours["negatives called"] <= 0.05
    assert only(rows, way="memwatch, suspicious")["exposures"] <= ours["exposures"]
    loss = only(rows, way="loss of the image itself")
    assert loss["called"] == 1.0
    assert loss["exposures"] < copy["exposures"]


def test_stopping_early_spares_copies(products):
    rows = {row["rule"]: row for row in stop_table(products)}
    assert (rows["memwatch"]["stopped"], rows["memwatch"]["nothing copied"].value) == (2, 1)
    assert (rows["never"]["stopped"], rows["never"]["nothing copied"].value) == (0, 0)
    assert rows["never"]["items copied, mean"] > rows["memwatch"]["items copied, mean"] == 0
    run = products[0].run
    assert copies_by(run, COPIED_FROM - 1) == 0 < copies_by(run, COPIED_FROM)
    assert held_out_loss(run, 0) == pytest.approx(held_out_loss(run, LAST), rel=CLOSE - 1)


def loss(run, key, name, step, draws):
    eps = run.true_noise(name)[:, :draws]
    return ((run.measurement(key, step).epsilon[:, :draws] - eps) ** 2).mean().item()


def test_losses(products):
    run = products[0].run
    name = next(item.name for item in run.items if item.dose == STRONG)
    before, now = (loss(run, f"screen/{name}", name, step, 1) for step in (STEPS[0], LAST))
    assert fallen_loss("screen/", log=False)(run, name, LAST) == pytest.approx(before - now, rel=1e-5)
    assert fallen_loss("screen/", log=True)(run, name, LAST) == pytest.approx(np.log(before / now), rel=1e-5)
    full = loss(run, f"null/{name}", name, LAST, LEVELS.draws) - loss(run, name, name, LAST, LEVELS.draws)
    assert clid(run, name, LAST) == pytest.approx(full, rel=1e-5)
    held_out = [item.name for item in run.of_kind(Kind.HELD_OUT, Kind.CONTROL) if item.dose == 0]
    by_step = [np.mean([loss(run, f"screen/{n}", n, step, 1) for n in held_out]) for step in STEPS]
    for i, step in enumerate(STEPS):
        assert risen_loss(run, name, step) == pytest.approx(by_step[i] - min(by_step[: i + 1]), abs=1e-7)
