"""The survey of a training set: duplicates, shared parts, captions, and how unusual each picture is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memwatch.measure.probes import ProbeError
from memwatch.picking.captions import caption_groups, normalised, rare_captions
from memwatch.picking.duplicates import coarse, duplicate_groups, near_pairs, squared_distances
from memwatch.picking.hashes import Hashed, Hashes, hash_rows, hashes_of
from memwatch.picking.parts import Box, shared_parts
from memwatch.picking.rows import TrainingSet
from memwatch.picking.stored import read_groups, write_groups

__all__ = ["Box", "Group", "GroupKind", "Survey", "matches", "survey"]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
NEAREST = 3  # other pictures that a picture's strangeness is measured by
BLOCK = 512  # pictures that are compared with all others at once


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
    """

    kind: GroupKind
    rows: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Survey:
    """What was found in a training set.

    Attributes:
        size: rows, unreadable ones too.
        digest: changes with the number of rows, with any caption and any picture.
        unreadable: by row why it could not be read.
        groups: largest first; of the same size duplicates before parts.
        captions: rows that share a caption (but for case and spaces), two or more; largest first.
        rare_captions: rows with the rarest captions, rarest first; see ``captions.rare_captions``.
        strangeness: how far each picture is from its nearest others, ``(size,)`` float64, root mean square of levels
            0..255; NaN where it could not be read.
        hashes: of the whole pictures.
    """

    size: int
    digest: str
    unreadable: Mapping[int, str]
    groups: tuple[Group, ...]
    captions: tuple[tuple[int, ...], ...]
    rare_captions: tuple[int, ...]
    strangeness: np.ndarray
    hashes: Hashes


def survey(
    rows: TrainingSet, *, cache: Path | None = None, workers: int | None = None, progress: bool = True
) -> Survey:
    """Look at every picture and caption once.

    Args:
        cache: folder where hashes and groups are kept: the next survey decodes only what is new, and looks for groups
            only where something is.
        workers: processes that hash; see ``hash_rows``.
        progress: show a bar, where there is a terminal.

    Raises:
        ProbeError: no row can be read.
    """
    hashed = hash_rows(rows, cache=cache, workers=workers, progress=progress)
    if len(hashed.unreadable) == len(rows):
        why = next(iter(hashed.unreadable.values()))
        raise ProbeError(f"dataset: none of the {len(rows)} images can be read; the first: {why}")
    captions = [rows.caption(row) for row in range(len(rows))]
    return survey_of(hashed, captions, cache)


def survey_of(hashed: Hashed, captions: Sequence[str], cache: Path | None = None) -> Survey:
    """The same from what is kept of the pictures."""
    hashes, digest = hashed.hashes, _digest(hashed, captions)
    return Survey(
        size=len(captions),
        digest=digest,
        unreadable=hashed.unreadable,
        groups=_kept_groups(hashed, digest, cache),
        captions=tuple(caption_groups(captions)),
        rare_captions=tuple(rare_captions(captions)),
        strangeness=strangeness(hashes),
        hashes=hashes,
    )


def groups_of(hashed: Hashed) -> tuple[Group, ...]:
    """Duplicates and shared parts, largest first; of the same size duplicates before parts."""
    records = hashed.records
    duplicates = duplicate_groups(hashed.hashes)
    parts = shared_parts(records["thumbnail"], records["places"], records["colours"], duplicates)
    groups = [Group(GroupKind.DUPLICATES, rows, (WHOLE,) * len(rows)) for rows in duplicates]
    groups += [Group(GroupKind.PART, part.rows, part.boxes) for part in parts]
    return tuple(sorted(groups, key=lambda group: -len(group.rows)))


def matches(images: Sequence[Image.Image], survey: Survey, rows: Any = None) -> list[int | None]:
    """For each picture the training row that it is a near-duplicate of, the first of several; ``None`` for none."""
    found: list[int | None] = [None] * len(images)
    if images:
        for image, row in sorted(zip(*near_pairs(hashes_of(images), survey.hashes), strict=True), reverse=True):
            found[image] = int(row)
    return found


def strangeness(hashes: Hashes) -> np.ndarray:
    """Distance of each coarse thumbnail to its ``NEAREST`` others, in the mean; see ``Survey``."""
    result = np.full(len(hashes), np.nan)
    which = np.flatnonzero(hashes.readable)
    small = coarse(hashes.thumbnails[which])
    small -= small.mean(0)  # distances are the same, and rounding is less
    nearest = min(NEAREST, len(which) - 1)
    for start in range(0, len(which) if nearest else 0, BLOCK):
        distances = squared_distances(small[start : start + BLOCK], small)
        of = np.arange(len(distances))
        distances[of, start + of] = np.inf
        closest = np.sqrt(np.partition(distances, nearest - 1, axis=1)[:, :nearest])
        result[which[start : start + BLOCK]] = closest.mean(1)
    if not nearest:
        result[which] = 0.0
    return result


def _kept_groups(hashed: Hashed, digest: str, cache: Path | None) -> tuple[Group, ...]:
    """The groups that were kept for this digest; looked for, and kept, where there are none."""
    known = read_groups(cache, digest)
    if known is None:
        groups = groups_of(hashed)
        write_groups(cache, digest, [[group.kind, group.rows, group.boxes] for group in groups])
        return groups
    return tuple(
        Group(GroupKind(kind), tuple(rows), tuple((box[0], box[1], box[2], box[3]) for box in boxes))
        for kind, rows, boxes in known
    )


def _digest(hashed: Hashed, captions: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{len(captions)} {sorted(hashed.unreadable)}".encode())
    for name in ("whole", "thumbnail"):
        digest.update(np.ascontiguousarray(hashed.records[name]).tobytes())
    for caption in captions:
        digest.update(normalised(caption).encode() + b"\0")
    return digest.hexdigest()
