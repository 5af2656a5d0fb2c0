"""Shared parts: what otherwise different pictures of a set have in common, at the same place or moved."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from memwatch.picking.boxes import Box, box_of
from memwatch.picking.duplicates import components, difference
from memwatch.picking.elsewhere import Boxes, at_any_place, at_same_place, erase
from memwatch.picking.moved import points_of, shared_moved
from memwatch.picking.same_place import shared_regions

SAMPLE = 8192  # different pictures that parts are searched in, at most
FIRST = (256, 2048)  # how many are searched before, where there are four times as many
OVERLAP = 0.5  # of two regions of one row (intersection over union), from which they are the same
INSIDE = 0.5  # share of the smaller of two boxes that lies in the other, from which they may be the same
LEADERS = 512  # regions of one row that are compared with each other at once
FEWEST = 3  # different pictures with a part at the same place; two agree by chance too often
FEWEST_MOVED = 4  # the same at any place, where there is more room for chance

_Index = defaultdict[int, list[tuple[int, Box]]]  # by row the parts there, by number, with their boxes


@dataclass(frozen=True)
class Part:
    """Something that two or more pictures show.

    Attributes:
        rows: in order.
        boxes: where in each; left, top, right, bottom as fractions of the middle square.
    """

    rows: tuple[int, ...]
    boxes: tuple[Box, ...]


def shared_parts(
    thumbnails: np.ndarray, places: np.ndarray, colours: np.ndarray, duplicates: Sequence[Sequence[int]]
) -> list[Part]:
    """Parts of a set, largest first.

    Of near-duplicates only the first is looked at; the others are in its parts as well.

    Of more than ``SAMPLE`` different pictures so many are drawn, always the same. Parts are searched in these, and then
    looked for in all the others. A part must be on ``FEWEST`` of those that are drawn, so that rare ones can be missed:
    of 100,000 pictures, a part at the same place is found with a probability of 95 % if 76 show it, and seldom if 10
    do; a part that moves, if 94 show it, as far as its keypoints are found.

    Args:
        thumbnails: ``(n, cells, cells, 3)`` uint8; all 0 where a picture cannot be read.
        places: ``(n, MOST, 2)`` uint8, see ``keypoints``.
        colours: ``(n, MOST, 4, 4, 3)`` uint8.
        duplicates: groups of rows that show the same picture.
    """
    others = {group[0]: group[1:] for group in duplicates}
    left_out = np.array([row for rows in others.values() for row in rows], dtype=np.int64)
    kept = np.setdiff1d(np.arange(len(thumbnails)), left_out)
    found = []
    for part in _joined(*_found(thumbnails, places, colours, kept)):
        boxes = dict(zip(part.rows, part.boxes, strict=True))
        for row in list(boxes):
            boxes |= {other: _box_in(thumbnails, row, other, boxes[row]) for other in others.get(row, ())}
        found.append(_part(boxes))
    return _sorted(found)


def _found(
    thumbnails: np.ndarray, places: np.ndarray, colours: np.ndarray, kept: np.ndarray
) -> tuple[list[Part], list[Part]]:
    """Parts of different pictures: those at the same place, and those that move.

    What was found in few is erased in more before these are searched: what very many share would take very long.
    """
    order = np.random.default_rng(len(kept)).permutation(kept)
    fixed, moved = list[Boxes](), list[Boxes]()
    seen = kept[:0]
    for size in (*(first for first in FIRST if 4 * first < len(kept)), SAMPLE):
        drawn = np.sort(order[:size])
        new = np.setdiff1d(drawn, seen)
        fixed = at_same_place(fixed, thumbnails, new)
        moved = at_any_place(moved, thumbnails, places, colours, new)
        some, of = thumbnails[drawn], places[drawn]
        erase(drawn, [*fixed, *moved], some, of)
        more_fixed, more_moved = _searched(some, of, colours[drawn])
        fixed += [_by_row(part, drawn) for part in more_fixed]
        moved += [_by_row(part, drawn) for part in more_moved]
        seen = drawn
    rest = np.setdiff1d(kept, seen)
    fixed = at_same_place(fixed, thumbnails, rest)
    moved = at_any_place(moved, thumbnails, places, colours, rest)
    return _sorted(map(_part, fixed)), _merged(_sorted(map(_part, moved)))


def _by_row(part: Part, rows: np.ndarray) -> Boxes:
    return dict(zip(rows[list(part.rows)].tolist(), part.boxes, strict=True))


def _searched(thumbnails: np.ndarray, places: np.ndarray, colours: np.ndarray) -> tuple[list[Part], list[Part]]:
    """Parts at the same place, and parts that move."""
    regions, moves = shared_regions(thumbnails), shared_moved(thumbnails, points_of(places, colours))
    fixed = parts_of(regions.a, regions.b, regions.masks, regions.masks)
    moved = parts_of(moves.a, moves.b, *moves.masks(thumbnails.shape[1]))
    fixed = [part for part in fixed if len(part.rows) >= FEWEST]
    return fixed, [part for part in _merged(moved) if len(part.rows) >= FEWEST_MOVED]


def parts_of(a: np.ndarray, b: np.ndarray, masks_a: np.ndarray, masks_b: np.ndarray) -> list[Part]:
    """Parts that hang together by pairs of rows that share a region.

    Regions of one row that overlap are one; so a picture with a logo and a frame is in two parts.

    Args:
        a: rows, ``(k,)``.
        b: rows, ``(k,)``.
        masks_a: where in ``a``, ``(k, cells, cells)`` bool.
        masks_b: where in ``b``.
    """
    rows, masks = np.concatenate([a, b]), np.concatenate([masks_a, masks_b])
    nodes = _nodes(rows, masks)
    labels = components(int(nodes.max(initial=-1)) + 1, nodes[: len(a)], nodes[len(a) :])[nodes]
    found = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        by_row: dict[int, list[int]] = defaultdict(list)
        for i in members:
            by_row[int(rows[i])].append(int(i))
        if len(by_row) > 1:
            boxes = {row: box_of(_most(masks[of])) for row, of in sorted(by_row.items())}
            found.append(_part(boxes))
    return _sorted(found)


def _most(masks: np.ndarray) -> np.ndarray:
    """Cells that are in many of the regions of a row, compared with those that are in most."""
    count = masks.sum(0)
    result: np.ndarray = count >= count.max() / 2
    return result


def _part(boxes: dict[int, Box]) -> Part:
    rows = sorted(boxes)
    return Part(tuple(rows), tuple(boxes[row] for row in rows))


def _sorted(parts: Iterable[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: (-len(part.rows), part.rows))


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Parts without those that are pieces of another one: of a logo, pairs of pictures agree on different pieces."""
    pairs, earlier = [], _Index(list)
    for i, part in enumerate(parts):
        if (home := _home(part, earlier)) is not None:
            pairs.append((i, home))
        _add(earlier, i, part)
    a, b = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    labels = components(len(parts), a, b)
    found = []
    for label in np.unique(labels):
        boxes: dict[int, Box] = {}
        for i in np.flatnonzero(labels == label)[::-1]:  # the largest part's boxes count
            boxes |= dict(zip(parts[i].rows, parts[i].boxes, strict=True))
        found.append(_part(boxes))
    return _sorted(found)


