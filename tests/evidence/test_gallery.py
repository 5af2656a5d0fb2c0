"""The gallery shows failures first, in pictures that say what they show; memwatch's proof is checked against truth."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from evidence.old.proofs import counted, pool_of, proof_table, row
from evidence.pages import gallery
from evidence.pages.failures import Mistake, failures_of
from evidence.pages.gallery import examples, write_gallery
from evidence.pages.item_strip import NEAREST, TILE, WIDTH, facts, item_strip, outlined, tiles
from evidence.verdicts.product import Product
from evidence.verdicts.stored import State, state_of
from evidence.verdicts.tables import region_iou, stored
from evidence.worlds.items import Kind
from evidence.worlds.sets import MODERATE
from PIL import Image, ImageColor

from memwatch.cli.metrics import iou
from memwatch.judge.alerts import Verdict
from memwatch.measure.copies import COPY
from memwatch.report.picture import COPY as COPY_COLOUR

RULE = "a rule"


def misjudged(product: Product) -> Product:
    """The same with one stored item that is never called, one called too late, and two false calls."""
    never, late, *_ = stored(product)
    wrong = [item.name for item in product.run.of_kind(Kind.HELD_OUT)[:2]]
    said = {name: step for name, step in product.first_alert.items() if name != never.name}
    said |= {late.name: product.run.last} | dict.fromkeys(wrong, product.run.steps[1])
    return replace(product, first_alert=said)


# --- failures --------------------------------------------------------------------------------------------------------


def test_what_is_stored_and_called_in_time_is_no_failure_nor_is_what_is_on_its_way(products):
    assert failures_of(products) == []
    product = products[0]
    moderate = [item for item in product.run.watched if state_of(product.run, item) is State.ON_ITS_WAY]
    assert {item.dose for item in moderate} == {MODERATE}
    assert all(product.called(item) for item in moderate)
    silent = replace(product, first_alert={item.name: 20 for item in stored(product)})
    assert failures_of([silent]) == []


def test_false_calls_come_first_then_what_was_never_called_then_what_was_late(products):
    product = misjudged(products[0])
    never, late, *_ = stored(product)
    found = failures_of([product])
    assert [f.mistake for f in found] == [Mistake.FALSE_CALL] * 2 + [Mistake.NEVER_CALLED, Mistake.LATE]
    assert [f.item.name for f in found[2:]] == [never.name, late.name]
    assert [f.step for f in found] == [10, 10, 40, 30]
    assert found[3].words.startswith("Called after its first copy: at that copy memwatch said memorized (")


def test_a_call_at_the_event_of_the_first_copy_is_not_late(products):
    product = products[0]
    item = stored(product)[0]
    at_once = replace(product, first_alert=product.first_alert | {item.name: 30})
    assert failures_of([at_once]) == []


# --- strips ----------------------------------------------------------------------------------------------------------


def test_a_strip_shows_probe_mask_map_region_and_framed_copies(products):
    product = products[0]
    item = next(i for i in stored(product) if not i.mask.all())
    image = np.asarray(item.probe)
    probe, mask, heat, region, *made = [np.asarray(tile) for tile in tiles(product, item)]
    assert len(made) == NEAREST
    assert np.array_equal(probe[::2, ::2], image)
    outside = ~item.mask
    assert np.array_equal(mask[::2, ::2][outside], (0.3 * image[outside]).astype(np.uint8))
    lit = product.region(item)
    assert lit is not None
    assert np.array_equal(region[::2, ::2][~lit], (0.3 * image[~lit]).astype(np.uint8))
    changed = (heat != probe).any(-1)[::2, ::2]
    assert changed[item.mask].mean() > 0.9  # the map is coloured where the item is stored
    for tile in made:
        assert tuple(tile[0, 0]) == ImageColor.getrgb(COPY_COLOUR)
        assert np.array_equal(tile[8:-8:2, 8:-8:2], image[4:-4, 4:-4])


def test_an_outline_runs_along_the_inside_of_what_it_encloses():
    inside = np.zeros((64, 64), dtype=bool)
    inside[10:20, 30:50] = True
    tile = np.asarray(outlined(np.full((64, 64, 3), 100, dtype=np.uint8), inside))
    white = (tile == 255).all(-1)
    assert white.sum() == 20 * 40 - 16 * 36  # two pixels wide, at twice the size
    assert (tile[24:36, 64:96] == 100).all()
    assert (tile[:20] == 30).all()


def test_what_is_never_shown_has_no_mask_and_no_frame(products):
    product = products[0]
    item = product.run.of_kind(Kind.HELD_OUT)[0]
    assert facts(product, item) == "held out, dose 0, nothing is fixed; never called; never copied"
    *_, made = [np.asarray(tile) for tile in tiles(product, item)]
    assert (made == 128).all()


def test_facts_say_size_overlap_and_when(products):
    product = products[0]
    item = stored(product)[0]
    said = facts(product, item)
    assert f"mask: {100 * item.mask.mean():.0f} % of the picture, IoU {region_iou(product, item):.2f}" in said
    assert "first called memorized at step 20 (exposure " in said
    assert "first copied at step 30 (exposure " in said


def test_the_map_is_that_of_the_last_event_with_a_region(products):
    product = products[0]
    item = stored(product)[0]
    last = product.findings[item.name][40]
    quiet = replace(last, state=replace(last.state, verdict=Verdict.NO_EVIDENCE), labels=np.zeros_like(last.labels))
    faded = Product(product.run, product.events, product.first_alert, product.first_suspicion)
    faded.__dict__["findings"] = product.findings | {item.name: product.findings[item.name] | {40: quiet}}
    assert facts(faded, item).endswith("map and regions of step 30")
    assert np.asarray(tiles(faded, item)[2]).shape == (TILE, TILE, 3)


def test_a_long_reason_is_broken_into_lines(products):
    product = products[0]
    item = stored(product)[0]
    short, long = (item_strip(product, item, failure=words) for words in ("few", "many words " * 40))
    assert short.width == long.width == WIDTH
    assert long.height > short.height


# --- the page --------------------------------------------------------------------------------------------------------


def pictures_in(page: str) -> list[str]:
    return re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)


def test_the_page_shows_failures_first_and_links_small_pictures(products, tmp_path):
    (tmp_path / "items-gone.png").write_bytes(b"")
    page = write_gallery({RULE: [misjudged(product) for product in products]}, tmp_path, "a command").read_text("utf-8")
    assert (
        page.index("## Failures by a rule")
        < page.index("items-failures-1.png")
        < page.index("# World by world, by a rule")
    )
    assert "All 8 failures, false calls first:" in page
    assert "`a command`" in page
    assert "(called memorized, and never copied): 4." in page
    names = pictures_in(page)
    assert names == ["items-failures-1.png", "items-failures-2.png", "items-captions.png"]
    assert {file.name for file in tmp_path.glob("*.png")} == set(names)
    for name in names:
        assert (tmp_path / name).stat().st_size <= gallery.MAX_BYTES
        with Image.open(tmp_path / name) as picture:
            assert picture.width == WIDTH


def test_every_rule_has_its_failures_and_the_last_one_shows_the_worlds(products, tmp_path):
    wrong = [misjudged(product) for product in products]
    page = write_gallery({"one": products, "two": wrong, "three": wrong}, tmp_path, "").read_text("utf-8")
    sections = [page.index(f"## Failures by {rule}") for rule in ("one", "two", "three")]
    assert sections == sorted(sections)
    assert pictures_in(page) == [*(f"items-failures-{n}.png" for n in (1, 2, 3, 4)), "items-captions.png"]
    assert page.index("# World by world, by three") < page.index("## captions: many captions")


def test_only_the_worst_failures_are_shown(products, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SHOWN", 3)
    page = write_gallery({RULE: [misjudged(product) for product in products]}, tmp_path, "").read_text("utf-8")
    assert "The worst 3 of 8 failures" in page
    assert page.count("false call: ") == 3
    assert "never called: " not in page


def test_a_picture_that_is_too_large_gets_fewer_colours(products, tmp_path, monkeypatch):
    write_gallery({RULE: products}, tmp_path / "large", "")
    size = (tmp_path / "large" / "items-captions.png").stat().st_size
    monkeypatch.setattr(gallery, "MAX_BYTES", size * 3 // 4)
    write_gallery({RULE: products}, tmp_path / "small", "")
    assert (tmp_path / "small" / "items-captions.png").stat().st_size <= size * 3 // 4


def test_a_world_is_shown_by_its_best_median_and_worst_item(products):
    found, by_overlap = examples(products)
    assert by_overlap
    assert [which for which, *_ in found] == ["best", "median", "worst"]
    partial = sorted(iou(p.region(item), item.mask) for p in products for item in stored(p) if not item.mask.all())
    assert [region_iou(p, item) for _, p, item in found] == [
        partial[-1],
        np.sort(partial)[::-1][len(partial) // 2],
        partial[0],
    ]


@pytest.mark.parametrize(("kept", "words"), [(1, ["best"]), (2, ["best", "worst"]), (0, [])])
def test_few_stored_items_are_shown_once_each_and_whole_ones_by_their_score(products, monkeypatch, kept, words):
    product = products[0]
    whole = [replace(item, mask=np.ones_like(item.mask)) for item in stored(product)[:kept]]
    monkeypatch.setattr(gallery, "stored", lambda _: whole)
    found, by_overlap = examples([product]) if kept else ([], False)
    assert not by_overlap
    assert [which for which, *_ in found] == words
    scores = [product.score(item) for _, _, item in found]
    assert scores == sorted(scores, reverse=True)


def test_a_world_in_which_nothing_is_stored_says_so(products, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "stored", lambda _: [])
    page = write_gallery({RULE: products}, tmp_path, "").read_text("utf-8")
    assert "Nothing was stored in 2 runs." in page
    assert pictures_in(page) == []


# --- proofs ----------------------------------------------------------------------------------------------------------


def test_exact_copies_are_copies_by_both_rules(products):
    asked = []
    found = proof_table(products, asked.append)
    assert len(asked) == 1  # both runs start from the same base
    assert [one["world"] for one in found] == ["captions", "all"]
    copies = 4 * sum(len(stored(product)) for product in products)  # at the last event; news comes before them
    for one in found:
        assert one["copies by the benchmark"] == one["copies by memwatch"] == copies
        assert one["precision"] == one["recall"] == 1
        assert one["generations"] > copies


def test_precision_and_recall_count_what_only_one_rule_calls(products):
    product = products[0]
    item = next(i for i in stored(product) if not i.mask.all())
    finding, pool = product.findings[item.name][40], pool_of(product.run, None)
    made = product.run.generated(item, 40).copy()
    made[2:] = 128
    ratios = [COPY / 2, COPY * 2, COPY / 2, COPY * 2]
    assert counted(finding, made, ratios, pool).tolist() == [4, 1, 2, 2]
    assert row("x", np.array([9, 1, 2, 4])) == {
        "world": "x",
        "generations": 9,
        "copies by the benchmark": 4,
        "copies by memwatch": 2,
        "precision": 0.5,
        "recall": 0.25,
    }
    nothing = row("x", np.zeros(4, dtype=int))
    assert nothing["precision"] is nothing["recall"] is None
