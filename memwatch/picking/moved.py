"""Moved parts: a logo or a sticker that otherwise different pictures show at different places, at one scale.

OpenCV's ORB keypoints that are almost equal bring pairs of pictures together, and RANSAC tells at which offset. The
part is where both pictures are equal at that offset, around these keypoints, and not flat; two views of one photograph
are equal over most of the picture, which is no part. OpenCV comes with ``memwatch[parts]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np

from memwatch.picking.grouping import by_label, spaced
from memwatch.picking.hashes import THREADS, cores
from memwatch.picking.same_place import Box, Part, checked

SIDE = 256  # pixels: pictures are compared in this size
KEYPOINTS = 1000  # per picture at most; a logo must not lose its own to the rest
FAINT = 8  # levels of 0..255 by which a keypoint must differ from the pixels around it
TABLES, BITS, FOLLOWING = 6, 11, 5  # of the keys by which almost equal keypoints are found, see ``_pairs``
APART, TURNED = 50, 12.0  # bits of 256 by which almost equal keypoints differ, degrees by which they are turned
VOTES, MIN_POINTS = 3, 4  # almost equal keypoints at one offset; keypoints in the part
LEVELS = 14  # by which equal pixels may differ: compression, a shift by half a pixel
BLUR, TEXTURE, FLAT = 5, 25, 40  # pixels that are averaged; pixels within which levels must vary by so much
FILLED = 0.6  # share of its box that a part covers
SMALLEST, LARGEST = 24, 0.5  # pixels of the box's shorter side; share of the picture
EXAMPLES = 4  # rows with a part that its keypoints are taken from
BITS_OF = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # that are set in a byte


class Points(NamedTuple):
    """Keypoints: of which row's picture, x and y, angle in degrees, octave, and 32 bytes that describe each."""

    row: np.ndarray
    at: np.ndarray
    angle: np.ndarray
    octave: np.ndarray
    bits: np.ndarray


def points_of(picture: np.ndarray, row: int = 0) -> Points:
    """The keypoints of RGB pixels ``(SIDE, SIDE, 3)``."""
    orb = cv2.ORB.create(nfeatures=KEYPOINTS, nlevels=4, fastThreshold=FAINT)
    points, bits = orb.detectAndCompute(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), None)
    at = np.array([point.pt for point in points], np.float32).reshape(-1, 2)
    angle, octave = (np.array([getattr(point, name) for point in points]) for name in ("angle", "octave"))
    bits = np.zeros((0, 32), np.uint8) if bits is None else bits
    return Points(np.full(len(at), row), at, angle, octave.astype(np.int64), bits)


def moved_boxes(pictures: Mapping[int, np.ndarray]) -> list[tuple[int, int, Box, Box]]:
    """Pairs of rows whose pictures share a part, and where it lies in each; in a large group not every pair."""
    with ThreadPoolExecutor(min(cores(), THREADS)) as threads:
        points = list(threads.map(points_of, pictures.values(), pictures))
    every = Points(*(np.concatenate(values) for values in zip(*points, strict=True)))
    p, q = _pairs(every)
    found = []
    for some in by_label(every.row[p] * (max(pictures) + 1) + every.row[q]):
        if len(some) >= VOTES:
            a, b = int(every.row[p[some[0]]]), int(every.row[q[some[0]]])
            regions = _regions(pictures[a], pictures[b], every.at[p[some]], every.at[q[some]])
            found += [(a, b, *boxes) for boxes in regions]
    return found


def add_moved(parts: Sequence[Part], known: dict[int, np.ndarray], others: Iterable[tuple[int, np.ndarray]]) -> None:
    """Add to each part those of the ``others`` that show it anywhere; ``known`` has pictures of rows that do."""
    examples = []
    for part in parts:
        for row in spaced(sorted(set(part) & set(known)), EXAMPLES):
            own, box = points_of(known[row]), np.array(part[row]) * SIDE
            inside = ((own.at >= box[:2]) & (own.at < box[2:])).all(1)
            examples.append((part, known[row], own.at[inside], own.bits[inside]))
    nearest = cv2.BFMatcher(cv2.NORM_HAMMING)
    for row, picture in others:
        points = points_of(picture)
        for part, shown, at, bits in examples:
            if row not in part and len(at) and len(points.at):
                near = [match for match in nearest.match(bits, points.bits) if match.distance <= APART]
                mine, theirs = [match.queryIdx for match in near], [match.trainIdx for match in near]
                if region := next(_regions(shown, picture, at[mine], points.at[theirs]), None):
                    part[row] = region[1]


