"""Datasets: those of the ``datasets`` library, and anything with a length whose rows are dicts or tuples."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from memwatch.denoiser import untouched_streams
from memwatch.measure.probes import ProbeError
from memwatch.picking.training_set import RowError, TrainingSet, as_caption, called, caption_column_of, image_column_of

NEEDED = "give a datasets.Dataset, an image folder, or rows with a length that hold an image and a caption"
TRIED = 16  # rows, until one can be read
READINGS = 8  # of one row: a flip by a coin shows in all but one of 128 cases


def dataset_rows(source: Any, image_column: str | None, caption_column: str | None) -> TrainingSet:
    """Raw rows of a ``datasets.Dataset``, whatever transform or format it has; images stay encoded until needed.

    Raises:
        ProbeError: it is several splits, or a column is not there.
    """
    names = source.column_names
    if isinstance(names, Mapping):
        raise ProbeError(f"dataset: got several splits, give one of them: {', '.join(map(repr, names))}")
    image = image_column_of(names, image_column)
    caption = caption_column_of(names, caption_column)
    plain = source.with_format(None)
    captions = None if caption is None else list(plain.select_columns([caption])[:][caption])
    pictures = plain.select_columns([image])
    feature = pictures.features[image]
    if type(feature).__name__ == "Image":
        pictures = pictures.cast_column(image, type(feature)(decode=False))
    return TrainingSet(
        source,
        len(source),
        lambda row: _encoded(pictures[row][image]),
        lambda row: "" if captions is None else as_caption(captions[row]),
        columns=(image, caption),
    )


def item_rows(source: Any, image_column: str | None, caption_column: str | None) -> TrainingSet:
    """Rows that are dicts, tuples of image and caption, or images alone.

    Raises:
        ProbeError: they are something else, there is none, or a column is not there.
    """
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        what = "cannot be read by row number" if hasattr(source, "__iter__") else "is no training set"
        raise ProbeError(f"dataset: {called(source)} {what}; {NEEDED}")
    if len(source) == 0:
        raise ProbeError(f"dataset: {called(source)} is empty")
    number, first = _first_readable(source)
    rows = _item_rows(source, first, image_column, caption_column)
    if len({_read(rows, number, seed) for seed in range(READINGS)}) > 1:
        why = "is another one each time it is read, so it is transformed at random"
        raise ProbeError(f"dataset: row {number} of {called(source)} {why}; pick from the rows before transforms")
    return rows


def _item_rows(source: Any, first: Any, image_column: str | None, caption_column: str | None) -> TrainingSet:
    """Rows like the first."""
    if isinstance(first, Mapping):
        names = [str(name) for name in first]
        image, caption = image_column_of(names, image_column), caption_column_of(names, caption_column)
        return TrainingSet(
            source,
            len(source),
            lambda row: source[row][image],
            lambda row: "" if caption is None else as_caption(source[row].get(caption)),
        )
    if isinstance(first, tuple | list) and len(first) == 2 and not isinstance(first[0], int | float):
        return TrainingSet(source, len(source), lambda row: source[row][0], lambda row: as_caption(source[row][1]))
    if isinstance(first, Image.Image | Path):
        return TrainingSet(source, len(source), source.__getitem__, lambda _: "")
    raise ProbeError(f"dataset: the rows of {called(source)} are each {called(first)}; {NEEDED}")


def _first_readable(source: Any) -> tuple[int, Any]:
    """A row that tells what rows look like, with its number."""
    for row in range(min(TRIED, len(source))):
        try:
            return row, source[row]
        except Exception as error:  # a dataset may raise anything
            failed = error
    raise ProbeError(f"dataset: the first rows of {called(source)} cannot be read ({failed!r})") from failed


def _read(rows: TrainingSet, row: int, seed: int) -> tuple[bytes, str] | None:
    """A row's pixels and caption, as these random streams make them; ``None`` where it cannot be read."""
    with untouched_streams():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's generators for later as well
        try:
            return rows.image(row).tobytes(), rows.caption(row)
        except RowError:  # said where it is surveyed
            return None


def _encoded(value: Any) -> Any:
    """What the library keeps of an image: its bytes, or its path."""
    if isinstance(value, Mapping):
        return value["bytes"] if value.get("bytes") is not None else value["path"]
    return value
