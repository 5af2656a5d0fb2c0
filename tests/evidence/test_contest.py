"""The contest: who is compared with whom, whose thresholds they are, and what a rival's numbers are."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from evidence.rivals import contest
from evidence.rivals import maps as places
from evidence.rivals.cases import NEGATIVES, STORED, Case, above_elsewhere, cases_of, threshold_at
from evidence.rivals.contest import detection_table, first_table, localization_table
from evidence.rivals.maps import Maps, by_world, decisive_map, iou_elsewhere, oracle
from evidence.rivals.rivals import (
    ALL_ONES,
    F_MEM,
    RIVALS,
    Rival,
    clid,
    fallen_loss,
    kept_map,
    raw,
    risen_loss,
    scores_in,
)
from evidence.runs.protocol import LEVELS
from evidence.worlds.items import Kind
from evidence.worlds.sets import MODERATE, STRONG, WEAK
from support.planted import COPIED_FROM, STEPS

from memwatch.cli.metrics import auc, iou, resized

LAST = STEPS[-1]


@pytest.fixture
def two_worlds(products, monkeypatch):
    """Both runs, as if each were of a world of its own."""
    of_seed = property(lambda case: ("captions", "marks")[case.product.run.plan["seed"]])
    monkeypatch.setattr(Case, "world", of_seed)
    return products


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


# --- who is compared -------------------------------------------------------------------------------------------------


def test_what_is_on_its_way_is_neither_right_nor_wrong(products):
    cases = cases_of(products)
    groups = {(case.product.run.name, case.item.name): case.group for case in cases}
    for product in products:
        for item in product.run.watched:
            group = groups.get((product.run.name, item.name))
            if item.dose == STRONG:
                assert group == STORED
            elif item.dose == MODERATE and item.mask.any():
                assert group is None
            elif item.dose == WEAK and item.kind in (Kind.TEMPLATE, Kind.LOGO):
                assert group == "planted"
            else:
                assert group == str(item.kind)
    assert {case.group for case in cases} == {STORED, *NEGATIVES}
    assert not any(case.item.kind in (Kind.CONTROL, Kind.PEER) for case in cases)


# --- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "expected"), [(50, 49), (99, 98), (100, 98), (200, 197)])
def test_a_threshold_calls_one_percent_at_most(number, expected):
    negatives = np.random.default_rng(0).permutation(number).astype(float)
    assert threshold_at(negatives) == expected
    assert (negatives > expected).mean() <= 0.01


def test_a_worlds_own_negatives_do_not_choose_its_threshold():
    worlds = np.repeat(["a", "b", "c"], 2)
    scores = np.array([9.0, 5.0, 3.0, 2.0, 4.5, 1.0])
    negative = np.array([False, True, False, True, False, True])
    assert above_elsewhere(scores, negative, worlds).tolist() == [True, True, False, False, False, False]
    assert above_elsewhere(scores[:2], negative[:2], worlds[:2]) is None


def test_a_threshold_of_other_items_is_in_the_maps_own_unit():
    masks = np.zeros((3, 8, 8), dtype=bool)
    masks[:, :4] = True
    maps = np.where(masks, 3.0, 1.0)
    maps[0] = np.where(masks[0], 0.9, 0.0)  # all of it below what the others have outside
    here = np.array([True, False, False])
    assert oracle([maps[here]], masks[here]) == 1.0
    assert oracle([maps], masks) < 1.0
    assert iou_elsewhere([maps], masks, here) == 0.0
    assert iou_elsewhere([maps, np.where(masks, 0.9, 0.0)], masks, here) == 0.0  # the first variant is as good there
    assert iou_elsewhere([maps], masks, np.array([True, True, True])) is None


def test_a_variant_is_chosen_on_the_others_too():
    masks = np.zeros((4, 8, 8), dtype=bool)
    masks[:, :2] = True
    good, bad = masks.astype(float), 1.0 - masks
    here = np.array([True, True, False, False])
    first = np.where(here[:, None, None], good, bad)
    assert oracle([first[here], bad[here]], masks[here]) == 1.0
    assert iou_elsewhere([first, np.where(here[:, None, None], bad, good)], masks, here) == 0.0


# --- where -----------------------------------------------------------------------------------------------------------


def test_memwatch_and_rivals_are_judged_on_the_same_items(two_worlds):
    rows = localization_table(two_worlds)
    parts = [case for case in cases_of(two_worlds) if case.group == STORED and not case.item.mask.all()]
    assert only(rows, way="items") == {
        "way": "items",
        "sampling": None,
        "threshold": None,
        "captions": sum(case.world == "captions" for case in parts),
        "marks": sum(case.world == "marks" for case in parts),
        "worlds with prompts": len(parts),
        "all": len(parts),
    }
    shipped = [iou(case.product.region(case.item), case.item.mask) for case in parts]
    assert only(rows, way="memwatch", threshold="as shipped")["all"] == pytest.approx(np.mean(shipped))
    ones = only(rows, way=ALL_ONES.name, threshold="oracle")
    assert ones["all"] == pytest.approx(np.mean([case.item.mask.mean() for case in parts]))
    assert only(rows, way=ALL_ONES.name, threshold="other worlds")["all"] == pytest.approx(ones["all"])
    ways = {(row["way"], row["sampling"]) for row in rows}
    assert {(rival.name, rival.sampling) for rival in RIVALS if rival.map_of} < ways
    for row in rows[1:]:
        assert 0 <= row["all"] <= 1
        if row["way"] != "memwatch" and row["sampling"] != "-":  # their maps are noise here
            assert row["all"] < only(rows, way="memwatch", threshold="other worlds")["all"]


def test_what_was_never_lit_counts_as_nothing(products, monkeypatch):
    before = only(localization_table(products), way="memwatch", threshold="as shipped")["all"]
    parts = [case for case in cases_of(products) if case.is_part]
    missed = parts[0]
    region = type(missed.product).region
    monkeypatch.setattr(
        type(missed.product), "region", lambda p, item: None if item is missed.item else region(p, item)
    )
    after = only(localization_table(products), way="memwatch", threshold="as shipped")["all"]
    lost = iou(region(missed.product, missed.item), missed.item.mask)
    assert before - after == pytest.approx(lost / len(parts))


def test_a_single_world_has_no_others(products):
    rows = localization_table(products)
    assert {row["all"] for row in rows if row["threshold"] == "other worlds"} == {None}
    assert all(row["all"] is not None for row in rows if row["threshold"] == "oracle")


def test_a_world_without_a_map_has_no_number(two_worlds, monkeypatch):
    def map_of(run, name, step):
        return kept_map("verified/null")(run, name, step) if run.plan["seed"] == 0 else None

    monkeypatch.setattr(contest, "RIVALS", (Rival("half", map_of=map_of), Rival("no map at all")))
    rows = localization_table(two_worlds)
    row = only(rows, way="half", threshold="oracle")
    assert row["captions"] > 0
    assert (row["marks"], row["all"]) == (None, None)
    assert only(rows, way="half", threshold="other worlds")["captions"] is None
    assert not any(row["way"] == "no map at all" for row in rows)


def test_several_worlds_weigh_by_their_items(two_worlds):
    cases = cases_of(two_worlds)[:-7]
    numbers = [sum(case.world == world for case in cases) for world in ("captions", "marks")]
    found = by_world(lambda here: 1.0 if here[0] else 0.0, cases)
    assert numbers[0] != numbers[1]
    assert (found["captions"], found["marks"]) == (1.0, 0.0)
    assert found["all"] == pytest.approx(numbers[0] / sum(numbers))


def test_worlds_with_prompts_choose_among_themselves(two_worlds, monkeypatch):
    """The rivals that look at captions are measured nowhere else; so the others may choose nowhere else either."""
    cases = [case for case in cases_of(two_worlds) if case.is_part]
    maps = Maps.of([[decisive_map(case.product, case.item)] for case in cases])
    both = places.row_of_maps("x", "-", "other worlds", maps, cases)
    worlds = dict(places.WORLDS)
    monkeypatch.setattr(places, "WORLDS", worlds | {"marks": replace(worlds["marks"], prompts=False)})
    one = places.row_of_maps("x", "-", "other worlds", maps, cases)
    assert None not in (both["captions"], both["marks"])
    assert one["captions"] is None
    assert one["marks"] == both["marks"]


# --- whether ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [False, True])
def test_detection(two_worlds, prompts):
    rows = detection_table(two_worlds, prompts)
    cases, counts = cases_of(two_worlds), rows[0]
    stored = sum(case.group == STORED for case in cases)
    assert counts["items"] == stored
    assert counts["AUC all"] == len(cases) - stored == sum(counts[f"AUC {name}"] for name in NEGATIVES)
    assert {row["items"] for row in rows} == {stored}
    assert all(row.keys() == counts.keys() for row in rows)
    shipped = only(rows, way="memwatch", score="as shipped")
    assert (shipped["called"], shipped["AUC all"]) == (1.0, None)
    ours = only(rows, way="memwatch", score="z_score over the controls")
    positives, negatives = (
        [c.product.score(c.item) for c in cases if (c.group == STORED) is is_] for is_ in (True, False)
    )
    assert ours["AUC all"] == auc(positives, negatives) == 1.0
    assert only(rows, way="f_mem")["AUC all"] == 1.0  # what is stored is what they generate here
    named = {row["way"] for row in rows}
    assert ("Wen norm" in named, "CLiD" in named) == (prompts, True)
    assert ALL_ONES.name not in named


def test_the_published_score_comes_first_and_the_best_is_no_worse(two_worlds):
    rows = detection_table(two_worlds, True)
    pairs = [(a, b) for a, b in pairwise(rows) if "best of" in b["score"]]
    assert len(pairs) >= 10
    for published, best in pairs:
        assert (published["way"], published["sampling"]) == (best["way"], best["sampling"])
        assert best["AUC all"] >= published["AUC all"]
    maps = [b["score"] for a, b in pairs if a["way"].startswith("Kim & Lee")]
    assert all(score.endswith("(best of 12)") for score in maps)


def test_a_rival_without_a_number_has_no_row_and_half_of_them_are_counted(two_worlds, monkeypatch):
    def half(run, name, step):
        return 1.0 * run.items[0].dose if run.plan["seed"] == 0 else None

    monkeypatch.setattr(contest, "RIVALS", (Rival("none"), Rival("half", score_of=(("number", half),))))
    rows = detection_table(two_worlds, False)
    assert [row["way"] for row in rows[3:]] == ["half"]
    here = [case for case in cases_of(two_worlds) if case.group == STORED and case.world == "captions"]
    assert (rows[-1]["items"], rows[-1]["AUC all"], rows[-1]["called"]) == (len(here), 0.5, None)


def test_against_controls_is_in_their_deviations(products):
    run = products[0].run
    found = scores_in(run, Rival("x", map_of=kept_map("published/null")), LAST)
    assert next(iter(found)) == "mean"
    assert len(found) == 12
    controls = [item.name for item in run.of_kind(Kind.CONTROL)]
    own = np.array([found["mean"][name] for name in controls])
    judged = np.array([found["mean, against controls"][name] for name in controls])
    assert judged == pytest.approx((own - own.mean()) / own.std(ddof=1))
    assert list(scores_in(run, Rival("x", score_of=(("number", lambda *_: 2.0),)), LAST)) == ["number"]


# --- when ------------------------------------------------------------------------------------------------------------


def test_who_speaks_first(two_worlds):
    rows = first_table(two_worlds)
    copy = only(rows, way="the first copy itself")
    assert (copy["before the first copy"], copy["at or before it"]) == (0.0, 1.0)
    f_mem = only(rows, way="f_mem")
    assert (f_mem["called"], f_mem["before the first copy"], f_mem["at or before it"]) == (1.0, 0.0, 1.0)
    assert f_mem["exposures"] == copy["exposures"]
    ours = only(rows, way="memwatch, memorized")
    stored = [case for case in cases_of(two_worlds) if case.group == STORED]
    early = [case.product.first_alert.get(case.item.name, LAST) < COPIED_FROM for case in stored]
    assert ours["before the first copy"] == pytest.approx(np.mean(early))
    shown = [case.product.run.exposures(case.item, case.product.first_alert[case.item.name]) for case in stored]
    assert ours["exposures"] == pytest.approx(np.median(shown))
    assert ours["negatives called"] <= 0.05
    assert only(rows, way="memwatch, suspicious")["exposures"] <= ours["exposures"]
    loss = only(rows, way="loss of the image itself")
    assert loss["called"] == 1.0
    assert loss["exposures"] < copy["exposures"]


def test_without_other_worlds_a_rival_has_no_threshold(products):
    rows = first_table(products)
    assert only(rows, way="f_mem")["called"] is None
    assert only(rows, way="memwatch, memorized")["called"] == 1.0


def test_nothing_stored_is_nothing_to_compare(products, monkeypatch):
    monkeypatch.setattr(contest, "cases_of", lambda products: [c for c in cases_of(products) if c.group != STORED])
    assert localization_table(products) == detection_table(products, True) == first_table(products) == []


# --- a rival's numbers -----------------------------------------------------------------------------------------------


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
    unseen = [item for item in run.of_kind(Kind.HELD_OUT, Kind.CONTROL) if item.dose == 0]
    held_out = [item.name for item in unseen if not item.name.startswith("sibling")]
    by_step = [np.mean([loss(run, f"screen/{n}", n, step, 1) for n in held_out]) for step in STEPS]
    for i, step in enumerate(STEPS):
        assert risen_loss(run, name, step) == pytest.approx(by_step[i] - min(by_step[: i + 1]), abs=1e-7)


def test_what_was_not_measured_has_no_number(products):
    run = products[0].run
    name = run.items[0].name
    assert clid(run, "nobody", LAST) is None
    assert raw(run, "nobody", LAST) is None
    assert F_MEM.scores(run, name, STEPS[0]) == {}
    assert fallen_loss("", log=False)(run, "nobody", LAST) is None
    assert Rival("x", map_of=kept_map("published/unheard")).scores(run, name, LAST) == {}


def test_f_mem_looks_at_as_many_generations_of_everything(products, monkeypatch):
    run = products[0].run
    name = run.items[0].name
    numbers = {LAST: {"nearest_ratio": {name: [0.8, 0.7, 0.9, 0.75, 0.1, 0.1]}}}
    monkeypatch.setitem(run.__dict__, "numbers", numbers)
    assert F_MEM.scores(run, name, LAST) == {"nearest of 4 generations": -0.7}


def test_maps_and_their_summaries(products):
    run = products[0].run
    name = run.items[0].name
    rho = run.measurement(name, LAST).rho.samples
    assert raw(run, name, LAST) == pytest.approx(1 - rho.mean((0, 1)).numpy(), abs=1e-6)
    values = np.zeros((16, 16))
    values[0, :2] = 8.0
    scores = Rival("x", map_of=lambda *_: values).scores(run, name, LAST)
    assert scores["mean"] == 16 / 256
    assert (scores["largest"], scores["mean of 16 largest"]) == (8.0, 1.0)
    assert scores["largest, smoothed"] == pytest.approx(4.0)  # the corner: two of its four neighbours
    assert torch.is_tensor(run.tensors(LAST)[f"{name}/verified/score"])
    kept = kept_map("verified/score")(run, name, LAST)
    assert resized(kept, (64, 64)).shape == (64, 64)
