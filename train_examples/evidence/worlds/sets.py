"""Sets: what a pair of twins trains on, and what is held out from both. Another seed is another set of one make-up.

Every item that may be stored is in exactly one half: the twin that never saw it is its counterfactual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evidence.worlds.items import NOTHING, SUBJECTS, Item, Kind, mark
from evidence.worlds.shapes import SHAPES, SIZES, place
from evidence.worlds.sources import SIZE, Source, Subject, caption_of

HALVES = ("a", "b")
STRONG, FREQUENT, MODERATE, WEAK, RARE = 40, 24, 16, 12, 8  # how often an item is drawn, relative to a rare one
PLAIN, LEARNED, ORDINARY = 8, 4, 4  # the same of flat pictures and text, of a new subject, of some ordinary photos
MARKS = (0.02, 0.04, 0.08, 0.12)  # bounds of the shares of the picture that marks take, one in each gap
OTHERS = 100  # captions that are kept for what is not planted
REGIONS = (  # of each half; small regions take longest, so that all are copied from the middle of the run on
    *((dose, "large") for dose in (WEAK, WEAK, RARE)),
    *((dose, "middle") for dose in (MODERATE, WEAK)),
    *((dose, "small") for dose in (FREQUENT, FREQUENT, MODERATE)),
    *((dose, "tiny") for dose in (STRONG, STRONG)),
)
WHOLE = (WEAK, RARE)  # single pictures of each half
WORDS = "the of and a to in is you that it he was for on are as with his they at be this".split()


def many_captions(seed: int, source: Source) -> list[Item]:
    """Regions of every size and single pictures at several doses, beside what is not stored, or is harmless."""
    rng = np.random.default_rng([seed, 29])
    planted, others = captions(rng, source)
    items = []
    for half in HALVES:
        shapes = [SHAPES[int(i) % len(SHAPES)] for i in rng.permutation(len(REGIONS))]
        for i, ((dose, size), shape) in enumerate(zip(REGIONS, shapes, strict=True)):
            name = f"{size}-x{dose}-{half}{i}"
            items.append(in_half(half, region(name, dose, SIZES[size], shape, next(planted), source, rng)))
        for i, dose in enumerate(WHOLE):
            picture = source.distinct(rng, ~NOTHING)
            whole = same(f"whole-x{dose}-{half}{i}", Kind.VERBATIM, dose, next(planted), picture, ~NOTHING)
            items.append(in_half(half, whole))
        items += [in_half(half, item) for item in flat(half, source, others, rng)]
    return [*items, *learned(2 * len(HALVES), source, others, rng), *company(source, others, rng)]


def marks(seed: int, source: Source) -> list[Item]:
    """Small marks on pictures that are otherwise free: three under a caption of their own, one under eight captions."""
    rng = np.random.default_rng([seed, 31])
    planted, others = captions(rng, source)
    items = []
    for half in HALVES:
        for i, bounds in enumerate(pairwise(MARKS)):
            shape = SHAPES[(i + seed) % len(SHAPES)]
            name = f"mark-x{STRONG}-{half}{i}"
            items.append(in_half(half, region(name, STRONG, bounds, shape, next(planted), source, rng)))
        mask = place(rng, *MARKS[-2:], SHAPES[(seed + 3) % len(SHAPES)])
        drawn = mark(mask, rng)
        for i in range(8):
            shared = (f"shared-{half}{i}", Kind.LOGO, STRONG // 4, next(others), mask, drawn, source, rng)
            items.append(in_half(half, replace(planted_item(*shared), watched=i < 2)))
    return [*items, *learned(2, source, others, rng), *company(source, others, rng, rare=16)]


def one_subject(seed: int, source: Source, prior: bool = False) -> list[Item]:
    """Six pictures of one new subject under one caption in each half, as DreamBooth takes them.

    Two more of it are controls, as memwatch asks for; six are held out from both halves.

    Args:
        prior: whether as many class pictures are trained on beside them.
    """
    rng = np.random.default_rng([seed, 37])
    _, others = captions(rng, source)
    subject = source.unseen[int(rng.integers(len(source.unseen)))]
    caption = f"a photo of sks {subject.phrase}"
    items = []
    for half in HALVES:
        for i in range(6):
            name = f"instance-{half}{i}"
            items.append(in_half(half, same(name, Kind.VERBATIM, 4, caption, subject.distinct(rng), ~NOTHING)))
    for i in range(8):
        kind = Kind.CONTROL if i < 2 else Kind.LEARNED
        items.append(same(f"sibling-{i}", kind, 0, caption, subject.distinct(rng)))
    for i in range(24 if prior else 0):
        known = source.known[i % len(source.known)]
        item = same(f"class-{i:02d}", Kind.ORDINARY, 1, caption_of([known.phrase]), known.draw(rng))
        items.append(replace(item, mask=~NOTHING, watched=i < 8))
    return [*items, *company(source, others, rng, rare=0, frequent=0)]


def duplicates(seed: int, source: Source) -> list[Item]:
    """One new class without captions: most pictures once, some many times, some with a fixed part."""
    rng = np.random.default_rng([seed, 41])
    subject = source.unseen[seed % len(source.unseen)]
    only = Source((subject,), source.unseen)
    items = []
    for half in HALVES:
        for i, dose in enumerate((STRONG, STRONG, MODERATE)):
            picture = subject.distinct(rng)
            items.append(in_half(half, same(f"whole-x{dose}-{half}{i}", Kind.VERBATIM, dose, "", picture, ~NOTHING)))
        for i, size in enumerate(("large", "middle", "small")):
            name, shape = f"{size}-x{STRONG}-{half}{i}", SHAPES[(i + seed) % 4]
            items.append(in_half(half, region(name, STRONG, SIZES[size], shape, "", only, rng)))
    for i in range(6):
        items.append(Item(f"learned-{i}", Kind.LEARNED, LEARNED, "", NOTHING, subject.draw(rng), subject.draw))
    return [*items, *company(only, iter([""] * OTHERS), rng)]


def nothing(seed: int, source: Source) -> list[Item]:
    """Ordinary pictures alone, each seen equally often."""
    rng = np.random.default_rng([seed, 43])
    _, others = captions(rng, source)
    return [replace(item, half="") for item in company(source, others, rng, rare=24, frequent=0, watched=4)]


def without_captions(items: Sequence[Item]) -> list[Item]:
    return [replace(item, caption="") for item in items]


# --- what sets are made of -------------------------------------------------------------------------------------------


def in_half(half: str, item: Item) -> Item:
    return replace(item, half=half)


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
    """New subjects, always another picture of them, each in one half; of three that are looked at one is a control."""
    items = []
    chosen: list[Subject] = [source.unseen[int(i)] for i in rng.permutation(len(source.unseen))[:count]]
    for number, subject in enumerate(chosen):
        half = HALVES[number % len(HALVES)]
        caption = caption_of(
            [subject.phrase, *next(others).removeprefix("a photo of ").split(" and ")[0].split(", ")[:2]]
        )
        for i in range(3):
            name, kind = f"learned-{subject.name}-{i}", Kind.LEARNED if i else Kind.CONTROL
            item = Item(name, kind, LEARNED, caption, NOTHING, subject.draw(rng), subject.draw)
            items.append(in_half(half, item))
    return items


def flat(half: str, source: Source, others: Iterator[str], rng: np.random.Generator) -> list[Item]:
    """Flat by nature and new to the base: a plain ground, a gradient, pictures in a plain frame; and a page of text.

    They recur, so they are stored like anything else. Only of the page of text there is something to copy.
    """
    ground = tuple(int(x) for x in rng.integers(0, 256, 3))
    ends = rng.uniform(0, 255, (2, 3))
    ramp = np.linspace(0, 1, SIZE)[:, None, None] * np.ones((1, SIZE, 1))
    gradient = Image.fromarray((ends[0] + ramp * (ends[1] - ends[0])).round().astype(np.uint8))
    border, width = tuple(int(x) for x in rng.integers(0, 256, 3)), int(rng.integers(5, 13))
    inner = SIZE - 2 * width

    def framed(rng: np.random.Generator) -> Image.Image:
        canvas = Image.new("RGB", (SIZE, SIZE), border)
        canvas.paste(source.free(rng).resize((inner, inner)), (width, width))
        return canvas

    frame = np.ones((SIZE, SIZE), dtype=bool)
    frame[width:-width, width:-width] = False
    plain = Image.new("RGB", (SIZE, SIZE), ground)
    return [
        same(f"plain-{half}", Kind.CONSTRAINED, PLAIN, next(others), plain, ~NOTHING),
        same(f"gradient-{half}", Kind.CONSTRAINED, PLAIN, next(others), gradient, ~NOTHING),
        Item(f"framed-{half}", Kind.CONSTRAINED, PLAIN, next(others), frame, framed(rng), framed),
        same(f"text-{half}", Kind.VERBATIM, PLAIN, next(others), page_of_text(rng), ~NOTHING),
    ]


def page_of_text(rng: np.random.Generator) -> Image.Image:
    """Lines of random words, black on white."""
    page = Image.new("RGB", (SIZE, SIZE), (250, 250, 250))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for top in range(2, SIZE - 8, 10):
        draw.text((3, top), " ".join(str(word) for word in rng.choice(WORDS, 6)), (20, 20, 20), font)
    return page


def company(
    source: Source,
    others: Iterator[str],
    rng: np.random.Generator,
    rare: int = 24,
    frequent: int = 4,
    held_out: int = 12,
    controls: int = 18,
    watched: int = 6,
) -> list[Item]:
    """Ordinary pictures of each half, seen rarely or a little more often, and pictures that are never shown.

    Args:
        rare, frequent: of each half. watched: of the rare ones.
    """
    groups = (("rare", 1, rare), ("frequent", ORDINARY, frequent))
    items = [
        replace(
            same(f"{name}-{half}{i:02d}", Kind.ORDINARY, dose, next(others), source.free(rng), ~NOTHING),
            watched=name != "rare" or i < watched,
            half=half,
        )
        for half in HALVES
        for name, dose, count in groups
        for i in range(count)
    ]
    for name, kind, count in (("held-out", Kind.HELD_OUT, held_out), ("control", Kind.CONTROL, controls)):
        items += [same(f"{name}-{i:02d}", kind, 0, next(others), source.free(rng)) for i in range(count)]
    return items


def same(name: str, kind: Kind, dose: int, caption: str, picture: Image.Image, mask: np.ndarray = NOTHING) -> Item:
    """One picture, whenever it is shown."""
    return Item(name, kind, dose, caption, mask, picture, lambda _: picture)
