"""Hashes: everything that is kept of a picture to find others like it, made in one pass."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from memwatch.picking.keypoints import MOST, SIDE, keypoints
from memwatch.picking.pictures import decoded, square
from memwatch.picking.training_set import RowError, TrainingSet
from memwatch.picking.workers import WorkerError, in_workers

logger = logging.getLogger("memwatch")

CELLS = 32  # of a thumbnail, per side
TASK = 32  # pictures per task of a worker
FEWEST = 1000  # pictures per worker; below, starting it takes longer than it saves
WORKERS = 8  # at most, unless more are asked for
RECORD = np.dtype(
    [
        ("whole", np.uint8, 8),
        ("mirrored", np.uint8, 8),
        ("thumbnail", np.uint8, (CELLS, CELLS, 3)),
        ("places", np.uint8, (MOST, 2)),
        ("colours", np.uint8, (MOST, 4, 4, 3)),
    ]
)


@dataclass(frozen=True)
class Hashes:
    """What is kept of every row; zeros where a row cannot be read.

    Attributes:
        whole: ``(n, 8)`` uint8, the 64 bits of the perceptual hash of the middle square.
        mirrored: the same of its mirror image.
        thumbnails: ``(n, CELLS, CELLS, 3)`` uint8 RGB, of the middle square.
        readable: ``(n,)`` bool.
    """

    whole: np.ndarray
    mirrored: np.ndarray
    thumbnails: np.ndarray
    readable: np.ndarray

    def __len__(self) -> int:
        return len(self.whole)


@dataclass(frozen=True)
class Hashed:
    """One pass over a training set.

    Attributes:
        records: ``(n,)`` of type ``RECORD``.
        unreadable: why a row could not be read.
    """

    records: np.ndarray
    unreadable: dict[int, str]

    @property
    def hashes(self) -> Hashes:
        """Views of the records."""
        readable = np.ones(len(self.records), dtype=bool)
        readable[list(self.unreadable)] = False
        return Hashes(self.records["whole"], self.records["mirrored"], self.records["thumbnail"], readable)


def hash_rows(rows: TrainingSet, *, workers: int | None = None, progress: bool = True) -> Hashed:
    """Hash every row. Rows that cannot be read are left out; their reasons are kept.

    Args:
        workers: processes; 1 is this process alone. Default: one per core, ``WORKERS`` at most, and one per ``FEWEST``
            pictures. Datasets are read in this process, whatever they are; files are read by the workers.
        progress: show a bar, where there is a terminal.
    """
    number = workers or max(1, min(cores(), WORKERS, len(rows) // FEWEST))
    with tqdm(
        total=len(rows), desc="memwatch: hashing the images", unit="image", disable=None if progress else True
    ) as bar:
        one = _Pass(rows, bar)
        try:
            values = in_workers("memwatch.picking.hashes:hash_task", one.tasks(), number) if number > 1 else one.here()
            for task in values:
                one.take(task)
        except (WorkerError, OSError) as error:
            logger.warning("memwatch: %s; the images are hashed in this process instead", error)
            for task in one.here():
                one.take(task)
    return Hashed(one.records, dict(sorted(one.unreadable.items())))


class _Pass:
    """The state of a pass: the records of the rows that are done, or why nothing could be made of a row."""

    def __init__(self, rows: TrainingSet, bar: Any) -> None:
        self.rows, self.bar = rows, bar
        self.records = np.zeros(len(rows), dtype=RECORD)
        self.done = np.zeros(len(rows), dtype=bool)
        self.unreadable: dict[int, str] = {}

    def tasks(self) -> Iterator[list[tuple[int, Any]]]:
        """Rows that are not done yet, each with its file or its picture, in tasks."""
        task: list[tuple[int, Any]] = []
        for row in np.flatnonzero(~self.done).tolist():
            try:
                raw = self.rows.raw(row)
                task.append((row, raw if isinstance(raw, Path | bytes) else decoded(raw)))
            except Exception as error:  # a dataset, and what it holds, may raise anything
                known = isinstance(error, RowError)
                self.take([(row, str(error) if known else f"row {row}: cannot be read: {error}")])
                continue
            if len(task) == TASK:
                yield task
                task = []
        if task:
            yield task

    def here(self) -> Iterator[list[tuple[int, Any]]]:
        """The values of all tasks, made in this process."""
        return (hash_task(task) for task in self.tasks())

    def take(self, values: list[tuple[int, Any]]) -> None:
        for row, value in values:
            self.done[row] = True
            if isinstance(value, str):
                self.unreadable[row] = value
            else:
                self.records[row] = value
        self.bar.update(len(values))


def hash_task(task: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """By row the record of its picture, or why it cannot be read."""
    return [(row, _record_or_reason(row, raw)) for row, raw in task]


def record_of(picture: Image.Image) -> np.ndarray:
    """Everything that is kept of an RGB picture: one ``RECORD``."""
    small = square(picture, SIDE)
    record = np.zeros((), dtype=RECORD)
    record["whole"] = np.packbits(imagehash.phash(small).hash)
    record["mirrored"] = np.packbits(imagehash.phash(ImageOps.mirror(small)).hash)
    record["thumbnail"] = np.asarray(small.reduce(SIDE // CELLS))
    record["places"], record["colours"] = keypoints(np.asarray(small))
    return record


def hashes_of(pictures: Sequence[Image.Image]) -> Hashes:
    """Hashes of pictures that are not in the set."""
    records = np.zeros(len(pictures), dtype=RECORD)
    for i, picture in enumerate(pictures):
        records[i] = record_of(decoded(picture))
    return Hashed(records, {}).hashes


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _record_or_reason(row: int, raw: Any) -> Any:
    try:
        return record_of(decoded(raw, 2 * SIDE))
    except Exception as error:  # PIL has its own for broken, cut off and huge files
        file = f" ({raw})" if isinstance(raw, Path) else ""
        return f"row {row}{file}: cannot be read: {error!r}"
