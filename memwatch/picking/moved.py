"""Moved parts: a logo or a sticker that otherwise different pictures show at different places, at one scale.

OpenCV's ORB keypoints that are almost equal bring pairs of pictures together, and RANSAC tells at which offset. The part
is where both pictures are equal at that offset, around these keypoints, and not flat. Where almost the whole pictures
are, the two are views of one photograph, and no part is shared. OpenCV comes with ``memwatch[parts]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from memwatch.picking.same_place import Box, Part, checked, spaced

SIDE = 256  # pixels: pictures are compared in this size
KEYPOINTS = 1000  # per picture at most; a logo must not lose its own to the rest
FAINT = 8  # levels of 0..255 by which a keypoint must differ from the pixels around it
TABLES, BITS, FOLLOWING = 6, 11, 5  # of the keys by which almost equal keypoints are found, see ``_pairs``
APART = 50  # bits of 256 by which almost equal keypoints differ
TURNED = 12.0  # degrees by which they may be turned
VOTES = 3  # almost equal keypoints at one offset
MIN_POINTS = 4  # keypoints in the part
LEVELS = 14  # by which equal pixels may differ: compression, a shift by half a pixel
BLUR, TEXTURE, FLAT = 5, 25, 40  # pixels that are averaged; pixels within which levels must vary by so much
FILLED = 0.6  # share of its box that a part covers
SMALLEST, LARGEST = 24, 0.5  # pixels of the box's shorter side; share of the picture
EXAMPLES = 4  # rows with a part that its keypoints are taken from

HAS_OPENCV = find_spec("cv2") is not None
BITS_OF = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # that are set in a byte


class Points(NamedTuple):
    """Keypoints of one or more pictures."""

    picture: np.ndarray  # the number of the picture that each lies in
    at: np.ndarray  # x and y, (n, 2) float32
    angle: np.ndarray  # degrees
    octave: np.ndarray
    bits: np.ndarray  # descriptors, (n, 32) uint8

    def of(self, which: np.ndarray) -> Points:
        return Points(*(values[which] for values in self))


def points_of(picture: np.ndarray, number: int = 0) -> Points:
    """The keypoints of RGB pixels ``(SIDE, SIDE, 3)``."""
    import cv2

    orb = cv2.ORB_create(nfeatures=KEYPOINTS, nlevels=4, fastThreshold=FAINT)
    points, bits = orb.detectAndCompute(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), None)
    at = np.array([point.pt for point in points], np.float32).reshape(-1, 2)
    angle = np.array([point.angle for point in points], np.float32)
    octave = np.array([point.octave for point in points], np.int64)
    bits = np.zeros((0, 32), np.uint8) if bits is None else bits
    return Points(np.full(len(at), number), at, angle, octave, bits)


def moved_boxes(pictures: Sequence[np.ndarray], points: Sequence[Points]) -> list[tuple[int, int, Box, Box]]:
    """Pairs of pictures that share a part, by number, and where it lies in each.

    In a large group of pictures that share a part not every pair is there, but the pairs connect most of them.
    """
    every = Points(*(np.concatenate(values) for values in zip(*points, strict=True)))
    p, q = _pairs(every)
    code = every.picture[p] * len(pictures) + every.picture[q]
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    found = []
    for some in np.split(order, starts[1:]):
        if len(some) >= VOTES:
            a, b = int(every.picture[p[some[0]]]), int(every.picture[q[some[0]]])
            regions = _regions(pictures[a], pictures[b], every.at[p[some]], every.at[q[some]])
            found += [(a, b, *boxes) for boxes in regions]
    return found


def add_moved(parts: Sequence[Part], known: dict[int, np.ndarray], others: Iterable[tuple[int, np.ndarray]]) -> None:
    """Add to each part the rows that show it anywhere.

    Args:
        known: by row, pictures of rows that show the parts. others: rows with pictures in which they are looked for.
    """
    import cv2

    examples: list[tuple[Part, np.ndarray, Points]] = []
    for part in parts:
        for row in spaced(sorted(set(part) & set(known)), EXAMPLES):
            points, box = points_of(known[row]), np.array(part[row]) * SIDE
            examples.append((part, known[row], points.of(((points.at >= box[:2]) & (points.at < box[2:])).all(1))))
    for row, picture in others:
        points, nearest = points_of(picture), cv2.BFMatcher(cv2.NORM_HAMMING)
        for part, shown, own in examples:
            if row not in part and len(own.at) and len(points.at):
                matches = nearest.match(own.bits, points.bits)
                pairs = np.array([(m.queryIdx, m.trainIdx) for m in matches if m.distance <= APART], int).reshape(-1, 2)
                for _, box in _regions(shown, picture, own.at[pairs[:, 0]], points.at[pairs[:, 1]]):
                    part.setdefault(row, box)


def _pairs(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Almost equal keypoints of different pictures, that of the larger number first.

    Each of ``TABLES`` sorts all keypoints by a key (``BITS`` of their bits, scale and angle), and by other bits among
    equal keys. Each keypoint is then compared with the ``FOLLOWING`` ones.
    """
    size, codes = len(points.at), np.zeros(0, np.int64)

    def near(a: np.ndarray, b: np.ndarray) -> Any:
        turned = np.abs((points.angle[a] - points.angle[b] + 180) % 360 - 180)
        return (BITS_OF[points.bits[a] ^ points.bits[b]].sum(1) <= APART) & (turned <= TURNED)

    for table in range(TABLES):
        rng = np.random.default_rng([table, 5])
        which = rng.permutation(256)[: BITS + 32]
        bits = [(points.bits[:, i // 8] >> (i % 8)) & 1 for i in which]
        key = points.octave * 16 + ((points.angle + rng.random() * 30) // 30).astype(np.int64)
        for bit in bits[:BITS]:
            key = 2 * key + bit
        along = sum(bit.astype(np.int64) << i for i, bit in enumerate(bits[BITS:]))
        order = np.lexsort((along, key))
        for step in range(1, FOLLOWING + 1):
            a, b = order[step:], order[:-step]
            a, b = (side[(key[a] == key[b]) & (points.picture[a] != points.picture[b])] for side in (a, b))
            a, b = checked(a, b, near)
            a, b = np.where(points.picture[a] > points.picture[b], (a, b), (b, a))
            codes = np.append(codes, a * size + b)
        codes = np.unique(codes)
    return codes // max(1, size), codes % max(1, size)


def _regions(x: np.ndarray, y: np.ndarray, p: np.ndarray, q: np.ndarray) -> Iterator[tuple[Box, Box]]:
    """Where two pictures show the same part, two at most, given keypoints ``(k, 2)`` that are almost equal."""
    import cv2

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
                yield _fractions(box, (0, 0)), _fractions(box, offset)
        p, q = p[~good], q[~good]


def _equal_box(x: np.ndarray, y: np.ndarray, points: np.ndarray, offset: np.ndarray) -> tuple[int, ...] | None:
    """Where, in pixels of ``x``, the two are equal and not flat round most of the points; ``None`` for nowhere."""
    import cv2

    left, top = np.maximum(offset, 0)
    right, bottom = np.minimum(SIDE + offset, SIDE)
    mine = np.ascontiguousarray(x[top:bottom, left:right])
    other = np.ascontiguousarray(y[top - offset[1] : bottom - offset[1], left - offset[0] : right - offset[0]])
    apart = cv2.absdiff(*(cv2.blur(values, (BLUR, BLUR)) for values in (mine, other))).max(-1)
    around = np.ones((TEXTURE, TEXTURE), np.uint8)
    varies = (cv2.dilate(mine, around) - cv2.erode(mine, around)).max(-1)
    equal = cv2.erode(((apart <= LEVELS) & (varies >= FLAT)).astype(np.uint8), np.ones((BLUR, BLUR), np.uint8))
    labels = cv2.connectedComponents(equal)[1]
    column, row = np.rint(points - (left, top)).astype(int).clip(0, (right - left - 1, bottom - top - 1)).T
    number = np.bincount(labels[row, column])
    number[0] = 0  # where they are not equal
    if number.max() < MIN_POINTS:
        return None
    rows, columns = np.nonzero(labels == number.argmax())
    width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
    is_part = min(width, height) >= SMALLEST and width * height <= LARGEST * SIDE * SIDE
    if not is_part or len(rows) < FILLED * width * height:
        return None
    return columns.min() + left, rows.min() + top, columns.max() + left + 1, rows.max() + top + 1


def _fractions(box: tuple[int, ...], offset: Any) -> Box:
    """A box of pixels, and the margin that eroding took, as fractions at another place."""
    edges = [float(np.clip(edge + by * (BLUR // 2), 0, SIDE)) for edge, by in zip(box, (-1, -1, 1, 1), strict=True)]
    left, top, right, bottom = (edges[i] - float(offset[i % 2]) for i in range(4))
    return max(0.0, left / SIDE), max(0.0, top / SIDE), min(1.0, right / SIDE), min(1.0, bottom / SIDE)