def _joined(fixed: Sequence[Part], moved: Sequence[Part]) -> list[Part]:
    """All parts, each once: what moves adds the rows where it lies elsewhere to what does not."""
    found, index = list(fixed), _Index(list)
    for i, part in enumerate(fixed):
        _add(index, i, part)
    for part in moved:
        home = _home(part, index)
        if home is None:
            found.append(part)
            continue
        boxes = dict(zip(part.rows, part.boxes, strict=True))
        found[home] = _part(boxes | dict(zip(found[home].rows, found[home].boxes, strict=True)))
    return found


def _add(index: _Index, number: int, part: Part) -> None:
    for row, box in zip(part.rows, part.boxes, strict=True):
        index[row].append((number, box))


def _home(part: Part, others: _Index) -> int | None:
    """The number of the part that ``part`` overlaps in most rows, if those are half of its rows or more."""
    shared = Counter[int]()
    for row, box in zip(part.rows, part.boxes, strict=True):
        shared.update(number for number, other in others.get(row, ()) if _inside(box, other) >= INSIDE)
    best = shared.most_common(1)
    return best[0][0] if best and best[0][1] >= max(2, len(part.rows) / 2) else None


def _inside(a: Box, b: Box) -> float:
    """How much of the smaller of two boxes lies in the other."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller


def _box_in(thumbnails: np.ndarray, row: int, other: int, box: Box) -> Box:
    """Where a box of a picture lies in a near-duplicate, which may be mirrored."""
    x, y = thumbnails[row][None], thumbnails[other][None]
    is_mirrored = difference(x[:, :, ::-1], y)[0] < difference(x, y)[0]
    return (1 - box[2], box[1], 1 - box[0], box[3]) if is_mirrored else box


def _nodes(rows: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """A number for each region; regions of one row that overlap have the same."""
    nodes, number = np.full(len(rows), -1, dtype=np.int64), 0
    order = np.argsort(rows, kind="stable")
    for of in np.split(order, np.flatnonzero(np.diff(rows[order])) + 1) if len(order) else []:
        rest = of
        while len(rest):
            leader = _most_typical(masks[rest[:LEADERS]])
            same = _overlap(masks[rest], masks[rest[leader]]) >= OVERLAP
            nodes[rest[same]] = number
            rest, number = rest[~same], number + 1
    return nodes


def _most_typical(masks: np.ndarray) -> int:
    """The one that overlaps most others."""
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    shared = flat @ flat.T
    area = np.diag(shared)
    return int(((shared / (area[:, None] + area - shared)) >= OVERLAP).sum(1).argmax())


def _overlap(masks: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of each with another one."""
    shared, either = (masks & other).sum((1, 2)), (masks | other).sum((1, 2))
    result: np.ndarray = shared / np.maximum(either, 1)
    return result
