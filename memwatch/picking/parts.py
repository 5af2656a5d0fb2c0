"""Shared parts: what otherwise different pictures of a set have in common, at the same place or moved."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib import import_module

import numpy as np

from memwatch.picking.duplicates import difference
from memwatch.picking.grouping import by_label, components
from memwatch.picking.hashes import THREADS, cores, square
from memwatch.picking.same_place import Box, Part, at_same_place, box_of, inside, shared_area, shared_regions
from memwatch.picking.training_set import RowError, TrainingSet

SAMPLE = 8192  # different pictures that parts at the same place are searched in, at most
FIRST = (256, 2048)  # how many are searched before, where there are four times as many
MOVED_SAMPLE = 1024  # different pictures that moved parts are searched in, at most
MOVED_CELLS = 32  # per side, of the masks of moved parts
MARGIN = 2 / 32  # of a picture, round a part, that is taken to be its own when it is erased
OVERLAP = 0.5  # of two regions of one row (intersection over union), from which they are the same
INSIDE = 0.5  # share of the smaller of two boxes that lies in the other, from which they may be the same
LEADERS = 512  # regions of one row that are compared with each other at once
FEWEST = 3  # different pictures with a part at the same place; two agree by chance too often
FEWEST_MOVED = 4  # the same at any place, where there is more room for chance


@cache
def has_opencv() -> bool:
    """Whether OpenCV, which finds moved parts, can be imported."""
    try:
        import_module("cv2")
    except ImportError:  # it is not there, or a library of the system that it needs
        return False
    return True


def shared_parts(thumbnails: np.ndarray, rows: TrainingSet, duplicates: Sequence[Sequence[int]]) -> list[Part]:
    """Parts of a set, largest first.

    Of near-duplicates only the first is looked at; the others are in its parts as well.

    Of more than ``SAMPLE`` different pictures so many are drawn, always the same; of ``MOVED_SAMPLE`` for moved parts.
    Parts are searched in these, and then looked for in all the others. A part must be on ``FEWEST`` of those that are
    drawn, so that rare ones can be missed: of 100,000 pictures, a part at the same place is found with a probability of
    95 % if 76 show it, and seldom if 10 do.

    Args:
        thumbnails: ``(n, cells, cells, 3)`` uint8; all 0 where a picture cannot be read.
        rows: read again for moved parts, where OpenCV is there.
        duplicates: groups of rows that show the same picture.
    """
    others = {group[0]: group[1:] for group in duplicates}
    left_out = np.array([row for some in others.values() for row in some], dtype=np.int64)
    kept = np.setdiff1d(np.arange(len(thumbnails)), left_out)
    found = _joined(_at_same_place(thumbnails, kept), _moved(rows, kept) if has_opencv() else [])
    for part in found:
        for row in list(part):
            part |= {other: _box_in(thumbnails, row, other, part[row]) for other in others.get(row, ())}
    return _sorted(found)


def _at_same_place(thumbnails: np.ndarray, kept: np.ndarray) -> list[Part]:
    """Parts of different pictures at the same place.

    What was found in few is erased in more before these are searched: what very many share would take very long.
    """
    order = np.random.default_rng(len(kept)).permutation(kept)
    found, seen = list[Part](), kept[:0]
    for size in (*(first for first in FIRST if 4 * first < len(kept)), SAMPLE):
        drawn = np.sort(order[:size])
        found = at_same_place(found, thumbnails, np.setdiff1d(drawn, seen))
        some = thumbnails[drawn]
        _erase(drawn, found, some)
        a, b, masks = shared_regions(some)
        new = [part for part in parts_of(a, b, masks, masks) if len(part) >= FEWEST]
        found += [{int(drawn[i]): box for i, box in part.items()} for part in new]
        seen = drawn
    return _sorted(at_same_place(found, thumbnails, np.setdiff1d(kept, seen)))


def _erase(rows: np.ndarray, parts: Sequence[Part], thumbnails: np.ndarray) -> None:
    """Fill with noise where ``rows`` show parts, so that they share nothing there any more.

    Args:
        thumbnails: ``(k, cells, cells, 3)`` uint8, of ``rows``; changed.
    """
    number, rng = {int(row): i for i, row in enumerate(rows)}, np.random.default_rng(len(rows))
    for part in parts:
        for row, (left, top, right, bottom) in part.items():
            if (i := number.get(row)) is not None:
                cells = inside((left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN), thumbnails.shape[1])
                thumbnails[i][cells] = rng.integers(0, 256, (cells.sum(), 3), dtype=np.uint8)


def _moved(rows: TrainingSet, kept: np.ndarray) -> list[Part]:
    """Parts of different pictures at any place.

    The pictures of ``MOVED_SAMPLE`` rows, and a thousand keypoints of each, are held meanwhile: 0.7 GB.
    """
    from memwatch.picking.moved import SIDE, add_moved, moved_boxes, points_of

    def pictures_of(some: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for row in some.tolist():
            with suppress(RowError):
                yield row, np.asarray(square(rows.image(row), SIDE))

    drawn = np.sort(np.random.default_rng(len(kept)).permutation(kept)[:MOVED_SAMPLE])
    known = dict(pictures_of(drawn))
    if len(known) < FEWEST_MOVED:
        return []
    which, pictures = np.array(list(known)), list(known.values())
    with ThreadPoolExecutor(min(cores(), THREADS)) as threads:
        points = list(threads.map(points_of, pictures, range(len(pictures))))
    if not (pairs := moved_boxes(pictures, points)):
        return []
    a, b, in_a, in_b = zip(*pairs, strict=True)
    masks = (np.array([inside(box, MOVED_CELLS) for box in boxes]) for boxes in (in_a, in_b))
    found = [part for part in parts_of(which[list(a)], which[list(b)], *masks) if len(part) >= FEWEST_MOVED]
    if found:
        add_moved(found, known, pictures_of(np.setdiff1d(kept, drawn)))
    return _sorted(found)


def parts_of(a: np.ndarray, b: np.ndarray, masks_a: np.ndarray, masks_b: np.ndarray) -> list[Part]:
    """Parts that connect rows by pairs that share a region.

    Regions of one row that overlap are one; so a picture with a logo and a frame is in two parts.

    Args:
        a, b: rows, ``(k,)``.
        masks_a, masks_b: where in each, ``(k, cells, cells)`` bool.
    """
    rows, masks = np.concatenate([a, b]), np.concatenate([masks_a, masks_b])
    nodes = _nodes(rows, masks)
    labels = components(int(nodes.max(initial=-1)) + 1, nodes[: len(a)], nodes[len(a) :])[nodes]
    found = []
    for of_part in by_label(labels):
        by_row = {int(rows[of_part[of[0]]]): of_part[of] for of in by_label(rows[of_part])}
        if len(by_row) > 1:
            found.append({row: box_of(_most(masks[of])) for row, of in by_row.items()})
    return _sorted(found)


def _most(masks: np.ndarray) -> np.ndarray:
    """Cells that are in many of the regions of a row, compared with those that are in most."""
    count = masks.sum(0)
    result: np.ndarray = count >= count.max() / 2
    return result


def _sorted(parts: Iterable[Part]) -> list[Part]:
    return sorted((dict(sorted(part.items())) for part in parts), key=lambda part: (-len(part), tuple(part)))


def _joined(fixed: Sequence[Part], moved: Sequence[Part]) -> list[Part]:
    """All parts, each once: what moves adds the rows where it lies elsewhere to what does not."""
    found, index = list(fixed), defaultdict[int, list[tuple[int, Box]]](list)
    for i, part in enumerate(fixed):
        for row, box in part.items():
            index[row].append((i, box))
    for part in moved:
        shared = Counter[int]()
        for row, box in part.items():
            shared.update(number for number, other in index.get(row, ()) if shared_area(box, other) >= INSIDE)
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


def _nodes(rows: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """A number for each region; regions of one row that overlap have the same."""
    nodes, number = np.full(len(rows), -1, dtype=np.int64), 0
    for rest in by_label(rows):
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
