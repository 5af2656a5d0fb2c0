"""Rows: a training set as images with captions, whatever it came as."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from memwatch.picking.dataset_rows import dataset_rows, item_rows
from memwatch.picking.folder_rows import folder_rows
from memwatch.picking.training_set import RowError, TrainingSet

__all__ = ["RowError", "TrainingSet", "as_training_set"]


def as_training_set(
    source: Any, *, image_column: str | None = None, caption_column: str | None = None, prompt: str | None = None
) -> TrainingSet:
    """The rows of whatever the user trains on.

    Args:
        source: a ``datasets.Dataset`` (its raw rows are read, whatever transform or format it has), a ``Subset`` of
            anything here, an image folder (of any depth; captions from ``metadata.jsonl``, or ``NAME.txt`` beside
            ``NAME.png``), or anything with ``len`` whose rows are dicts or pairs of image and caption, before random
            transforms. For what an image may be see ``pictures.decoded``.
        image_column: column of the images; the names in ``IMAGE_COLUMNS`` are looked for otherwise.
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
        rows = _some_of(source, base, [int(i) % len(base) for i in source.indices])
    elif hasattr(source, "column_names") and hasattr(source, "select_columns") and hasattr(source, "__len__"):
        rows = dataset_rows(source, image_column, caption_column)
    else:
        rows = item_rows(source, image_column, caption_column)
    rows.prompt = prompt or ""
    return rows


def _some_of(source: Any, base: TrainingSet, rows: Sequence[int]) -> TrainingSet:
    """Some rows of a training set, numbered anew."""
    return TrainingSet(
        source, len(rows), lambda row: base.raw(rows[row]), lambda row: base.caption(rows[row]), folder=base.folder
    )
