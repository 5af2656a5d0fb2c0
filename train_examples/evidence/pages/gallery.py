"""The gallery: ``items.md`` with pictures of items, those that memwatch was wrong about before all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from PIL import Image

from evidence.pages.item_strip import WIDTH, heading, item_strip, scale, stacked
from evidence.verdicts.product import Product
from evidence.verdicts.stored import State, first_copy, state_of
from evidence.verdicts.tables import by_world, region_iou, stored
from evidence.worlds.items import Item
from memwatch.report.about import machine

PAGE = """# Items: what memwatch gets wrong, and what it finds

Written by `bench.py --report`. {machine}.

One strip is one item: the probe; the part of it that is the same in every showing; memwatch's map, in its own colours
and on its own scale; its regions; and, of the generations of the item's caption at the run's last event, the four that
are nearest to the item inside the mask. A frame marks those that are copies. Pixels are enlarged, not smoothed.
`exposure`: how often the item is expected to have been shown by then. `dose`: how often it is drawn, relative to an
ordinary picture.

## Failures

{summary}

{failures}

# World by world
{worlds}"""
SHOWN = 18  # failures at most
PER_SHEET = 6  # strips in one file of failures
MAX_BYTES = 300_000  # of one file
COLOURS = (256, 192, 128, 64, 32)  # of a file's palette: the first with which it is small enough
SCALE = 64  # rows of the map's scale that take part when a palette is chosen, or it would get no colours of its own


class Mistake(StrEnum):
    """Worst first."""

    FALSE_CALL = "false call"  # called memorized, and never copied, also where training goes on
    NEVER_CALLED = "never called"  # stored, and never called memorized
    LATE = "late"  # stored, and called memorized at a later event than that of its first copy


@dataclass(frozen=True)
class Failure:
    """One item that memwatch was wrong about.

    Attributes:
        step: of the event that shows the mistake: the false call, the run's last event, the first copy.
        weight: larger where it is worse, among mistakes of one kind.
    """

    product: Product
    item: Item
    mistake: Mistake
    step: int
    weight: float

    @property
    def words(self) -> str:
        """What memwatch said at that event."""
        finding = self.product.findings[self.item.name][self.step]
        return f"{self.mistake.capitalize()}: at step {self.step} memwatch said {finding.verdict} ({finding.reason})."


def failures_of(products: Sequence[Product]) -> list[Failure]:
    """Of all runs, worst first: false calls by severity, what was never called by dose, the rest by the delay."""
    found = [failure_of(product, item) for product in products for item in product.run.watched]
    kinds = list(Mistake)
    return sorted((f for f in found if f is not None), key=lambda f: (kinds.index(f.mistake), -f.weight))


def failure_of(product: Product, item: Item) -> Failure | None:
    """``None`` where memwatch was right: also about what is on its way, called or not."""
    run, alert, state = product.run, product.first_alert.get(item.name), state_of(product.run, item)
    if state is State.NEVER and alert is not None:
        severity = product.findings[item.name][alert].severity
        return Failure(product, item, Mistake.FALSE_CALL, alert, severity)
    if state is not State.STORED:
        return None
    if alert is None:
        return Failure(product, item, Mistake.NEVER_CALLED, run.last, item.dose)
    copy = first_copy(run, item)
    if copy is None or alert <= copy:
        return None
    return Failure(product, item, Mistake.LATE, copy, run.exposures(item, alert) - run.exposures(item, copy))


def write_gallery(products: Sequence[Product], folder: Path) -> Path:
    """``items.md`` and its pictures, ``items-failures-N.png`` and ``items-WORLD.png``, instead of those from before."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("items-*.png"):
        old.unlink()
    failures = failures_of(products)
    worlds = {world: group for world, group in by_world(products).items() if group[0].run.world_name == world}
    file = folder / "items.md"
    page = PAGE.format(
        machine=machine("torch", "diffusers", "transformers", "memwatch"),
        summary=summary(products, failures),
        failures="\n\n".join(sheets(failures[:SHOWN], folder)),
        worlds="".join(section(world, group, folder) for world, group in worlds.items()),
    )
    file.write_text(page, encoding="utf-8")
    return file


def summary(products: Sequence[Product], failures: Sequence[Failure]) -> str:
    """How many there are, of how many, and how many are shown."""
    kinds, watched = Counter(failure.mistake for failure in failures), sum(len(p.run.watched) for p in products)
    number = sum(len(stored(product)) for product in products)
    text = (
        f"{len(products)} runs, {watched} items, {number} of them stored. False calls (called memorized, and never "
        f"copied): {kinds[Mistake.FALSE_CALL]}. Of the stored ones {kinds[Mistake.LATE]} were called only after the "
        f"event of their first copy, and {kinds[Mistake.NEVER_CALLED]} never."
    )
    return f"{text} The worst {min(SHOWN, len(failures))} of {len(failures)} failures:" if failures else text


def sheets(failures: Sequence[Failure], folder: Path) -> Iterator[str]:
    """Strips of failures, a few per file, as Markdown."""
    for number, start in enumerate(range(0, len(failures), PER_SHEET), start=1):
        part, name = failures[start : start + PER_SHEET], f"items-failures-{number}.png"
        save([heading(), *(item_strip(f.product, f.item, failure=f.words) for f in part)], folder / name)
        said = "; ".join(f"{f.mistake}: {f.item.name} in {f.product.run.name}" for f in part)
        yield f"![{said}]({name})"


def section(world: str, products: Sequence[Product], folder: Path) -> str:
    """One world: its best, median and worst stored item."""
    title, name = f"\n## {world}: {products[0].run.world.says}\n\n", f"items-{world}.png"
    found = examples(products)
    if not found:
        return f"{title}Nothing was stored.\n"
    save([heading(), *(item_strip(p, item, f"{which}: ") for which, p, item in found)], folder / name)
    said = "; ".join(f"{which}: {item.name} in {p.run.name}" for which, p, item in found)
    return f"{title}![{said}]({name})\n"


def examples(products: Sequence[Product]) -> list[tuple[str, Product, Item]]:
    """The best, median and worst stored item, each once.

    By IoU of those whose mask is a part of the picture; where there is none of these, by the score of all.
    """
    ranked = [(p, item) for p in products for item in stored(p)]
    partial = [(p, item) for p, item in ranked if not item.mask.all()]
    if partial:
        ranked = sorted(partial, key=lambda pair: region_iou(*pair), reverse=True)
    else:
        ranked.sort(key=lambda pair: pair[0].score(pair[1]), reverse=True)
    chosen = {len(ranked) // 2: "median", len(ranked) - 1: "worst", 0: "best"}  # of two there is no median
    return [(chosen[place], *ranked[place]) for place in sorted(chosen)] if ranked else []


def save(strips: Sequence[Image.Image], file: Path) -> None:
    """As one PNG with a palette, which has as many colours as ``MAX_BYTES`` allow."""
    picture = stacked(strips)
    with_scale = stacked([picture, scale(WIDTH, SCALE)])
    for number in COLOURS:
        reduced = with_scale.quantize(number, dither=Image.Dither.NONE).crop((0, 0, *picture.size))
        reduced.save(file, optimize=True)
        if file.stat().st_size <= MAX_BYTES:
            return
