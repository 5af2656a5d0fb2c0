"""Rows: a training set as images with captions, whatever it came as."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset

from memwatch.denoiser import untouched_streams
from memwatch.measure.probes import ProbeError
from memwatch.picking.image_folder import as_caption, caption_column_of, column_of, folder_rows
from memwatch.picking.training_set import RowError, TrainingSet, called

__all__ = ["RowError", "TrainingSet", "as_training_set"]

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
NEEDED = "give a datasets.Dataset, an image folder, or rows with a length that hold an image and a caption"
TRIED = 16  # rows, until one can be read
READINGS = 8  # of one row: a flip by a coin shows in all but one of 128 cases


def as_training_set(
    source: Any, *, image_column: str | None = None, caption_column: str | None = None, prompt: str | None = None
) -> TrainingSet:
    """The rows of whatever the user trains on.

    Args:
        source: a ``datasets.Dataset`` (its raw rows are read, whatever transform or format it has), a ``Subset`` of
            anything here, an image folder (of any depth; captions from ``metadata.jsonl``, or ``NAME.txt`` beside
            ``NAME.png``), or anything with ``len`` whose rows are dicts or pairs of image and caption, before random
            transforms. For what an image may be see ``images.decoded``.
        image_column: column of the images; by default the first of ``IMAGE_COLUMNS`` that is there.
        caption_column: likewise, ``CAPTION_COLUMNS``.
        prompt: the caption of rows that have none; "" otherwise.

    Raises:
        ProbeError: it is none of these, or empty, or has no column of that name, or gives other pictures every time.
    """
    if isinstance(source, TrainingSet):
        return source
    if isinstance(source, str | Path):
        rows = folder_rows(Path(source), caption_column)
    elif isinstance(source, Subset):
        base = as_training_set(source.dataset, image_column=image_column, caption_column=caption_column)
        of = [int(i) % len(base) for i in source.indices]
        rows = TrainingSet(
            source, len(of), lambda row: base.raw(of[row]), lambda row: base.caption(of[row]), folder=base.folder
        )
    elif hasattr(source, "column_names") and hasattr(source, "select_columns") and hasattr(source, "__len__"):
        rows = _dataset_rows(source, image_column, caption_column)
    else:
        rows = _item_rows(source, image_column, caption_column)
    rows.prompt = prompt or ""
    return rows


def _dataset_rows(source: Any, image_column: str | None, caption_column: str | None) -> TrainingSet:
    """Raw rows of a ``datasets.Dataset``; images stay encoded until they are needed."""
    names = source.column_names
    if isinstance(names, Mapping):
        raise ProbeError(f"dataset: got several splits, give one of them: {', '.join(map(repr, names))}")
    image = _image_column_of(names, image_column)
    caption = caption_column_of(names, caption_column)
    plain = source.with_format(None)
    captions = None if caption is None else list(plain.select_columns([caption])[:][caption])
    pictures = plain.select_columns([image])
    feature = pictures.features[image]
    if type(feature).__name__ == "Image":
        pictures = pictures.cast_column(image, type(feature)(decode=False))

    def raw(row: int) -> Any:
        value = pictures[row][image]
        if isinstance(value, Mapping):  # what the library keeps of an image: its bytes, or its path
            return value["bytes"] if value.get("bytes") is not None else value["path"]
        return value

    def caption_of(row: int) -> str:
        return "" if captions is None else as_caption(captions[row])

    return TrainingSet(source, len(source), raw, caption_of, image_column=image, caption_column=caption)


def _item_rows(source: Any, image_column: str | None, caption_column: str | None) -> TrainingSet:
    """Rows that are dicts, tuples of image and caption, or images alone."""
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        what = "cannot be read by row number" if hasattr(source, "__iter__") else "is no training set"
        raise ProbeError(f"dataset: {called(source)} {what}; {NEEDED}")
    if len(source) == 0:
        raise ProbeError(f"dataset: {called(source)} is empty")
    number, first = _first_readable(source)
    if isinstance(first, Mapping):
        names = [str(name) for name in first]
        image, caption = _image_column_of(names, image_column), caption_column_of(names, caption_column)
        rows = TrainingSet(
            source,
            len(source),
            lambda row: source[row][image],
            lambda row: "" if caption is None else as_caption(source[row].get(caption)),
        )
    elif isinstance(first, tuple | list) and len(first) == 2 and not isinstance(first[0], int | float):
        rows = TrainingSet(source, len(source), lambda row: source[row][0], lambda row: as_caption(source[row][1]))
    elif isinstance(first, Image.Image | Path):
        rows = TrainingSet(source, len(source), source.__getitem__, lambda _: "")
    else:
        raise ProbeError(f"dataset: the rows of {called(source)} are each {called(first)}; {NEEDED}")
    if len({_read(rows, number, seed) for seed in range(READINGS)}) > 1:
        why = "changes each time it is read, so it is transformed at random"
        raise ProbeError(f"dataset: row {number} of {called(source)} {why}; pick from the rows before transforms")
    return rows


def _first_readable(source: Any) -> tuple[int, Any]:
    """The first row that can be read, with its number; it shows what rows look like."""
    for row in range(min(TRIED, len(source))):
        try:
            return row, source[row]
        except Exception as error:  # a dataset may raise anything
            failed = error
    raise ProbeError(f"dataset: the first rows of {called(source)} cannot be read ({failed!r})") from failed


def _read(rows: TrainingSet, row: int, seed: int) -> tuple[bytes, str] | None:
    """A row's pixels and caption under seeded random streams; ``None`` where it cannot be read."""
    with untouched_streams():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's generators for later as well
        try:
            return rows.image(row).tobytes(), rows.caption(row)
        except RowError:  # reported by the survey
            return None


def _image_column_of(names: Sequence[str], given: str | None) -> str:
    column = column_of(names, given, IMAGE_COLUMNS, "image_column")
    if column is None:
        raise ProbeError(f"dataset: found no column of images; set image_column to one of: {', '.join(names)}")
    return column
