"""The benchmark's pages: every table is there, failures come first, and the pictures show what they say."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from evidence import bench
from evidence.pages import gallery
from evidence.pages.gallery import Mistake, failures_of, write_gallery
from evidence.pages.item_strip import WIDTH
from evidence.verdicts.product import Product
from evidence.verdicts.stored import State, state_of
from evidence.verdicts.tables import recall, stored
from evidence.worlds.items import Kind
from PIL import Image
from support.planted import COPIED_FROM


def misjudged(product: Product) -> Product:
    """The same with one stored item that is never called, one called too late, and two false calls."""
    never, late, *_ = stored(product)
    wrong = [item.name for item in product.run.of_kind(Kind.HELD_OUT)[:2]]
    said = {name: step for name, step in product.first_alert.items() if name != never.name}
    said |= {late.name: product.run.last} | dict.fromkeys(wrong, product.run.steps[1])
    return replace(product, first_alert=said)


def test_the_page_has_every_table_and_says_how_it_was_made(runs, products, tmp_path):
    assert bench.main(["--output", str(runs), "--report", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Written by `bench.py --report`." in page
    assert "{" not in page
    tables = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    found = recall(products)
    expected = {"value": found.value, "low": found.low, "high": found.high, "count": found.count}
    assert tables["worlds"][-1]["recall"] == expected
    assert str(found) in page
    assert all(rows for rows in tables.values())
    assert (tmp_path / "items.md").is_file()


def test_what_is_stored_and_called_in_time_is_no_failure_nor_is_what_is_on_its_way(products):
    assert failures_of(products) == []
    product = products[0]
    assert any(state_of(product.run, item) is State.ON_ITS_WAY for item in product.run.watched if product.called(item))
    at_the_copy = replace(product, first_alert={item.name: COPIED_FROM for item in stored(product)})
    assert failures_of([at_the_copy]) == []


def test_false_calls_come_first_then_what_was_never_called_then_what_was_late(products):
    product = misjudged(products[0])
    never, late, *_ = stored(product)
    found = failures_of([product])
    assert [f.mistake for f in found] == [Mistake.FALSE_CALL] * 2 + [Mistake.NEVER_CALLED, Mistake.LATE]
    assert [f.item.name for f in found[2:]] == [never.name, late.name]
    assert [f.step for f in found] == [10, 10, 40, 30]
    assert found[3].words.startswith("Late: at step 30 memwatch said memorized (")


def test_the_gallery_shows_failures_first_and_links_small_pictures(products, tmp_path):
    (tmp_path / "items-gone.png").write_bytes(b"")
    text = write_gallery([misjudged(product) for product in products], tmp_path).read_text(encoding="utf-8")
    assert "copied): 4. Of the stored ones 2 were called only after" in text
    assert "The worst 8 of 8 failures:" in text
    names = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert names == ["items-failures-1.png", "items-failures-2.png", "items-captions.png"]
    assert {file.name for file in tmp_path.glob("*.png")} == set(names)
    for name in names:
        assert (tmp_path / name).stat().st_size <= gallery.MAX_BYTES
        with Image.open(tmp_path / name) as picture:
            assert picture.width == WIDTH
