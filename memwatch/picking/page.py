"""The page of a choice: one HTML file that shows what is watched, why, and what is not. It asks the network for
nothing.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from memwatch.measure.probes import Probe
from memwatch.picking.hashes import square
from memwatch.picking.mix import PickedRow, Why, places
from memwatch.picking.picked import Picked, picture_of, probe_of
from memwatch.picking.survey import Box, GroupKind
from memwatch.picking.text import counted, listed

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


def render(picked: Picked) -> str:
    """The page as text."""
    rows, unreadable = picked.rows, picked.survey.unreadable
    page = _templates().get_template("pick.html")
    return page.render(
        picked=picked,
        source=rows.folder or type(rows.source).__name__,
        mix=_mix_rows(picked),
        cards=[_card(picked, watched) for watched in picked.watched],
        controls=[_shown(probe, SMALL) for probe in picked.controls()],
        peers=[_shown(probe, SMALL) for probe in picked.peer_probes()],
        without=[
            (group.kind, len(group.rows), listed([rows.name(row) for row in group.rows]))
            for group in picked.unwatched_groups[:LISTED]
        ],
        unreadable=[(rows.name(row), why) for row, why in list(unreadable.items())[:LISTED]],
        listed=LISTED,
    )


def _mix_rows(picked: Picked) -> list[tuple[str, str, int, str]]:
    """The mix: kind, places that it was meant to have, rows picked, meaning."""
    groups, others = places(picked.budget)
    number = Counter(watched.why for watched in picked.watched)
    meant = dict.fromkeys(map(Why, GroupKind), f"{groups} together") | {why: str(n) for why, n in others.items()}
    return [(str(why), meant[why], number[why], MEANS[why]) for why in Why]


def _card(picked: Picked, watched: PickedRow) -> dict[str, Any]:
    """A picked row with the first few others of its group."""
    group = watched.group
    boxes = {} if group is None else dict(zip(group.rows, group.boxes, strict=True))
    others = [row for row in boxes if row != watched.row]
    marked = boxes if group is not None and group.kind is GroupKind.PART else {}
    return {
        "watched": watched,
        "picture": _shown(probe_of(picked.rows, watched.row), LARGE, marked.get(watched.row)),
        "fellows": [_shown(probe_of(picked.rows, row), SMALL, marked.get(row)) for row in others[:FELLOWS]],
        "more": max(0, len(others) - FELLOWS),
    }


def _shown(probe: Probe, side: int, box: Box | None = None) -> dict[str, Any]:
    """A picture on the page; ``box``, in fractions, is marked, in per cent: left, top, width, height."""
    picture = picture_of(probe)
    uri = None if picture is None else _data_uri(picture, side)
    if box is not None:
        left, top, right, bottom = (100 * edge for edge in box)
        box = left, top, right - left, bottom - top
    return {"name": probe.name, "uri": uri, "caption": probe.prompt, "box": box}


def _data_uri(picture: Image.Image, side: int) -> str:
    """A small JPEG of the middle square."""
    buffer = io.BytesIO()
    square(picture, side).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@cache
def _templates() -> Environment:
    """The page's templates; everything that a training set says is escaped."""
    loader = PackageLoader("memwatch.picking")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["counted"] = counted
    environment.globals["style"] = Markup(loader.get_source(environment, "pick.css")[0])  # our own file
    return environment
