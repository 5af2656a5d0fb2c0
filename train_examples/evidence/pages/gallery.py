"""The gallery: ``items.md`` with pictures of items, those that memwatch was wrong about before all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, groupby
from pathlib import Path

from evidence.pages.failures import Failure, Mistake, failures_of
from evidence.pages.item_strip import WIDTH, heading, item_strip, scale, stacked
from evidence.pages.markdown import PACKAGES
from evidence.verdicts.product import Product
from evidence.verdicts.stored import first_copy
from evidence.verdicts.tables import region_iou, stored
from evidence.worlds.items import Item
from evidence.worlds.world import WORLDS
from PIL import Image

from memwatch.report.about import machine

TEMPLATE = Path(__file__).with_name("gallery.md").read_text(encoding="utf-8")
SHOWN = 18  # failures by one rule, at most
PER_SHEET = 6  # strips in one file of failures
MAX_BYTES = 300_000  # of one file
SCALE = 64  # rows of the map's scale that take part when a palette is chosen
COLOURS = (256, 192, 128, 64, 32)  # of a file's palette: the first with which it is small enough

Example = tuple[str, Product, Item]  # best, median or worst


def write_gallery(by_rules: Mapping[str, Sequence[Product]], folder: Path, command: str) -> Path:
    """``items.md`` and its pictures in ``folder``: ``items-failures-N.png``, and ``items-WORLD.png`` per world.

    Pictures of those names that are there already are replaced.

    Args:
        by_rules: the same runs by every rule for copies; worlds are shown by the last of them.
        command: how the page was made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("items-*.png"):
        old.unlink()
    numbers, last, parts = count(1), list(by_rules)[-1], []
    for rule, products in by_rules.items():
        failures = failures_of(products)
        parts += [f"## Failures by {rule}", summary(products, failures), *sheets(failures[:SHOWN], folder, numbers)]
    page = TEMPLATE.format(
        command=command,
        machine=machine(*PACKAGES),
        failures="\n\n".join(parts),
        rule=last,
        worlds="".join(section(world, group, folder) for world, group in by_world(by_rules[last])),
    )
    file = folder / "items.md"
    file.write_text(page, encoding="utf-8")
    return file


def by_world(products: Sequence[Product]) -> Iterator[tuple[str, list[Product]]]:
    """In the order of ``worlds.WORLDS``."""
    places = {world: place for place, world in enumerate(WORLDS)}
    ordered = sorted(products, key=lambda p: (places[p.run.world_name], p.run.plan["seed"]))
    return ((world, list(group)) for world, group in groupby(ordered, key=lambda p: p.run.world_name))


# --- failures --------------------------------------------------------------------------------------------------------


def summary(products: Sequence[Product], failures: Sequence[Failure]) -> str:
    """How many there are, of how many, and how many are shown."""
    kinds = Counter(failure.mistake for failure in failures)
    found = [(product, item) for product in products for item in stored(product)]
    at_once = sum(product.first_alert.get(item.name) == first_copy(product.run, item) for product, item in found)
    watched = sum(len(product.run.watched) for product in products)
    never, late = kinds[Mistake.NEVER_CALLED], kinds[Mistake.LATE]
    early = len(found) - never - late - at_once
    text = (
        f"{runs_of(products)}, {watched} items, {len(found)} of them stored. False calls (called memorized, and never "
        f"copied): {kinds[Mistake.FALSE_CALL]}. Of the stored ones memwatch called {early} before their first copy, "
        f"{at_once} at the event that shows it (no failure here), {late} later, and {never} never."
    )
    if not failures:
        return text
    many = f"The worst {SHOWN} of {len(failures)}" if len(failures) > SHOWN else f"All {len(failures)}"
    return f"{text}\n\n{many} failures, false calls first:"


def sheets(failures: Sequence[Failure], folder: Path, numbers: Iterator[int]) -> Iterator[str]:
    """Strips of failures, a few per file, as Markdown; ``numbers`` names the files."""
    for start in range(0, len(failures), PER_SHEET):
        part = failures[start : start + PER_SHEET]
        name = f"items-failures-{next(numbers)}.png"
        strips = [item_strip(f.product, f.item, failure=f.words) for f in part]
        save(stacked([heading(), *strips]), folder / name)
        said = "; ".join(f"{f.mistake}: {f.item.name} in {f.product.run.name}" for f in part)
        yield f"![{said}]({name})"


# --- worlds ----------------------------------------------------------------------------------------------------------


def section(world: str, products: Sequence[Product], folder: Path) -> str:
    """One world: its best, median and worst stored item."""
    title, number = f"\n## {world}: {WORLDS[world].says}\n\n", sum(len(stored(p)) for p in products)
    if not number:
        return f"{title}Nothing was stored in {runs_of(products)}.\n"
    name, found, by_overlap = f"items-{world}.png", *examples(products)
    save(stacked([heading(), *(item_strip(p, item, f"{which}: ") for which, p, item in found)]), folder / name)
    what = "the IoU of its regions with the mask, among masks that are part of a picture"
    what = what if by_overlap else "its score, since all are whole pictures"
    words = f"{number} stored in {runs_of(products)}. The {', '.join(w for w, *_ in found)} one by {what}:"
    said = "; ".join(f"{which}: {item.name} in {p.run.name}" for which, p, item in found)
    return f"{title}{words}\n\n![{said}]({name})\n"


def runs_of(products: Sequence[Product]) -> str:
    return f"{len(products)} run{'s' * (len(products) > 1)}"


def examples(products: Sequence[Product]) -> tuple[list[Example], bool]:
    """The best, median and worst stored item, each once; and whether IoU decided, or the score.

    It is the IoU of those whose mask is a part of the picture; where there is none of these, the score of all.
    """
    everything = [(p, item) for p in products for item in stored(p)]
    partial = [(p, item) for p, item in everything if not item.mask.all()]
    if partial:
        ranked = sorted(partial, key=lambda pair: region_iou(*pair), reverse=True)
    else:
        ranked = sorted(everything, key=lambda pair: pair[0].score(pair[1]), reverse=True)
    chosen = {len(ranked) // 2: "median", len(ranked) - 1: "worst", 0: "best"}  # of two there is no median
    return [(chosen[place], *ranked[place]) for place in sorted(chosen)], bool(partial)


def save(picture: Image.Image, file: Path) -> None:
    """As PNG with a palette, which has as many colours as ``MAX_BYTES`` allow."""
    weighty = stacked(
        [picture, scale(WIDTH, SCALE)]
    )  # or the few pixels of the scale would get no colours of their own
    for number in COLOURS:
        reduced = weighty.quantize(number, dither=Image.Dither.NONE).crop((0, 0, *picture.size))
        reduced.save(file, optimize=True)
        if file.stat().st_size <= MAX_BYTES:
            return
