"""Rows: whatever a user trains on, read as a training set."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset

from memwatch.denoiser import untouched_streams
from memwatch.measure.captions import ProbeError, as_caption, column_of, guessed, naming
from memwatch.measure.image_folder import read_image_folder
from memwatch.picking.training_set import RowError, TrainingSet, called

NEEDED = "give a datasets.Dataset, an image folder, or rows with a length that hold an image and a caption"
TRIED = 16  # rows, until one can be read
READINGS = 8  # of one row: a flip by a coin shows in all but one of 128 cases


def as_training_set(
    source: Any, *, image_column: str | None = None, caption_column: str | None = None, prompt: str | None = None
) -> TrainingSet:
    """The rows of whatever the user trains on.

    Args:
        source: a ``datasets.Dataset`` (its raw rows are read, whatever transform or format it has), a ``Subset`` of
            anything here, an image folder (see ``read_image_folder``), or anything with ``len`` whose rows are dicts or
            pairs of image and caption, before random transforms.
        image_column, caption_column: see ``captions.column_of``.
        prompt: the caption of rows that have none.

    Raises:
        ProbeError: it is none of these, or empty, or has no column of that name, or gives other pictures every time.
    """
    if isinstance(source, TrainingSet):
        return source
    if isinstance(source, str | Path):
        rows = _folder_rows(Path(source), caption_column, prompt)
    elif not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        what = "cannot be read by row number" if hasattr(source, "__iter__") else "is no training set"
        raise ProbeError(f"dataset: {called(source)} {what}; {NEEDED}")
    elif len(source) == 0:
        raise ProbeError(f"dataset: {called(source)} is empty")
    elif isinstance(source, Subset):
        base = as_training_set(source.dataset, image_column=image_column, caption_column=caption_column)
        of = [int(i) % len(base) for i in source.indices]
        rows = TrainingSet(source, len(of), lambda row: base.raw(of[row]), lambda row: base.caption(of[row]))
        rows.notes, rows.instead = base.notes, base.instead
    elif hasattr(source, "select_columns"):
        rows = _dataset_rows(source, image_column, caption_column)
    else:
        rows = _item_rows(source, image_column, caption_column)
    rows.prompt = prompt or ""
    return rows


def _folder_rows(folder: Path, caption_column: str | None, prompt: str | None) -> TrainingSet:
    """Names are files relative to the folder; a file that several rows name has a number in all but the first.

    A given prompt goes before the words of a folder of kohya's layout.
    """
    with naming("dataset"):
        found = read_image_folder(folder, caption_column, folder_words=not prompt)
    files, texts = [row.file for row in found.rows], [row.caption for row in found.rows]
    rows = TrainingSet(folder, len(files), files.__getitem__, texts.__getitem__, caption_column=caption_column)
    rows.names, rows.notes, rows.instead = _names(folder, files), found.notes, found.instead
    return rows


def _names(folder: Path, files: Sequence[Path]) -> list[str]:
    """Files relative to the folder; of one that several rows name the others have a number: ``cat~2.png``."""
    names, numbers = dict.fromkeys(file.relative_to(folder).as_posix() for file in files), Counter[Path]()
    unique = []
    for file in (file.relative_to(folder) for file in files):
        numbers[file] += 1
        name = file.as_posix()
        while numbers[file] > 1 and (name := file.with_stem(f"{file.stem}~{numbers[file]}").as_posix()) in names:
            numbers[file] += 1
        names[name] = None
        unique.append(name)
    return unique


def _dataset_rows(source: Any, image_column: str | None, caption_column: str | None) -> TrainingSet:
    """Raw rows of a ``datasets.Dataset``; images stay encoded until they are needed."""
    if isinstance(source.column_names, Mapping):
        splits = ", ".join(map(repr, source.column_names))
        raise ProbeError(f"dataset: got several splits, give one of them: {splits}")
    image, caption = _columns(source.column_names, image_column, caption_column)
    plain = source.with_format(None)
    captions = [] if caption is None else list(plain.select_columns([caption])[:][caption])
    if caption is not None and hasattr(labels := plain.features[caption], "int2str"):  # numbers that stand for names
        captions = [label if label is None else labels.int2str(label) for label in captions]
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
        return as_caption(captions[row]) if captions else ""

    rows = TrainingSet(source, len(source), raw, caption_of, image_column=image, caption_column=caption)
    rows.instead, rows.notes = _instead(source.column_names, caption), tuple(guessed(caption, caption_column))
    return rows


def _item_rows(source: Any, image_column: str | None, caption_column: str | None) -> TrainingSet:
    """Rows that are dicts, tuples of image and caption, or images alone, as the first that can be read shows."""
    number, first = _first_readable(source)
    at: tuple[Any, Any] | None = None  # where an item has its image and its caption
    instead = ""
    if isinstance(first, Mapping):
        names = [str(name) for name in first]
        at = _columns(names, image_column, caption_column)
        instead = _instead(names, at[1])
    elif isinstance(first, tuple | list) and len(first) == 2 and not isinstance(first[0], int | float):
        at = (0, 1)
    elif not isinstance(first, Image.Image | Path):
        raise ProbeError(f"dataset: the rows of {called(source)} are each {called(first)}; {NEEDED}")

    def half(row: int, which: int) -> Any:
        item = source[row]
        if at is None:
            return (item, "")[which]
        return item.get(at[which]) if isinstance(item, Mapping) else item[at[which]]

    halves = (lambda row: half(row, 0)), (lambda row: as_caption(half(row, 1)))
    rows = TrainingSet(source, len(source), *halves, instead=instead)
    if len({_read(rows, number, seed) for seed in range(READINGS)}) > 1:
        why = "changes each time it is read, so it is transformed at random"
        raise ProbeError(f"dataset: row {number} of {called(source)} {why}; pick from the rows before transforms")
    return rows


def _first_readable(source: Any) -> tuple[int, Any]:
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


def _columns(names: Sequence[str], image_column: str | None, caption_column: str | None) -> tuple[str, str | None]:
    image = column_of("image", names, image_column)
    if image is None:
        raise ProbeError(f"dataset: found no column of images; set image_column to one of: {', '.join(names)}")
    return image, column_of("caption", names, caption_column)


def _instead(names: Sequence[str], caption: str | None) -> str:
    """What is there instead, where captions are missing."""
    read = "set caption_column to one of them" if caption is None else f"captions are read from {caption!r}"
    return f"the columns are {', '.join(names)}; {read}"
