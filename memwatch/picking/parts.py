"""Shared parts: what otherwise different pictures of a set have in common, at the same place or moved."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from memwatch.picking.duplicates import difference
from memwatch.picking.grouping import by_label, components
from memwatch.picking.hashes import square
from memwatch.picking.same_place import (
    FEWEST,
    MORE,
    Box,
    Part,
    at_same_place,
    box_of,
    inside,
    shared_area,
    shared_regions,
)
from memwatch.picking.training_set import RowError, TrainingSet

SAMPLE = 8192  # different pictures that parts at the same place are searched in, at most
FIRST = (256, 2048)  # how many are searched before, where there are four times as many
MOVED_SAMPLE = 1024  # different pictures that moved parts are searched in, at most
MOVED_CELLS = 32  # per side, of the masks of moved parts
MARGIN = 2 / 32  # of a picture, round a part, that is taken to be its own when it is erased
OVERLAP = 0.5  # of two regions of one row (intersection over union), from which they are the same
INSIDE = 0.5  # share of the smaller of two boxes that lies in the other, from which they may be the same
LEADERS = 512  # regions of one row that are compared with each other at once
FEWEST_MOVED = 4  # different pictures with a part at any place, where there is more room for chance than at one


@cache
def has_opencv() -> bool:
    """Whether OpenCV, which finds moved parts, can be imported."""
    try:
        import_module("cv2")
    except ImportError:  # it is not there, or a library of the system that it needs
        return False
    return True


def shared_parts(thumbnails: np.ndarray, rows: TrainingSet, duplicates: Sequence[Sequence[int]]) -> list[Part]:
    """Parts of a set, largest first; near-duplicates of a row with a part have it as well.

    Parts are searched in a sample (``SAMPLE`` different pictures, ``MOVED_SAMPLE`` for moved parts), and then looked
    for in all others. They must be on ``FEWEST`` of the sample: of 100,000 pictures, a part at the same place is found
    with a probability of 95 % if 76 show it, and seldom if 10 do.

    Args:
        thumbnails: ``(n, cells, cells, 3)`` uint8; all 0 where a picture cannot be read.
        rows: read again for moved parts, where OpenCV is there.
        duplicates: groups of rows that show the same picture.
    """
    others = {group[0]: group[1:] for group in duplicates}
    kept = np.setdiff1d(np.arange(len(thumbnails)), [row for some in others.values() for row in some])
    found = _joined(_at_same_place(thumbnails, kept), _moved(rows, kept) if has_opencv() else [])
    for part in found:
        for row in list(part):
            part |= {other: _box_in(thumbnails, row, other, part[row]) for other in others.get(row, ())}
    return _sorted(found)


def _sample(kept: np.ndarray, number: int) -> np.ndarray:
    """So many rows at most, rising, always the same; a larger sample holds the smaller ones."""
    return np.sort(np.random.default_rng(len(kept)).permutation(kept)[:number])


def _at_same_place(thumbnails: np.ndarray, kept: np.ndarray) -> list[Part]:
    """Parts of different pictures at the same place.

    What was found in few is erased before more are searched: what very many share would take very long.
    """
    found, fewest = list[Part](), 0.0
    for size in (*(first for first in FIRST if 4 * first < len(kept)), SAMPLE):
        drawn = _sample(kept, size)
        found = at_same_place(found, thumbnails, drawn, fewest)
        some, rng = thumbnails[drawn], np.random.default_rng(len(drawn))
        for row, box in (known for part in found for known in part.items()):
            left, top, right, bottom = box
            cells = inside((left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN), some.shape[1])
            some[np.searchsorted(drawn, row)][cells] = rng.integers(0, 256, (cells.sum(), 3), dtype=np.uint8)
        a, b, masks, chance = shared_regions(some)
        fewest = MORE * chance
        found += at_same_place(parts_of(drawn[a], drawn[b], masks, masks, FEWEST), thumbnails, drawn, fewest)
    return _sorted(at_same_place(found, thumbnails, kept, fewest))


def _moved(rows: TrainingSet, kept: np.ndarray) -> list[Part]:
    """Parts of different pictures at any place. The sample and its keypoints are held meanwhile: 0.7 GB."""
    from memwatch.picking.moved import SIDE, add_moved, moved_boxes

    def pictures_of(some: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for row in some.tolist():
            with suppress(RowError):
                yield row, np.asarray(square(rows.image(row), SIDE))

    drawn = _sample(kept, MOVED_SAMPLE)
    known = dict(pictures_of(drawn))
    if len(known) < FEWEST_MOVED or not (pairs := moved_boxes(known)):
        return []
    a, b, in_a, in_b = zip(*pairs, strict=True)
    masks_a, masks_b = (np.array([inside(box, MOVED_CELLS) for box in boxes]) for boxes in (in_a, in_b))
    found = parts_of(np.array(a), np.array(b), masks_a, masks_b, FEWEST_MOVED)
    if found:
        add_moved(found, known, pictures_of(np.setdiff1d(kept, drawn)))
    return _sorted(found)


def parts_of(a: np.ndarray, b: np.ndarray, masks_a: np.ndarray, masks_b: np.ndarray, fewest: int) -> list[Part]:
    """Parts that connect ``fewest`` rows or more by pairs of rows that share a region, largest first.

    Regions of one row that overlap are one; so a picture with a logo and a frame is in two parts. Rows are ``(k,)``,
    masks of where in each the region lies ``(k, cells, cells)``.
    """
    rows, masks = np.concatenate([a, b]), np.concatenate([masks_a, masks_b])
    nodes, number = np.full(len(rows), -1, dtype=np.int64), 0  # regions of one row that overlap have one number
    for rest in by_label(rows):
        while len(rest):
            some = masks[rest[:LEADERS]]
            leader = (_overlap(some, some) >= OVERLAP).sum(1).argmax()  # it overlaps most others
            same = _overlap(masks[rest], some[leader : leader + 1])[:, 0] >= OVERLAP
            nodes[rest[same]] = number
            rest, number = rest[~same], number + 1
    found = []
    for of_part in by_label(components(number, nodes[: len(a)], nodes[len(a) :])[nodes]):
        regions = [of_part[of] for of in by_label(rows[of_part])]  # of each row
        if len(regions) >= fewest:
            count = {int(rows[of[0]]): masks[of].sum(0) for of in regions}
            found.append({row: box_of(often >= often.max() / 2) for row, often in count.items()})
    return _sorted(found)


def _overlap(a: np.ndarray, b: np.ndarray) -> Any:
    """Intersection over union of every mask of ``a`` with every one of ``b``, none of them empty."""
    a, b = (masks.reshape(len(masks), -1).astype(np.float32) for masks in (a, b))
    shared = a @ b.T
    return shared / (a.sum(1)[:, None] + b.sum(1) - shared)


def _sorted(parts: Iterable[Part]) -> list[Part]:
    return sorted((dict(sorted(part.items())) for part in parts), key=lambda part: (-len(part), tuple(part)))


def _joined(fixed: Sequence[Part], moved: Sequence[Part]) -> list[Part]:
    """All parts, each once: what moves adds the rows where it lies elsewhere to what does not."""
    found, index = list(fixed), defaultdict[int, list[tuple[int, Box]]](list)
    for i, part in enumerate(fixed):
        for row, box in part.items():
            index[row].append((i, box))
    for part in moved:
        shared = Counter(i for row in part for i, box in index[row] if shared_area(part[row], box) >= INSIDE)
        home, number = (shared.most_common(1) or [(0, 0)])[0]
        if number >= max(2, len(part) / 2):  # the same, in most of its rows
            found[home] = part | found[home]
        else:
            found.append(part)
    return found


def _box_in(thumbnails: np.ndarray, row: int, other: int, box: Box) -> Box:
    """Where a box of a picture lies in a near-duplicate, which may be mirrored."""
    x, y = thumbnails[row][None], thumbnails[other][None]
    is_mirrored = difference(x[:, :, ::-1], y)[0] < difference(x, y)[0]
    return (1 - box[2], box[1], 1 - box[0], box[3]) if is_mirrored else box
