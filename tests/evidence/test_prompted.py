"""Reference against prompt probes: the same items, by memwatch's own judge."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from evidence.old import prompted
from evidence.old.prompted import by_caption, by_image, one_event, parts_of, pixel_auroc, prompt_table, stored_of
from evidence.runs.protocol import LEVELS
from evidence.worlds.items import PLANTED, Kind
from evidence.worlds.sets import STRONG

from memwatch.cli.metrics import auc, iou


@pytest.fixture(scope="module")
def rows(products):
    return {row["way"]: row for row in prompt_table(products)}


def test_every_way_is_judged_on_the_same_stored_items(rows, products):
    assert list(rows) == [
        "training image, as shipped",
        "training image, one event",
        "caption, 1 generation",
        "caption, 2 generations",
        "caption, 4 generations",
        "caption, the published way",
    ]
    stored = [item for p in products for item in p.run.items if item.kind in PLANTED and item.dose == STRONG]
    assert {row["items"] for row in rows.values()} == {len(stored)}
    assert {row["parts of pictures"] for row in rows.values()} == {sum(not item.mask.all() for item in stored)}


def test_what_shows_is_found_by_caption_and_by_image(rows, products):
    """In the made-up runs generations show what training images show, and the published maps are noise."""
    noise = rows["caption, the published way"]
    assert noise["IoU"] is noise["lit"] is None
    assert rows["caption, 4 generations"]["lit"] == rows["training image, one event"]["lit"] == 1.0
    assert 0.3 < noise["pixel AUROC"] < 0.7
    for row in [row for row in rows.values() if row is not noise]:
        assert row["pixel AUROC"] > 0.95
        assert row["AUC held out"] == row["TPR held out"] == 1.0
        assert row["held out lit"] <= 0.1
        assert row["IoU, oracle"] > 2 * noise["IoU, oracle"]
    shipped = [iou(case.product.region(case.item), case.item.mask) for case in parts_of(products)]
    assert rows["training image, as shipped"]["IoU"] == pytest.approx(np.mean(shipped))


def test_one_event_is_judged_by_its_own_kind_and_from_nothing(products):
    run = products[0].run
    for observe, is_reference in ((by_image, True), (partial(by_caption, seeds=2), False)):
        judged = one_event(run, observe)
        (judgement,) = judged.events.values()
        observed = [f.observation for f in judgement.everything]
        assert {o.probe.is_reference for o in observed} == {is_reference}
        assert not judgement.peers
        assert len(judgement.controls) == len(run.of_kind(Kind.CONTROL))
        assert {o.now.draws for o in observed} == {LEVELS.draws if is_reference else 2}
        assert not judged.first_alert
    positives = [judged.score(item) for item in stored_of(run)]
    assert auc(positives, [judged.score(item) for item in run.of_kind(Kind.HELD_OUT)]) == 1.0


def test_a_pixel_auroc_needs_no_threshold():
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, :4] = True
    assert pixel_auroc(mask * 1.0, mask) == 1.0
    assert pixel_auroc(1.0 - mask, mask) == 0.0
    assert pixel_auroc(np.ones((4, 4)), mask) == 0.5


def test_without_prompts_or_anything_stored_there_is_no_table(products, monkeypatch):
    monkeypatch.setattr(prompted, "stored_of", lambda run: [])
    assert prompt_table(products) == []
    monkeypatch.setattr(prompted, "with_prompts", lambda products: [])
    assert prompt_table(products) == []
