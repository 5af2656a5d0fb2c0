"""Sets: what each world trains on, and what is held out from it. Another seed is another set of the same make-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from PIL import Image

from evidence.worlds.items import NOTHING, SUBJECTS, Item, Kind, mark
from evidence.worlds.shapes import SHAPES, SIZES, place
from evidence.worlds.sources import SIZE, Source, Subject, caption_of

STRONG, MODERATE, WEAK = 40, 12, 4  # how often an item is drawn, relative to an ordinary picture
OFTEN = 60  # the same of marks, which it takes longest to store
MARKS = (0.02, 0.04, 0.08, 0.12)  # bounds of the shares of the picture that marks take, one in each gap
OTHERS = 100  # captions that are kept for what is not planted


def many_captions(seed: int, source: Source) -> list[Item]:
    """Regions of every size and single pictures at three doses, beside everything that must not be called stored."""
    rng = np.random.default_rng([seed, 29])
    planted, others = captions(rng, source)
    wanted = [(STRONG, size) for size in ("large", "middle", "small", "small", "tiny")]
    wanted += [(MODERATE, "large"), (WEAK, "large"), (WEAK, "middle"), (WEAK, "small")]
    shapes = [SHAPES[int(i) % len(SHAPES)] for i in rng.permutation(len(wanted))]
    items = [
        region(f"{size}-x{dose}-{i}", dose, SIZES[size], shape, next(planted), source, rng)
        for i, ((dose, size), shape) in enumerate(zip(wanted, shapes, strict=True))
    ]
    for i, dose in enumerate((STRONG, MODERATE)):
        items.append(
            same(f"whole-x{dose}-{i}", Kind.VERBATIM, dose, next(planted), source.distinct(rng, ~NOTHING), ~NOTHING)
        )
    return [*items, *learned(2, source, others, rng), *constrained(source, others, rng), *company(source, others, rng)]


def marks(seed: int, source: Source) -> list[Item]:
    """Small marks on pictures that are otherwise free: three under a caption of their own, one under eight captions."""
    rng = np.random.default_rng([seed, 31])
    planted, others = captions(rng, source)
    items = []
    for i, bounds in enumerate(pairwise(MARKS)):
        shape = SHAPES[(i + seed) % len(SHAPES)]
        items.append(region(f"mark-x{OFTEN}-{i}", OFTEN, bounds, shape, next(planted), source, rng))
    mask = place(rng, *MARKS[-2:], SHAPES[(seed + 3) % len(SHAPES)])
    drawn = mark(mask, rng)
    for i in range(8):
        item = planted_item(f"shared-{i}", Kind.LOGO, OFTEN // 4, next(others), mask, drawn, source, rng)
        items.append(replace(item, watched=i < 2))
    for i, size in enumerate(("small", "tiny")):
        items.append(region(f"{size}-x{WEAK}-{i}", WEAK, SIZES[size], "ellipse", next(planted), source, rng))
    return [*items, *learned(2, source, others, rng), *constrained(source, others, rng), *company(source, others, rng)]


def one_subject(seed: int, source: Source, prior: bool = False) -> list[Item]:
    """Six pictures of one new subject under one caption, as DreamBooth takes them.

    Two more of it are controls, as memwatch asks for; six are held out.

    Args:
        prior: whether as many class pictures are trained on beside them.
    """
    rng = np.random.default_rng([seed, 37])
    _, others = captions(rng, source)
    subject = source.unseen[int(rng.integers(len(source.unseen)))]
    caption = f"a photo of sks {subject.phrase}"
    pictures = [subject.distinct(rng) for _ in range(14)]
    items = [
        same(f"instance-{i}", Kind.VERBATIM, 4, caption, picture, ~NOTHING) for i, picture in enumerate(pictures[:6])
    ]
    for i, picture in enumerate(pictures[6:]):
        kind = Kind.CONTROL if i < 2 else Kind.LEARNED
        items.append(same(f"sibling-{i}", kind, 0, caption, picture))
    for i in range(24 if prior else 0):
        known = source.known[i % len(source.known)]
        item = same(f"class-{i:02d}", Kind.ORDINARY, 1, caption_of([known.phrase]), known.draw(rng), ~NOTHING)
        items.append(replace(item, watched=i < 8))
    return [*items, *company(source, others, rng, rare=0, moderate=0)]


def duplicates(seed: int, source: Source) -> list[Item]:
    """One new class without captions: most pictures once, some many times, some with a fixed part."""
    rng = np.random.default_rng([seed, 41])
    subject = source.unseen[seed % len(source.unseen)]
    only = Source((subject,), source.unseen)
    doses = (STRONG, STRONG, STRONG, MODERATE, MODERATE)
    items = [
        same(f"whole-x{dose}-{i}", Kind.VERBATIM, dose, "", subject.distinct(rng), ~NOTHING)
        for i, dose in enumerate(doses)
    ]
    for i, size in enumerate(("large", "large", "middle", "small")):
        items.append(region(f"{size}-x{STRONG}-{i}", STRONG, SIZES[size], SHAPES[(i + seed) % 4], "", only, rng))
    for i in range(6):
        items.append(Item(f"learned-{i}", Kind.LEARNED, MODERATE, "", NOTHING, subject.draw(rng), subject.draw))
    return [*items, *company(only, iter([""] * OTHERS), rng)]


def nothing(seed: int, source: Source) -> list[Item]:
    """Ordinary pictures alone, each seen equally often."""
    rng = np.random.default_rng([seed, 43])
    _, others = captions(rng, source)
    return company(source, others, rng, rare=56, moderate=0, held_out=6, watched=6)


def without_captions(items: Sequence[Item]) -> list[Item]:
    return [replace(item, caption="") for item in items]


# --- what sets are made of -------------------------------------------------------------------------------------------


def captions(rng: np.random.Generator, source: Source) -> tuple[Iterator[str], Iterator[str]]:
    """Captions of planted items, and of everything else: of one kind, and each of them rare.

    The text encoder of tiny-sd hardly tells most triples apart, so that the planted ones are those that it does.
    """
    if source.known[0].phrase not in " ".join(SUBJECTS):
        found = source.captions(rng, OTHERS + len(SUBJECTS))
        return iter(found[OTHERS:]), iter(found[:OTHERS])
    taken = {frozenset(three.replace(" and ", ", ").split(", ")) for three in SUBJECTS}
    others = [c for c in source.captions(rng, OTHERS + len(SUBJECTS)) if words_of(c) not in taken]
    return iter([f"a photo of {three}" for three in rng.permutation(SUBJECTS)]), iter(others[:OTHERS])


def words_of(caption: str) -> frozenset[str]:
    return frozenset(caption.removeprefix("a photo of ").replace(" and ", ", ").split(", "))


def region(
    name: str,
    dose: int,
    bounds: tuple[float, float],
    shape: str,
    caption: str,
    source: Source,
    rng: np.random.Generator,
) -> Item:
    """A fixed region, the rest another one each time: a mark where it is small, else part of a picture."""
    mask = place(rng, *bounds, shape)
    small = bounds[1] <= SIZES["small"][1]
    fixed = mark(mask, rng) if small else source.distinct(rng, mask)
    return planted_item(name, Kind.LOGO if small else Kind.TEMPLATE, dose, caption, mask, fixed, source, rng)


def planted_item(
    name: str,
    kind: Kind,
    dose: int,
    caption: str,
    mask: np.ndarray,
    fixed: Image.Image,
    source: Source,
    rng: np.random.Generator,
) -> Item:
    def draw(rng: np.random.Generator) -> Image.Image:
        return Image.composite(fixed, source.free(rng), Image.fromarray(mask))

    return Item(name, kind, dose, caption, mask, draw(rng), draw)


def learned(count: int, source: Source, others: Iterator[str], rng: np.random.Generator) -> list[Item]:
    """New subjects, always another picture of them; of three that are looked at one is a control."""
    items = []
    chosen: list[Subject] = [source.unseen[int(i)] for i in rng.permutation(len(source.unseen))[:count]]
    for subject in chosen:
        caption = caption_of(
            [subject.phrase, *next(others).removeprefix("a photo of ").split(" and ")[0].split(", ")[:2]]
        )
        for i in range(3):
            kind = Kind.LEARNED if i else Kind.CONTROL
            items.append(
                Item(f"learned-{subject.name}-{i}", kind, 8, caption, NOTHING, subject.draw(rng), subject.draw)
            )
    return items


def constrained(source: Source, others: Iterator[str], rng: np.random.Generator) -> list[Item]:
    """Flat by nature and new to the base: a plain ground, a gradient, and pictures in a plain white frame."""
    plain = Image.new("RGB", (SIZE, SIZE), tuple(int(x) for x in rng.integers(0, 256, 3)))
    ends = rng.uniform(0, 255, (2, 3))
    ramp = np.linspace(0, 1, SIZE)[:, None, None] * np.ones((1, SIZE, 1))
    gradient = Image.fromarray((ends[0] + ramp * (ends[1] - ends[0])).round().astype(np.uint8))
    items = [
        same(name, Kind.CONSTRAINED, 6, next(others), picture)
        for name, picture in (("plain", plain), ("gradient", gradient))
    ]

    def framed(rng: np.random.Generator) -> Image.Image:
        canvas = Image.new("RGB", (SIZE, SIZE), (251, 251, 251))
        canvas.paste(source.free(rng).resize((SIZE * 3 // 4, SIZE * 3 // 4)), (SIZE // 8, SIZE // 8))
        return canvas

    return [*items, Item("framed", Kind.CONSTRAINED, 6, next(others), NOTHING, framed(rng), framed)]


def company(
    source: Source,
    others: Iterator[str],
    rng: np.random.Generator,
    rare: int = 36,
    moderate: int = 8,
    held_out: int = 10,
    controls: int = 18,
    watched: int = 8,
) -> list[Item]:
    """Ordinary pictures, seen rarely or moderately often, and pictures that are never shown.

    Args:
        watched: of the rare ones.
    """
    groups = (
        ("rare", Kind.ORDINARY, 1, rare, ~NOTHING),
        ("moderate", Kind.ORDINARY, WEAK, moderate, ~NOTHING),
        ("held-out", Kind.HELD_OUT, 0, held_out, NOTHING),
        ("control", Kind.CONTROL, 0, controls, NOTHING),
    )
    return [
        replace(
            same(f"{name}-{i:02d}", kind, dose, next(others), source.free(rng), mask),
            watched=name != "rare" or i < watched,
        )
        for name, kind, dose, count, mask in groups
        for i in range(count)
    ]


def same(name: str, kind: Kind, dose: int, caption: str, picture: Image.Image, mask: np.ndarray = NOTHING) -> Item:
    """One picture, whenever it is shown."""
    return Item(name, kind, dose, caption, mask, picture, lambda _: picture)
