"""The page of a choice: one HTML file that shows what is watched, why, and what is not. It asks the network for
nothing.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from memwatch.measure.probes import Probe
from memwatch.picking.mix import OF_KIND, PickedRow, Why, places
from memwatch.picking.picked import Picked
from memwatch.picking.representatives import middle_square
from memwatch.picking.rows import RowError
from memwatch.picking.survey import Box, Group, GroupKind
from memwatch.picking.text import counted
from memwatch.picking.trained_on import picture_of

LARGE, SMALL = 224, 96  # pixels of a picture on the page
FELLOWS = 6  # other members of a group that are shown
LISTED = 50  # groups and rows that a table holds at most
MEANS = {
    Why.DUPLICATES: "one row of each group of near-duplicates, the largest first",
    Why.PART: "one row of each part that otherwise different pictures share, the largest group first",
    Why.STRANGE: "the pictures that are least like their nearest others",
    Why.RARE_CAPTION: "the rows with the rarest captions",
    Why.TYPICAL: "pictures as far from their nearest others as most are",
    Why.RANDOM: "any other row",
}


@dataclass(frozen=True)
class Shown:
    """A picture on the page.

    Attributes:
        uri: JPEG of the middle square; ``None`` where the picture cannot be read any more.
        box: what is marked in it, in per cent: left, top, width, height.
    """

    name: str
    uri: str | None
    caption: str = ""
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Card:
    """A picked row on the page: its picture, the group that it stands for, and others of it."""

    watched: PickedRow
    picture: Shown
    fellows: tuple[Shown, ...]
    more: int


def render(picked: Picked) -> str:
    """The page as text."""
    rows, unreadable = picked.rows, picked.survey.unreadable
    return (
        templates()
        .get_template("pick.html")
        .render(
            picked=picked,
            source=rows.folder or type(rows.source).__name__,
            mix=mix_rows(picked),
            cards=[card(picked, watched) for watched in picked.watched],
            controls=list(shown_probes(picked.controls())),
            peers=list(shown_probes(picked.peer_probes())),
            without=[(group.kind, len(group.rows), names(picked, group)) for group in picked.unwatched_groups[:LISTED]],
            unreadable=[(rows.name(row), why) for row, why in list(unreadable.items())[:LISTED]],
            listed=LISTED,
        )
    )


def mix_rows(picked: Picked) -> list[tuple[str, str, int, str]]:
    """The mix: kind, places that it was meant to have, rows picked, meaning."""
    groups, others = places(picked.budget)
    counted = Counter(watched.why for watched in picked.watched)
    meant = dict.fromkeys(OF_KIND.values(), f"{groups} together") | {why: str(n) for why, n in others.items()}
    return [(str(why), meant[why], counted[why], MEANS[why]) for why in Why]


def card(picked: Picked, watched: PickedRow) -> Card:
    """A picked row with the first few others of its group."""
    group, others = watched.group, []
    if group is not None:
        others = [(row, box) for row, box in zip(group.rows, group.boxes, strict=True) if row != watched.row]
    box = None if group is None else dict(zip(group.rows, group.boxes, strict=True)).get(watched.row)
    marked = group is not None and group.kind is GroupKind.PART
    fellows = tuple(shown_row(picked, row, SMALL, at if marked else None) for row, at in others[:FELLOWS])
    picture = shown_row(picked, watched.row, LARGE, box if marked else None)
    return Card(watched, picture, fellows, max(0, len(others) - FELLOWS))


def shown_row(picked: Picked, row: int, side: int, box: Box | None) -> Shown:
    """A training row on the page, with a box of fractions."""
    rows = picked.rows
    try:
        uri = data_uri(rows.image(row), side)
    except RowError:  # it has gone since the survey
        uri = None
    return Shown(rows.name(row), uri, rows.caption(row), None if box is None else in_per_cent(box))


def shown_probes(probes: Iterable[Probe]) -> Iterable[Shown]:
    """Probes on the page."""
    for probe in probes:
        picture = picture_of(probe)
        yield Shown(probe.name, None if picture is None else data_uri(picture, SMALL), probe.prompt)


def in_per_cent(box: Box) -> tuple[float, float, float, float]:
    """``(left, top, width, height)`` in per cent of ``(left, top, right, bottom)`` in fractions."""
    left, top, right, bottom = (100 * edge for edge in box)
    return left, top, right - left, bottom - top


def data_uri(picture: Image.Image, side: int) -> str:
    """A small JPEG of the middle square."""
    buffer = io.BytesIO()
    middle_square(picture, side).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def names(picked: Picked, group: Group) -> str:
    """The first few members of a group."""
    first = ", ".join(picked.rows.name(row) for row in group.rows[:3])
    return f"{first}, ..." if len(group.rows) > 3 else first


@cache
def templates() -> Environment:
    """The page's templates; everything that a training set says is escaped."""
    loader = PackageLoader("memwatch.picking")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["counted"] = counted
    environment.globals["style"] = Markup(loader.get_source(environment, "pick.css")[0])  # our own file
    return environment
