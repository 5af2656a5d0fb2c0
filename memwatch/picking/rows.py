"""Rows: whatever a user trains on, read as a training set."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset

from memwatch.denoiser import untouched_streams
from memwatch.measure.probes import IMAGE_SUFFIXES, ProbeError
from memwatch.picking.training_set import RowError, TrainingSet, called

METADATA = "metadata.jsonl"
COLUMNS = {  # names that training scripts use
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "picture"),
    "caption": ("text", "caption", "prompt", "txt", "captions", "prompts"),
}
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
            transforms.
        image_column, caption_column: by default the first of ``COLUMNS`` that is there.
        prompt: the caption of rows that have none.

    Raises:
        ProbeError: it is none of these, or empty, or has no column of that name, or gives other pictures every time.
    """
    if isinstance(source, TrainingSet):
        return source
    if isinstance(source, str | Path):
        rows = _folder_rows(Path(source), caption_column)
    elif not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        what = "cannot be read by row number" if hasattr(source, "__iter__") else "is no training set"
        raise ProbeError(f"dataset: {called(source)} {what}; {NEEDED}")
    elif len(source) == 0:
        raise ProbeError(f"dataset: {called(source)} is empty")
    elif isinstance(source, Subset):
        base = as_training_set(source.dataset, image_column=image_column, caption_column=caption_column)
        of = [int(i) % len(base) for i in source.indices]
        rows = TrainingSet(source, len(of), lambda row: base.raw(of[row]), lambda row: base.caption(of[row]))
    elif hasattr(source, "select_columns"):
        rows = _dataset_rows(source, image_column, caption_column)
    else:
        rows = _item_rows(source, image_column, caption_column)
    rows.prompt = prompt or ""
    return rows


def _folder_rows(folder: Path, caption_column: str | None) -> TrainingSet:
    """In the order of the files' names. A file that a ``metadata.jsonl`` names and that is missing is a row as well."""
    if not folder.is_dir():
        raise ProbeError(f"dataset: {str(folder)!r} is no folder")
    captions: dict[Path, str] = {}
    for metadata in sorted(folder.rglob(METADATA)):
        captions |= dict(_captions_of(metadata, caption_column))
    shown = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    visible = {file for file in shown if not any(part.startswith(".") for part in file.relative_to(folder).parts)}
    files = sorted(visible | set(captions))
    if not files:
        raise ProbeError(f"dataset: {str(folder)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    for file in visible - set(captions):
        beside = file.with_suffix(".txt")
        captions[file] = beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else ""
    texts = [captions[file] for file in files]
    names = [
        f.relative_to(folder).as_posix() if f.is_relative_to(folder) else f"row-{i:05d}" for i, f in enumerate(files)
    ]
    return TrainingSet(
        folder, len(files), files.__getitem__, texts.__getitem__, caption_column=caption_column, names=names
    )


def _captions_of(metadata: Path, caption_column: str | None) -> Iterator[tuple[Path, str]]:
    """File and caption of every line."""
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            file = metadata.parent / row["file_name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            what = f"dataset: {metadata}, line {number}: expected an object with 'file_name' ({error!r})"
            raise ProbeError(what) from error
        column = _column("caption", list(row), caption_column)
        yield file, "" if column is None else _as_caption(row[column])


def _dataset_rows(source: Any, image_column: str | None, caption_column: str | None) -> TrainingSet:
    """Raw rows of a ``datasets.Dataset``; images stay encoded until they are needed."""
    if isinstance(source.column_names, Mapping):
        splits = ", ".join(map(repr, source.column_names))
        raise ProbeError(f"dataset: got several splits, give one of them: {splits}")
    image, caption = _columns(source.column_names, image_column, caption_column)
    plain = source.with_format(None)
    captions = [] if caption is None else list(plain.select_columns([caption])[:][caption])
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
        return _as_caption(captions[row]) if captions else ""

    return TrainingSet(source, len(source), raw, caption_of, image_column=image, caption_column=caption)


def _item_rows(source: Any, image_column: str | None, caption_column: str | None) -> TrainingSet:
    """Rows that are dicts, tuples of image and caption, or images alone, as the first that can be read shows."""
    number, first = _first_readable(source)
    at: tuple[Any, Any] | None = None  # where an item has its image and its caption
    if isinstance(first, Mapping):
        at = _columns([str(name) for name in first], image_column, caption_column)
    elif isinstance(first, tuple | list) and len(first) == 2 and not isinstance(first[0], int | float):
        at = (0, 1)
    elif not isinstance(first, Image.Image | Path):
        raise ProbeError(f"dataset: the rows of {called(source)} are each {called(first)}; {NEEDED}")

    def half(row: int, which: int) -> Any:
        item = source[row]
        if at is None:
            return (item, "")[which]
        return item.get(at[which]) if isinstance(item, Mapping) else item[at[which]]

    rows = TrainingSet(source, len(source), lambda row: half(row, 0), lambda row: _as_caption(half(row, 1)))
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
    image = _column("image", names, image_column)
    if image is None:
        raise ProbeError(f"dataset: found no column of images; set image_column to one of: {', '.join(names)}")
    return image, _column("caption", names, caption_column)


def _column(kind: str, names: Sequence[str], given: str | None) -> str | None:
    """The column that is given, else the first of ``COLUMNS`` that is there."""
    if given is not None and given not in names:
        raise ProbeError(f"dataset: {kind}_column is {given!r}, but its columns are: {', '.join(names)}")
    return given or next((name for name in COLUMNS[kind] if name in names), None)


def _as_caption(value: Any) -> str:
    """A caption as text; of several the first."""
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    return value if isinstance(value, str) else ""
