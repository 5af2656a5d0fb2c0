"""An image folder: files of any depth, with captions in ``metadata.jsonl`` or beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memwatch.measure.probes import IMAGE_SUFFIXES, ProbeError
from memwatch.picking.training_set import TrainingSet, as_caption, caption_column_of

METADATA = "metadata.jsonl"


def folder_rows(folder: Path, caption_column: str | None) -> TrainingSet:
    """Rows in the order of their files' names.

    A file that a ``metadata.jsonl`` names and that is missing is a row as well, which cannot be read.

    Raises:
        ProbeError: it is no folder, holds no image, or has a ``metadata.jsonl`` that cannot be used.
    """
    if not folder.is_dir():
        raise ProbeError(f"dataset: {str(folder)!r} is no folder")
    captions: dict[Path, str] = {}
    for metadata in sorted(folder.rglob(METADATA)):
        captions |= dict(_captions_of(metadata, caption_column))
    shown = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted({file for file in shown if not _is_hidden(file.relative_to(folder))} | set(captions))
    if not files:
        raise ProbeError(f"dataset: {str(folder)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    texts = [captions[file] if file in captions else _beside(file) for file in files]
    columns = ("image", caption_column)
    return TrainingSet(folder, len(files), files.__getitem__, texts.__getitem__, folder=folder, columns=columns)


def _captions_of(metadata: Path, caption_column: str | None) -> Iterator[tuple[Path, str]]:
    """File and caption of every line."""
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            file = metadata.parent / row["file_name"]
            names = list(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ProbeError(
                f"dataset: {metadata}, line {number}: expected an object with 'file_name' ({error!r})"
            ) from error
        column = caption_column_of(names, caption_column)
        yield file, "" if column is None else as_caption(row[column])


def _beside(file: Path) -> str:
    caption = file.with_suffix(".txt")
    return caption.read_text(encoding="utf-8", errors="replace").strip() if caption.is_file() else ""


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
