"""The page of a choice: one HTML file, which loads nothing, shows what is watched, why, and what is not."""

from __future__ import annotations

import base64
import io
from collections import Counter
from contextlib import suppress
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from memwatch.measure.captions import ProbeError
from memwatch.measure.images import read_image
from memwatch.measure.probes import Probe
from memwatch.messages import counted, listed
from memwatch.picking.hashes import square
from memwatch.picking.mix import PickedRow, Why, slots
from memwatch.picking.picked import Picked
from memwatch.picking.same_place import Box
from memwatch.picking.survey import GroupKind

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
    """The page as text. Everything that a training set says is escaped."""
    rows, unreadable = picked.rows, picked.survey.unreadable
    groups, others = slots(picked.budget)
    meant = dict.fromkeys(map(Why, GroupKind), f"{groups} together") | {why: str(n) for why, n in others.items()}
    number = Counter(watched.why for watched in picked.watched)
    templates = PackageLoader("memwatch.picking")
    page = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return page.get_template(
        "pick.html"
    ).render(
        counted=counted,
        style=Markup(templates.get_source(page, "pick.css")[0]),  # our own file
        picked=picked,
        source=rows.folder or type(rows.source).__name__,
        mix=[(str(why), meant[why], number[why], MEANS[why]) for why in Why],
        cards=[_card(picked, watched) for watched in picked.watched],
        controls=[_shown(probe, SMALL) for probe in picked.controls()],
        without=[
            (group.kind, len(group.rows), listed([rows.name(row) for row in group.rows]))
            for group in picked.unwatched_groups[:LISTED]
        ],
        unreadable=[(rows.name(row), why) for row, why in list(unreadable.items())[:LISTED]],
        listed=LISTED,
    )


def _card(picked: Picked, watched: PickedRow) -> dict[str, Any]:
    """A picked row with the first few others of its group."""
    rows, group = picked.rows, watched.group
    boxes = {} if group is None else dict(zip(group.rows, group.boxes, strict=True))
    others = [row for row in boxes if row != watched.row]
    marked = boxes if group is not None and group.kind is GroupKind.PART else {}
    return {
        "watched": watched,
        "picture": _shown(rows.probe(watched.row), LARGE, marked.get(watched.row)),
        "fellows": [_shown(rows.probe(row), SMALL, marked.get(row)) for row in others[:FELLOWS]],
        "more": max(0, len(others) - FELLOWS),
    }


def _shown(probe: Probe, side: int, box: Box | None = None) -> dict[str, Any]:
    """A picture as a small JPEG of its middle square; ``box`` is marked, in per cent: left, top, width, height."""
    shown: dict[str, Any] = {"name": probe.name, "uri": None, "caption": probe.prompt, "box": None}
    with suppress(ProbeError):  # it cannot be read any more
        buffer = io.BytesIO()
        square(read_image(probe), side).save(buffer, "JPEG", quality=80)
        shown["uri"] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    if box is not None:
        left, top, right, bottom = (100 * edge for edge in box)
        shown["box"] = left, top, right - left, bottom - top
    return shown
