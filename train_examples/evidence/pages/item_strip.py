"""Item strip: one item at the end of a run in a row of pictures, with what was planted, seen and generated."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from evidence.verdicts.product import Product
from evidence.verdicts.stored import copied_at, first_copy
from evidence.verdicts.tables import region_iou
from evidence.worlds.items import Item
from memwatch.report.drawing import MAX_FACTOR, colours, overlay

ZOOM, TILE = 2, 128  # a picture's pixel becomes ZOOM x ZOOM of a tile's
NEAREST = 4  # generations that are shown
COLUMNS = 4 + NEAREST
GAP, LETTERS, LINE = 4, 14, 20  # pixels
WIDTH = COLUMNS * TILE + (COLUMNS - 1) * GAP
CHARACTERS = 145  # of one line
DIMMED = 0.3  # of the brightness of what lies outside of an outline
INK, QUIET, PAPER, OUTLINE, COPY_FRAME = "#1A1A1A", "#5F6368", "#FFFFFF", "#FFFFFF", "#D81B60"
FONT = ImageFont.load_default(LETTERS)


def heading() -> Image.Image:
    """What the columns show, and the colours of the map."""
    picture = Image.new("RGB", (WIDTH, 2 * LINE), PAPER)
    draw = ImageDraw.Draw(picture)
    words = ("probe", "what is fixed", "memwatch's map", "its regions", "nearest generations, copies framed")
    for column, text in enumerate(words):
        draw.text((left_of(column), LINE // 2), text, INK, FONT, anchor="lm")
    left, margin = left_of(2), 30
    picture.paste(scale(TILE - 2 * margin, LINE - 8), (left + margin, LINE + 4))
    draw.text((left, LINE + LINE // 2), "1x", QUIET, FONT, anchor="lm")
    draw.text((left + TILE, LINE + LINE // 2), f"{MAX_FACTOR:g}x", QUIET, FONT, anchor="rm")
    return picture


def scale(width: int, height: int) -> Image.Image:
    """The colours of the map, from 1x to the top."""
    return Image.fromarray(colours(np.linspace(0, 1, width)[None].repeat(height, 0)))


def item_strip(product: Product, item: Item, title: str = "", failure: str = "") -> Image.Image:
    """Lines of text above ``COLUMNS`` tiles, ``WIDTH`` pixels wide.

    Args:
        title: in front of the item's name. failure: a line of its own.
    """
    finding = product.findings[item.name][product.run.last]
    name = f"{title}{item.name} in {product.run.name}: {finding.verdict} at the last event"
    lines = [line for text in (facts(product, item), failure) for line in wrap(text, CHARACTERS)]
    top = (1 + len(lines)) * LINE + GAP
    picture = Image.new("RGB", (WIDTH, top + TILE), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate([name, *lines]):
        draw.text((0, i * LINE + LINE // 2), line, QUIET if i else INK, FONT, anchor="lm")
    for column, tile in enumerate(tiles(product, item)):
        picture.paste(tile, (left_of(column), top))
    return picture


def left_of(column: int) -> int:
    return column * (TILE + GAP)


def stacked(pictures: Sequence[Image.Image], gap: int = 14) -> Image.Image:
    """Pictures of ``WIDTH``, one below the other; ``gap`` pixels between them."""
    sheet = Image.new("RGB", (WIDTH, sum(p.height + gap for p in pictures) - gap), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet


def facts(product: Product, item: Item) -> str:
    """What was planted, how well it was found, and when it was called and copied."""
    run, alert, copy = product.run, product.first_alert.get(item.name), first_copy(product.run, item)

    def at(step: int) -> str:
        return f"at step {step} (exposure {run.exposures(item, step):.0f})"

    found = [f"{item.kind}, dose {item.dose}", "nothing is fixed"]
    if item.mask.any():
        lit = "no region" if product.region(item) is None else f"IoU {region_iou(product, item):.2f}"
        found[1] = f"mask: {100 * item.mask.mean():.0f} % of the picture, {lit}"
    called = "never called memorized" if alert is None else f"first called memorized {at(alert)}"
    copied = "never copied" if copy is None else f"first copied {at(copy)}"
    if copy is None and (later := copied_at(run, item)) is not None:
        copied = f"copied where training goes on, {at(later)}"
    seen = shown_step(product, item)
    shown = [] if seen == run.last else [f"map and regions of step {seen}"]
    return "; ".join([", ".join(found), called, copied, *shown])


def tiles(product: Product, item: Item) -> list[Image.Image]:
    """The probe, the mask, memwatch's map and regions, and the generations, ``TILE`` pixels square."""
    image = np.asarray(item.probe.convert("RGB"))
    found = [enlarged(image), outlined(image, item.mask), heatmap(product, item, image)]
    return [*found, outlined(image, product.region(item)), *generation_tiles(product, item)]


def enlarged(image: np.ndarray) -> Image.Image:
    """RGB uint8 ``(SIZE, SIZE, 3)``, every pixel as a square."""
    return Image.fromarray(image.repeat(ZOOM, 0).repeat(ZOOM, 1))


def outlined(image: np.ndarray, inside: np.ndarray | None) -> Image.Image:
    """The image, dim outside of an outline; dim everywhere where there is nothing inside.

    Args:
        image: RGB uint8 ``(SIZE, SIZE, 3)``.
        inside: bool ``(SIZE, SIZE)``.
    """
    kept = np.zeros(image.shape[:2], dtype=bool) if inside is None else inside
    tile = enlarged(np.where(kept[..., None], image, DIMMED * image).astype(np.uint8))
    if not kept.any():
        ImageDraw.Draw(tile).text((TILE // 2, TILE // 2), "none", OUTLINE, FONT, anchor="mm")
        return tile
    large = kept.repeat(ZOOM, 0).repeat(ZOOM, 1)
    rim = large & ~ndimage.binary_erosion(large, iterations=ZOOM)
    tile.paste(OUTLINE, (0, 0), Image.fromarray(rim))
    return tile


def shown_step(product: Product, item: Item) -> int:
    """The last event with a region, whose map is shown; the last one where there was none."""
    lit = [s for s, f in product.findings[item.name].items() if f.labels is not None and (f.labels > 0).any()]
    return max(lit, default=product.run.last)


def heatmap(product: Product, item: Item, image: np.ndarray) -> Image.Image:
    """The map that decides over the image, in memwatch's own colours and on its own scale."""
    signals = product.findings[item.name][shown_step(product, item)].signals
    if signals is None or signals.decisive is None:
        return outlined(image, None)
    return overlay(image, signals.decisive.mean.double().numpy(), side=TILE)


def generation_tiles(product: Product, item: Item) -> list[Image.Image]:
    """The generations of the last event that are nearest to the item inside its mask; copies have a frame."""
    run = product.run
    ratios, copies = run.numbers[run.last]["copy_ratio"][item.name], run.copies(item, run.last)
    made, found = run.generated(item, run.last), []
    for i in np.argsort(ratios, kind="stable")[:NEAREST]:
        tile = enlarged(made[i])
        if copies[i]:
            ImageDraw.Draw(tile).rectangle((0, 0, TILE - 1, TILE - 1), outline=COPY_FRAME, width=4)
        found.append(tile)
    return found
