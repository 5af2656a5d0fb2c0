"""Hashes: what is kept of every picture to find others like it, made in one pass."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from memwatch.picking.grouping import slices
from memwatch.picking.training_set import RowError, TrainingSet, image_from

SIDE = 128  # pixels of the square that hashes are made of
CELLS = 32  # of a thumbnail, per side
THREADS = 8  # at most
BATCH = 256  # rows that are held in memory at once


@dataclass(frozen=True)
class Hashes:
    """What is kept of every row; zeros where a row cannot be read, and ``unreadable`` by row why.

    ``whole`` has the 64 bits ``(n, 8)`` uint8 of the perceptual hash of the middle square, ``mirrored`` those of its
    mirror image, ``thumbnails`` its ``(n, CELLS, CELLS, 3)`` uint8 RGB.
    """

    whole: np.ndarray
    mirrored: np.ndarray
    thumbnails: np.ndarray
    unreadable: dict[int, str]

    def __len__(self) -> int:
        return len(self.whole)

    @property
    def readable(self) -> np.ndarray:
        """The numbers of the rows that can be read."""
        return np.setdiff1d(np.arange(len(self)), list(self.unreadable))


def hash_rows(rows: TrainingSet) -> Hashes:
    """Hash every row in threads, with a bar where there is a terminal and much to do.

    Datasets are read in this thread, because not all may be read in several; files are read by the threads.
    """
    whole, mirrored = (np.zeros((len(rows), 8), np.uint8) for _ in range(2))
    found = Hashes(whole, mirrored, np.zeros((len(rows), CELLS, CELLS, 3), np.uint8), {})
    disable = None if len(rows) > BATCH else True
    bar = tqdm(total=len(rows), desc="memwatch: hashing the images", unit="image", disable=disable)
    with bar, ThreadPoolExecutor(min(cores(), THREADS)) as threads:
        for some in (range(len(rows))[batch] for batch in slices(len(rows), BATCH)):
            for row, value in zip(some, threads.map(_hashed, some, [_raw(rows, row) for row in some]), strict=True):
                if isinstance(value, RowError):
                    found.unreadable[row] = str(value)
                else:
                    whole[row], mirrored[row], found.thumbnails[row] = value
                bar.update()
    return found


def hash_of(picture: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of an RGB picture ``whole``, ``mirrored`` and the thumbnail, see ``Hashes``."""
    small = square(picture, SIDE)
    whole, mirrored = (np.packbits(imagehash.phash(image).hash) for image in (small, ImageOps.mirror(small)))
    return whole, mirrored, np.asarray(small.reduce(SIDE // CELLS))


def _raw(rows: TrainingSet, row: int) -> Any:
    """A row's file, its bytes, its picture, or the error that it raised."""
    try:
        raw = rows.raw(row)
        return raw if isinstance(raw, Path | bytes) else image_from(raw, row)
    except RowError as error:
        return error


def _hashed(row: int, raw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | RowError:
    try:
        return raw if isinstance(raw, RowError) else hash_of(image_from(raw, row, 2 * SIDE))
    except RowError as error:
        return error


def square(picture: Image.Image, side: int) -> Image.Image:
    """The middle square, ``side`` pixels wide, as training scripts resize the short side and crop."""
    short = min(picture.size)
    left, top = (picture.width - short) / 2, (picture.height - short) / 2
    box = (left, top, left + short, top + short)
    return picture.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
