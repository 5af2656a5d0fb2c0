"""The survey of a training set: duplicates, shared parts, captions, and how unusual each picture is."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from memwatch.measure.captions import ProbeError
from memwatch.picking.duplicates import coarse, duplicate_groups
from memwatch.picking.grouping import slices, spaced
from memwatch.picking.hashes import Hashes, hash_rows
from memwatch.picking.parts import MOVED_SAMPLE, SAMPLE, has_opencv, shared_parts
from memwatch.picking.same_place import Box, Part, inside
from memwatch.picking.training_set import TrainingSet

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
COMPARED = 32  # members of a shared part that are compared with each other
NEAREST = 3  # other pictures that a picture's strangeness is measured by
OTHERS = 4096  # pictures that these are looked for among
BLOCK = 512  # pictures that are compared with them at once
RARE = 64  # rare captions at most
WORDS = 3  # of a caption that count: its rarest


class GroupKind(StrEnum):
    """What the pictures of a group have in common."""

    DUPLICATES = "duplicates"
    PART = "shared part"


@dataclass(frozen=True)
class Group:
    """Rows that show the same.

    Attributes:
        rows: in order, two or more.
        boxes: for each row where; the whole picture for duplicates.
        best: some rows that stand for a shared part best, the best first, see ``best_members``; of duplicates any does.
    """

    kind: GroupKind
    rows: tuple[int, ...]
    boxes: tuple[Box, ...]
    best: tuple[int, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What was found in a training set: numbers, and nothing of the pictures but 64 bits each.

    Attributes:
        size: number of rows, unreadable ones included. unreadable: by row why it could not be read.
        groups: largest first; of the same size duplicates before parts.
        captions: rows that share a caption (but for case and spaces), two or more; largest first.
        rare_captions: rows with the rarest captions, rarest first.
        strangeness: how far each picture is from its nearest others, ``(size,)`` float64, root mean square of levels
            0..255; NaN where it could not be read.
        bits: perceptual hashes, ``(size, 8)`` uint8; zeros where a picture could not be read.
        notes: how shared parts were searched, where that can miss some.
    """

    size: int
    unreadable: Mapping[int, str]
    groups: tuple[Group, ...]
    captions: tuple[tuple[int, ...], ...]
    rare_captions: tuple[int, ...]
    strangeness: np.ndarray
    bits: np.ndarray
    notes: tuple[str, ...] = ()


def survey(rows: TrainingSet) -> Survey:
    """Look at every picture and caption once; a ``ProbeError`` where no row can be read."""
    hashes = hash_rows(rows)
    if len(hashes.unreadable) == len(rows):
        why = next(iter(hashes.unreadable.values()))
        raise ProbeError(f"dataset: none of the {len(rows)} images can be read; the first: {why}")
    captions = [" ".join(rows.caption(row).casefold().split()) for row in range(len(rows))]  # without case
    sharing: dict[str, list[int]] = defaultdict(list)
    for row, caption in enumerate(captions):
        sharing[caption].append(row)
    same_caption = [tuple(rows) for caption, rows in sharing.items() if caption and len(rows) > 1]
    duplicates = duplicate_groups(hashes)
    groups = [Group(GroupKind.DUPLICATES, same, (WHOLE,) * len(same)) for same in duplicates]
    for part in shared_parts(hashes.thumbnails, rows, duplicates):
        best = best_members(hashes.thumbnails, part)
        groups.append(Group(GroupKind.PART, tuple(part), tuple(part.values()), best))
    return Survey(
        size=len(rows),
        unreadable=hashes.unreadable,
        groups=tuple(sorted(groups, key=lambda group: -len(group.rows))),
        captions=tuple(sorted(same_caption, key=lambda rows: (-len(rows), rows))),
        rare_captions=tuple(rare_captions(captions)),
        strangeness=strangeness(hashes),
        bits=hashes.whole,
        notes=tuple(_notes_on_parts(len(rows) - sum(len(same) - 1 for same in duplicates))),
    )


def _notes_on_parts(different: int) -> list[str]:
    """What the search for parts among so many different pictures can miss, see ``shared_parts``."""
    notes, samples = [], [SAMPLE, MOVED_SAMPLE]
    if not has_opencv():
        samples = [SAMPLE]
        how = "pip install 'memwatch[parts]' for OpenCV, which finds them"
        notes.append(f"parts were not searched at other places than the same in each image; {how}")
    if sampled := next((sample for sample in samples if different > sample), None):
        what = f"shared parts were searched in {sampled} rows, and those found were looked for in the others"
        notes.append(f"{what}; a part that few rows share can be missed")
    return notes


def best_members(thumbnails: np.ndarray, part: Part) -> tuple[int, ...]:
    """Of rows with a part some (``COMPARED``), those first whose rest is least like that of the others.

    There only the part can be what is memorized.
    """
    rows = spaced(list(part), COMPARED)
    thumbs = thumbnails[rows].astype(np.float32)
    apart = dict.fromkeys(rows, 0.0)
    for i, row in enumerate(rows):
        outside = ~inside(part[row], thumbs.shape[1])
        if outside.any():
            apart[row] = float(np.abs(thumbs[:, outside] - thumbs[i, outside]).mean())
    return tuple(sorted(apart, key=lambda row: -apart[row]))


def rare_captions(captions: Sequence[str]) -> list[int]:
    """Rows with the rarest captions, rarest first; one row per caption, ``RARE`` at most.

    A word that stands in k of n different captions counts ``log(n / k)``; a caption is as rare as its ``WORDS`` rarest
    words are in the mean, and shorter captions are filled up with 0. A caption must be rarer than the mean of all.
    """
    first = {caption: row for row, caption in reversed([*enumerate(captions)]) if caption}
    words = {caption: set(re.findall(r"\w+", caption)) for caption in first}
    number = Counter(word for of in words.values() for word in of)
    rarity = {
        caption: sum(sorted((math.log(len(first) / number[word]) for word in of), reverse=True)[:WORDS]) / WORDS
        for caption, of in words.items()
    }
    mean = sum(rarity.values()) / max(1, len(rarity))
    rare = [caption for caption, value in rarity.items() if value > mean + 1e-9]
    return [first[caption] for caption in sorted(rare, key=lambda text: (-rarity[text], first[text]))[:RARE]]


def strangeness(hashes: Hashes) -> np.ndarray:
    """Distance of each coarse thumbnail to its ``NEAREST`` others in the mean, among ``OTHERS`` at most."""
    result = np.full(len(hashes), np.nan)
    which = hashes.readable
    small = coarse(hashes.thumbnails)[which]
    small -= small.mean(0)  # distances are the same, and rounding is less
    nearest = min(NEAREST, len(which) - 1)
    if nearest < 1:
        result[which] = 0.0
        return result
    among = np.arange(len(which))
    if len(which) > OTHERS:
        among = np.sort(np.random.default_rng(len(which)).permutation(len(which))[:OTHERS])
    for some in slices(len(which), BLOCK):
        distances = _squared_distances(small[some], small[among])
        distances[np.arange(some.start, some.stop)[:, None] == among] = np.inf  # to itself
        result[which[some]] = np.sqrt(np.partition(distances, nearest - 1, axis=1)[:, :nearest]).mean(1)
    return result


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Any:
    """Between all rows of two matrices, as a mean over their columns."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.maximum(squared, 0) / a.shape[1]
