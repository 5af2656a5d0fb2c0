"""Hashes: everything that is kept of a picture to find others like it, made in one pass and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from memwatch.picking.keypoints import MOST, SIDE, keypoints
from memwatch.picking.pictures import decoded, square
from memwatch.picking.stored import read_records, write_records
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
        num_decoded: how many different pictures were read, because no earlier pass knew them.
    """

    records: np.ndarray
    unreadable: dict[int, str]
    num_decoded: int

    @property
    def hashes(self) -> Hashes:
        readable = np.ones(len(self.records), dtype=bool)
        readable[list(self.unreadable)] = False
        whole, mirrored, thumbnails = (
            np.ascontiguousarray(self.records[name]) for name in ("whole", "mirrored", "thumbnail")
        )
        return Hashes(whole, mirrored, thumbnails, readable)


def hash_rows(
    rows: TrainingSet, *, cache: Path | None = None, workers: int | None = None, progress: bool = True
) -> Hashed:
    """Hash every row, those of an earlier pass excepted.

    A file is known again by its path, size and time of change, so that it is not even opened; other rows by their
    content. Rows that cannot be read are left out; their reasons are kept.

    Args:
        cache: folder for the result.
        workers: processes; 1 is this process alone. Default: one per core, ``WORKERS`` at most, and one per ``FEWEST``
            pictures. Datasets are read in this process, whatever they are; files are read by the workers.
        progress: show a bar, where there is a terminal.
    """
    number = workers or max(1, min(cores(), WORKERS, len(rows) // FEWEST))
    with tqdm(
        total=len(rows), desc="memwatch: hashing the images", unit="image", disable=None if progress else True
    ) as bar:
        one = _Pass(rows, read_records(cache, RECORD), bar)
        try:
            values = in_workers("memwatch.picking.hashes:hash_task", one.tasks(), number) if number > 1 else one.here()
            for task in values:
                one.take(task)
        except (WorkerError, OSError) as error:
            logger.warning("memwatch: %s; the images are hashed in this process instead", error)
            for task in one.here():
                one.take(task)
    found = one.result()
    if found.num_decoded:
        write_records(cache, {key: value for key, value in one.values.items() if not isinstance(value, str)})
    return found


class _Pass:
    """The state of a pass: by row its key, by key what was made of the picture, or why nothing could be."""

    def __init__(self, rows: TrainingSet, known: dict[bytes, Any], bar: Any) -> None:
        self.rows, self.known, self.bar = rows, known, bar
        self.keys: dict[int, bytes] = {}
        self.values: dict[bytes, Any] = {}
        self.unreadable: dict[int, str] = {}
        self.num_decoded = 0

    def tasks(self) -> Iterator[list[tuple[bytes, Any]]]:
        """Keys and pictures that are not known yet, in tasks."""
        task: list[tuple[bytes, Any]] = []
        asked: set[bytes] = set()
        for row in range(len(self.rows)):
            if self.keys.get(row) in self.values or row in self.unreadable:
                continue
            try:
                raw = self.rows.raw(row)
                raw = decoded(raw) if isinstance(raw, Image.Image) else raw
                self.keys[row] = key = key_of(raw)
            except Exception as error:  # a dataset, and what it holds, may raise anything
                self.unreadable[row] = (
                    str(error) if isinstance(error, RowError) else f"row {row}: cannot be read: {error}"
                )
                self.bar.update()
                continue
            if key in self.known:
                self.values[key] = self.known[key]
            if key in self.values or key in asked:
                self.bar.update()
                continue
            asked.add(key)
            task.append((key, raw))
            if len(task) == TASK:
                yield task
                task = []
        if task:
            yield task

    def here(self) -> Iterator[list[tuple[bytes, Any]]]:
        """The values of all tasks, made in this process."""
        return (hash_task(task) for task in self.tasks())

    def take(self, values: list[tuple[bytes, Any]]) -> None:
        self.values.update(values)
        self.num_decoded += sum(not isinstance(value, str) for _, value in values)
        self.bar.update(len(values))

    def result(self) -> Hashed:
        records = np.zeros(len(self.rows), dtype=RECORD)
        for row, key in self.keys.items():
            value = self.values[key]
            if isinstance(value, str):
                self.unreadable[row] = f"row {row}{value}"
            else:
                records[row] = value
        return Hashed(records, dict(sorted(self.unreadable.items())), self.num_decoded)


def hash_task(task: list[tuple[bytes, Any]]) -> list[tuple[bytes, Any]]:
    """By key the record of a picture, or why it cannot be read."""
    return [(key, _record_or_reason(raw)) for key, raw in task]


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
    return Hashed(records, {}, len(pictures)).hashes


def key_of(raw: Any) -> bytes:
    """16 bytes that stand for a row's picture.

    Raises:
        OSError: a file is not there.
        ValueError: it is no image.
    """
    if isinstance(raw, Path):
        stat = raw.stat()
        return _digest(f"{raw.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    if isinstance(raw, bytes):
        return _digest(raw)
    if isinstance(raw, Image.Image):
        return _digest(f"{raw.mode}{raw.size}".encode(), raw.tobytes())
    if not isinstance(raw, np.ndarray | torch.Tensor | list):
        raise ValueError(f"a {type(raw).__name__} is no image")
    values = raw.detach().cpu().numpy() if isinstance(raw, torch.Tensor) else np.asarray(raw)
    return _digest(f"{values.dtype}{values.shape}".encode(), np.ascontiguousarray(values).tobytes())


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _record_or_reason(raw: Any) -> Any:
    try:
        return record_of(decoded(raw, 2 * SIDE))
    except Exception as error:  # PIL has its own for broken, cut off and huge files
        file = f" ({raw})" if isinstance(raw, Path) else ""
        return f"{file}: cannot be read: {error!r}"


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()