def _pairs(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Almost equal keypoints of different pictures, that of the larger number first.

    Keypoints are sorted ``TABLES`` times by a key (``BITS`` of their bits, octave and angle), and by other bits among
    equal keys. Each is compared with the ``FOLLOWING`` ones of its key.
    """
    size, codes = len(points.at), np.zeros(0, np.int64)

    def near(a: np.ndarray, b: np.ndarray) -> Any:
        turned = np.abs((points.angle[a] - points.angle[b] + 180) % 360 - 180)
        return (BITS_OF[points.bits[a] ^ points.bits[b]].sum(1) <= APART) & (turned <= TURNED)

    for table in range(TABLES):
        rng = np.random.default_rng([table, 5])
        bits = [(points.bits[:, i // 8] >> (i % 8)) & 1 for i in rng.permutation(256)[: BITS + 32]]
        key = points.octave * 16 + (points.angle / 30 + rng.random()).astype(np.int64)
        for bit in bits[:BITS]:
            key = 2 * key + bit
        order = np.lexsort((np.packbits(np.stack(bits[BITS:], 1), axis=1).view(np.uint32)[:, 0], key))
        for step in range(1, FOLLOWING + 1):
            a, b = order[step:], order[:-step]
            is_pair = (key[a] == key[b]) & (points.row[a] != points.row[b])
            a, b = checked(a[is_pair], b[is_pair], near)
            a, b = np.where(points.row[a] > points.row[b], (a, b), (b, a))
            codes = np.append(codes, a * size + b)
        codes = np.unique(codes)
    return codes // max(1, size), codes % max(1, size)


def _regions(x: np.ndarray, y: np.ndarray, p: np.ndarray, q: np.ndarray) -> Iterator[tuple[Box, Box]]:
    """Where two pictures show the same part, two at most, given keypoints ``(k, 2)`` that are almost equal."""
    for _ in range(2):
        if len(p) < VOTES:
            return
        change, agree = cv2.estimateAffinePartial2D(p, q, method=cv2.RANSAC, ransacReprojThreshold=2.0, maxIters=200)
        if change is None:
            return
        good = agree.ravel().astype(bool)
        if good.sum() >= VOTES and np.abs(change[:, :2] - np.eye(2)).max() <= 0.07:  # one scale, not turned
            offset = np.rint(np.median(p[good] - q[good], axis=0)).astype(int)
            if (box := _equal_box(x, y, p[good], offset)) is not None:
                yield tuple((box / SIDE).tolist()), tuple(((box - np.tile(offset, 2)) / SIDE).tolist())  # type: ignore[misc]
        p, q = p[~good], q[~good]


def _equal_box(x: np.ndarray, y: np.ndarray, points: np.ndarray, offset: np.ndarray) -> np.ndarray | None:
    """Where, in pixels of ``x``, the two are equal and not flat round most of the points; ``None`` for nowhere."""
    (left, top), (right, bottom) = np.maximum(offset, 0), np.minimum(SIDE + offset, SIDE)
    mine, other = x[top:bottom, left:right], y[top - offset[1] :, left - offset[0] :][: bottom - top, : right - left]
    apart = cv2.absdiff(*(cv2.blur(values, (BLUR, BLUR)) for values in (mine, other))).max(-1)
    around, near = np.ones((TEXTURE, TEXTURE), np.uint8), np.ones((BLUR, BLUR), np.uint8)
    varies = (cv2.dilate(mine, around) - cv2.erode(mine, around)).max(-1)
    labels = cv2.connectedComponents(cv2.erode(((apart <= LEVELS) & (varies >= FLAT)).astype(np.uint8), near))[1]
    column, row = np.rint(points - (left, top)).astype(int).clip(0, (right - left - 1, bottom - top - 1)).T
    number = np.bincount(labels[row, column])
    number[0] = 0  # where they are not equal
    part = np.argwhere(labels == number.argmax())[:, ::-1] + (left, top)
    low, high = part.min(0), part.max(0) + 1
    width, height = high - low
    is_part = min(width, height) >= SMALLEST - BLUR and width * height <= LARGEST * SIDE * SIDE
    if number.max() < MIN_POINTS or not is_part or len(part) < FILLED * width * height:
        return None
    margin = BLUR // 2  # what eroding took; the border of the overlap stays the border
    return np.concatenate([np.maximum(low - margin, (left, top)), np.minimum(high + margin, (right, bottom))])
