"""Item strip: one item at the end of a run in a row of pictures, with what was planted, seen and generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from evidence.runs.protocol import SHIPPED
from evidence.verdicts.product import Product
from evidence.verdicts.stored import copied_at, first_copy
from evidence.verdicts.tables import region_iou
from evidence.worlds.items import Item
from PIL import Image, ImageDraw
from scipy import ndimage

from memwatch.report.heatmap import colours, overlay
from memwatch.report.picture import COPY as COPY_COLOUR
from memwatch.report.title_bar import INK, LEADING, PAPER, QUIET, draw_chip, font_of, in_words, wrapped

ZOOM, TILE = 2, 128  # a picture's pixel becomes ZOOM x ZOOM of a tile's
NEAREST = 4  # generations that are shown
COLUMNS = 4 + NEAREST
GAP, LETTERS = 4, 14  # pixels
LINE = round(LEADING * LETTERS)
WIDTH = COLUMNS * TILE + (COLUMNS - 1) * GAP
DIMMED = 0.3  # of the brightness of what lies outside of an outline
OUTLINE = "#FFFFFF"


def heading() -> Image.Image:
    """What the columns show, and the colours of the map."""
    picture = Image.new("RGB", (WIDTH, 2 * LINE), PAPER)
    draw, font = ImageDraw.Draw(picture), font_of(LETTERS)
    words = ("probe", "what is fixed", "memwatch's map", "its regions", "nearest generations, copies framed")
    for column, text in enumerate(words):
        draw.text((left_of(column), LINE // 2), text, INK, font, anchor="lm")
    left, top = left_of(2), f"{SHIPPED.heatmap.max_factor:g}x"
    ends = round(font.getlength("1x")) + GAP, TILE - round(font.getlength(top)) - GAP
    picture.paste(scale(ends[1] - ends[0], LINE - 8), (left + ends[0], LINE + 4))
    draw.text((left, LINE + LINE // 2), "1x", QUIET, font, anchor="lm")
    draw.text((left + TILE, LINE + LINE // 2), top, QUIET, font, anchor="rm")
    return picture


def scale(width: int, height: int) -> Image.Image:
    """The colours of the map, from 1x to the top."""
    return Image.fromarray(colours(np.linspace(0, 1, width)[None].repeat(height, 0)))


def item_strip(product: Product, item: Item, title: str = "", failure: str = "") -> Image.Image:
    """Lines of text above ``COLUMNS`` tiles, ``WIDTH`` pixels wide.

    Args:
        title: in front of the item's name. failure: a line of its own.
    """
    lines = [line for text in (facts(product, item), failure) for line in wrapped(text, WIDTH, LETTERS) if line]
    top = (1 + len(lines)) * LINE + GAP
    picture = Image.new("RGB", (WIDTH, top + TILE), PAPER)
    draw, font = ImageDraw.Draw(picture), font_of(LETTERS)
    name = f"{title}{item.name} in {product.run.name}"
    draw.text((0, LINE // 2), name, INK, font_of(LETTERS + 2), anchor="lm")
    place = round(font_of(LETTERS + 2).getlength(name)) + 2 * GAP
    finding = product.findings[item.name][product.run.last]
    right = draw_chip(picture, finding.verdict, (place, 0), LETTERS) + 2 * GAP
    draw.text((right, LINE // 2), f"{in_words(finding)} at the last event", INK, font, anchor="lm")
    for i, line in enumerate(lines, start=1):
        draw.text((0, i * LINE + LINE // 2), line, QUIET, font, anchor="lm")
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


# --- words -----------------------------------------------------------------------------------------------------------


def facts(product: Product, item: Item) -> str:
    """What was planted, how well it was found, and when it was called and copied."""
    run, name = product.run, item.name
    alert, suspicion = product.first_alert.get(name), product.first_suspicion.get(name)

    def at(step: int) -> str:
        return f"at step {step} (exposure {run.exposures(item, step):.0f})"

    if alert is not None:
        called = f"first called memorized {at(alert)}"
    else:
        called = "never called" if suspicion is None else f"never called memorized, first suspicious {at(suspicion)}"
    first, enough = first_copy(run, item), copied_at(run, item)
    if first is not None:
        copied = f"first copied {at(first)}"
    else:
        copied = "never copied" if enough is None else f"copied where training goes on, {at(enough)}"
    seen = shown_step(product, item)
    shown = [] if seen == run.last else [f"map and regions of step {seen}"]
    return "; ".join([planted(product, item), called, copied, *shown])


def planted(product: Product, item: Item) -> str:
    """What it is, the size of its mask, and the IoU of memwatch's regions with that."""
    what = f"{item.kind}, dose {item.dose}"
    if not item.mask.any():
        return f"{what}, nothing is fixed"
    found = "no region" if product.region(item) is None else f"IoU {region_iou(product, item):.2f}"
    return f"{what}, mask: {100 * item.mask.mean():.0f} % of the picture, {found}"


# --- pictures --------------------------------------------------------------------------------------------------------


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
        ImageDraw.Draw(tile).text((TILE // 2, TILE // 2), "none", OUTLINE, font_of(LETTERS), anchor="mm")
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
    values = signals.decisive.mean.double().numpy()
    return overlay(image, values, max_factor=SHIPPED.heatmap.max_factor, side=TILE)


def generation_tiles(product: Product, item: Item) -> list[Image.Image]:
    """The generations of the last event that are nearest to the item inside its mask; copies have a frame."""
    run = product.run
    ratios, copies = run.numbers[run.last]["copy_ratio"][item.name], run.copies(item, run.last)
    made, found = run.generated(item, run.last), []
    for i in np.argsort(ratios, kind="stable")[:NEAREST]:
        tile = enlarged(made[i])
        if len(copies) and copies[i]:
            ImageDraw.Draw(tile).rectangle((0, 0, TILE - 1, TILE - 1), outline=COPY_COLOUR, width=4)
        found.append(tile)
    return found
