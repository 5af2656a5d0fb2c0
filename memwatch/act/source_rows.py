"""Source rows: the training rows that a finding is about."""

from __future__ import annotations

from memwatch.picking.picked import Picked
from memwatch.picking.rows import TrainingSet
from memwatch.picking.survey import Box, Group, GroupKind
from memwatch.picking.text import counted

SAME_PLACE = 0.5  # least overlap of part and region, as a share of the smaller one


def rows_behind(picked: Picked | None, row: int | None, region: Box | None) -> tuple[tuple[int, ...], str]:
    """The training rows behind a finding, rising, and what they are in words.

    These are the row itself, all its near-duplicates, and the rows of a shared part that the finding is about: at least
    half of the region lies in the part, or half of the part in the region.

    Args:
        row: of the probe. region: the box that decides, in fractions of the picture.
    """
    if picked is None or row is None or not 0 <= row < picked.survey.size:
        return (), "not picked from the training set"
    rows, words = {row}, []
    for group in picked.groups_with(row):
        if group.kind is GroupKind.DUPLICATES:
            words.append(counted(len(group.rows), "near-duplicate"))
        elif region is not None and is_about(region, group, row):
            words.append(f"{counted(len(group.rows), 'row')} that share the part")
        else:
            continue
        rows |= set(group.rows)
    return tuple(sorted(rows)), ", ".join(words) or "this row alone"


def is_about(region: Box, group: Group, row: int) -> bool:
    """Whether a region of a row's picture is about the part that the row shares."""
    boxes = [box for member, box in zip(group.rows, group.boxes, strict=True) if member == row]
    return any(_overlap(region, box) >= SAME_PLACE for box in boxes)


def _overlap(a: Box, b: Box) -> float:
    """The area that two boxes share, as a share of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller if smaller > 0 else 0.0


def file_name(rows: TrainingSet, row: int) -> str:
    """How a row is named in ``flagged.jsonl``."""
    file = rows.file(row) if rows.folder is None else None
    return rows.name(row) if file is None else str(file)
