"""The survey of a training set: duplicates, shared parts, captions, and how unusual each picture is.

Its time is near-linear: hashing is, near-duplicates are looked for in a tree, parts are searched in ``parts.SAMPLE``
rows and then looked for in the others, strangeness is measured by ``OTHERS`` rows. It draws from no global random
state, and the same rows give the same survey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from PIL import Image

from memwatch.measure.probes import ProbeError
from memwatch.picking.boxes import Box
from memwatch.picking.captions import caption_groups, rare_captions
from memwatch.picking.duplicates import MAX_BITS, MAX_DIFFERENCE, bits_apart, coarse, difference, duplicate_groups
from memwatch.picking.hashes import Hashed, Hashes, hash_rows, hashes_of
from memwatch.picking.parts import SAMPLE, shared_parts
from memwatch.picking.representatives import best_members
from memwatch.picking.training_set import RowError, TrainingSet

__all__ = ["Box", "Group", "GroupKind", "Survey", "matches", "survey"]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
NEAREST = 3  # other pictures that a picture's strangeness is measured by
OTHERS = 4096  # pictures that these are looked for among
BLOCK = 512  # pictures that are compared with them at once
CANDIDATES = 64  # training rows that are read at most to tell whether one shows a given picture


class GroupKind(StrEnum):
    """What the pictures of a group have in common."""

    DUPLICATES = "duplicates"
    PART = "shared part"


@dataclass(frozen=True)
class Group:
    """Rows that show the same.

    Attributes:
        kind: the whole picture, or a part.
        rows: in order, two or more.
        boxes: for each row where; the whole picture for duplicates.
        best: of a shared part some rows that stand for it best, the best first, see ``best_members``; of duplicates
            none, because any does.
    """

    kind: GroupKind
    rows: tuple[int, ...]
    boxes: tuple[Box, ...]
    best: tuple[int, ...] = ()

    @property
    def best_first(self) -> list[int]:
        """All rows, those first that stand for the group best."""
        best = set(self.best)
        return [*self.best, *(row for row in self.rows if row not in best)]


@dataclass(frozen=True)
class Survey:
    """What was found in a training set: numbers, and nothing of the pictures but 64 bits each.

    Attributes:
        size: rows, unreadable ones too.
        unreadable: by row why it could not be read.
        groups: largest first; of the same size duplicates before parts.
        captions: rows that share a caption (but for case and spaces), two or more; largest first.
        rare_captions: rows with the rarest captions, rarest first; see ``captions.rare_captions``.
        strangeness: how far each picture is from its nearest others, ``(size,)`` float64, root mean square of levels
            0..255; NaN where it could not be read. See ``strangeness``.
        bits: perceptual hashes, ``(size, 8)`` uint8; zeros where a picture could not be read.
        sampled: how many rows parts were searched in, before those that were found were looked for in the others;
            ``None`` where that was all. For what this can miss see ``shared_parts``.
    """

    size: int
    unreadable: Mapping[int, str]
    groups: tuple[Group, ...]
    captions: tuple[tuple[int, ...], ...]
    rare_captions: tuple[int, ...]
    strangeness: np.ndarray
    bits: np.ndarray
    sampled: int | None = None


def survey(rows: TrainingSet, *, workers: int | None = None, progress: bool = True) -> Survey:
    """Look at every picture and caption once.

    Meanwhile ``hashes.RECORD`` is held of each row, 1.3 GB for 100,000 rows.

    Args:
        workers: processes that hash; see ``hash_rows``.
        progress: show a bar, where there is a terminal.

    Raises:
        ProbeError: no row can be read.
    """
    hashed = hash_rows(rows, workers=workers, progress=progress)
    if len(hashed.unreadable) == len(rows):
        why = next(iter(hashed.unreadable.values()))
        raise ProbeError(f"dataset: none of the {len(rows)} images can be read; the first: {why}")
    return survey_of(hashed, [rows.caption(row) for row in range(len(rows))])


def survey_of(hashed: Hashed, captions: Sequence[str]) -> Survey:
    """The same from what is kept of the pictures."""
    hashes = hashed.hashes
    duplicates = duplicate_groups(hashes)
    different = len(hashes) - sum(len(rows) - 1 for rows in duplicates)
    return Survey(
        size=len(captions),
        unreadable=hashed.unreadable,
        groups=groups_of(hashed, duplicates),
        captions=tuple(caption_groups(captions)),
        rare_captions=tuple(rare_captions(captions)),
        strangeness=strangeness(hashes),
        bits=hashes.whole.copy(),
        sampled=SAMPLE if different > SAMPLE else None,
    )


def groups_of(hashed: Hashed, duplicates: Sequence[tuple[int, ...]]) -> tuple[Group, ...]:
    """Duplicates and shared parts, largest first; of the same size duplicates before parts."""
    thumbnails, records = hashed.hashes.thumbnails, hashed.records
    parts = shared_parts(thumbnails, records["places"], records["colours"], duplicates)
    groups = [Group(GroupKind.DUPLICATES, rows, (WHOLE,) * len(rows)) for rows in duplicates]
    groups += [
        Group(GroupKind.PART, part.rows, part.boxes, best_members(thumbnails, part.rows, part.boxes)) for part in parts
    ]
    return tuple(sorted(groups, key=lambda group: -len(group.rows)))


def matches(images: Sequence[Image.Image], survey: Survey, rows: TrainingSet) -> list[int | None]:
    """For each picture a training row that it is a near-duplicate of, ``None`` for none.

    Rows with a near hash are read, the nearest first, ``CANDIDATES`` at most for each picture.
    """
    readable = np.ones(survey.size, dtype=bool)
    readable[list(survey.unreadable)] = False
    return [_match(hashes_of([image]), survey.bits, readable, rows) for image in images]


def _match(given: Hashes, bits: np.ndarray, readable: np.ndarray, rows: TrainingSet) -> int | None:
    """The row of which one picture is a near-duplicate."""
    apart = np.stack([bits_apart(given.whole[0], bits), bits_apart(given.mirrored[0], bits)], axis=1)
    near = np.flatnonzero((apart.min(1) <= MAX_BITS) & readable)
    for row in near[np.argsort(apart[near].min(1), kind="stable")][:CANDIDATES].tolist():
        try:
            known = hashes_of([rows.image(row)]).thumbnails
        except RowError:  # it has gone since the survey
            continue
        for is_mirrored in (False, True):
            mine = given.thumbnails[:, :, ::-1] if is_mirrored else given.thumbnails
            if apart[row, int(is_mirrored)] <= MAX_BITS and difference(mine, known)[0] <= MAX_DIFFERENCE:
                return int(row)
    return None


def strangeness(hashes: Hashes) -> np.ndarray:
    """Distance of each coarse thumbnail to its ``NEAREST`` others in the mean, see ``Survey``.

    In a set of more than ``OTHERS`` pictures, these are the nearest of so many that are drawn, always the same.
    """
    result = np.full(len(hashes), np.nan)
    which = np.flatnonzero(hashes.readable)
    small = coarse(hashes.thumbnails)[which]
    small -= small.mean(0)  # distances are the same, and rounding is less
    among = np.arange(len(which))
    if len(which) > OTHERS:
        among = np.sort(np.random.default_rng(len(which)).permutation(len(which))[:OTHERS])
    nearest = min(NEAREST, len(which) - 1)
    if nearest < 1:
        result[which] = 0.0
        return result
    place = np.full(len(which), -1)
    place[among] = np.arange(len(among))
    for start in range(0, len(which), BLOCK):
        some = np.arange(start, min(start + BLOCK, len(which)))
        distances = _squared_distances(small[some], small[among])
        own = np.flatnonzero(place[some] >= 0)
        distances[own, place[some[own]]] = np.inf
        result[which[some]] = np.sqrt(np.partition(distances, nearest - 1, axis=1)[:, :nearest]).mean(1)
    return result


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between all rows of two matrices, as a mean over their columns."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    result: np.ndarray = np.maximum(squared, 0) / a.shape[1]
    return result
