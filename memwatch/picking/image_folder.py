"""An image folder: read as rows (captions in ``metadata.jsonl`` or beside the files), and copied without some rows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memwatch.measure.probes import IMAGE_SUFFIXES, ProbeError
from memwatch.picking.training_set import TrainingSet

METADATA = "metadata.jsonl"
OTHER_METADATA = ("metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt", "captions", "prompts")

Copy = Callable[[Path, Path], object]


# --- read ------------------------------------------------------------------------------------------------------------


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
    visible = {file for file in shown if not any(part.startswith(".") for part in file.relative_to(folder).parts)}
    files = sorted(visible | set(captions))
    if not files:
        raise ProbeError(f"dataset: {str(folder)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    texts = [captions[file] if file in captions else _beside(file) for file in files]
    image_of, caption_of = files.__getitem__, texts.__getitem__
    return TrainingSet(folder, len(files), image_of, caption_of, folder=folder, caption_column=caption_column)


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
        column = caption_column_of(list(row), caption_column)
        yield file, "" if column is None else as_caption(row[column])


def _beside(file: Path) -> str:
    caption = file.with_suffix(".txt")
    return caption.read_text(encoding="utf-8", errors="replace").strip() if caption.is_file() else ""


def column_of(names: Sequence[str], given: str | None, known: Sequence[str], key: str) -> str | None:
    """The column that is given, else the first known one; ``None`` where neither is there.

    Args:
        key: what the argument is called, for the message.

    Raises:
        ProbeError: the given one is not there.
    """
    if given is not None and given not in names:
        raise ProbeError(f"dataset: {key} is {given!r}, but its columns are: {', '.join(names)}")
    return given or next((name for name in known if name in names), None)


def caption_column_of(names: Sequence[str], given: str | None) -> str | None:
    """The column of captions, see ``column_of``."""
    return column_of(names, given, CAPTION_COLUMNS, "caption_column")


def as_caption(value: Any) -> str:
    """A caption as text; of several the first."""
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    return value if isinstance(value, str) else ""


# --- copy ------------------------------------------------------------------------------------------------------------


def check_out(out: Path, *sources: Path, is_ours: bool = False) -> None:
    """See that a folder may be written; nothing is.

    Args:
        sources: folders that are only read; they must not lie in ``out``, nor ``out`` in them.
        is_ours: it may hold files, because memwatch has written them and replaces them.

    Raises:
        ValueError: it may not be written; the message says why.
    """
    for source in sources:
        a, b = out.resolve(), source.resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise ValueError(f"--out: got {str(out)!r}, allowed: a folder outside of {source}, which is only read")
    if out.exists() and not is_ours and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out: got {str(out)!r}, allowed: a new or empty folder")


def copy_without(rows: TrainingSet, out: Path, goes: Collection[int], copy: Copy = shutil.copyfile) -> None:
    """Write an image folder without some rows, whole or not at all: images, captions, lines of ``metadata.jsonl``.

    Args:
        rows: of the image folder. goes: the numbers of those that are left out.
        out: a new or empty folder.
        copy: puts one file in another place.

    Raises:
        ValueError: as ``files_of``.
    """
    train, files = Path(rows.source), files_of(rows)
    beside = _captions_in(train)
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    try:
        part.mkdir(parents=True)
        for row, file in enumerate(files):
            if row not in goes:
                _copy_files([file, *beside.get(file.with_suffix(""), ())], part / file.parent.relative_to(train), copy)
        gone = {files[row].resolve() for row in goes}
        for metadata in train.rglob(METADATA):
            copy_lines(metadata, part / metadata.relative_to(train), gone)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def linked(source: Path, target: Path) -> None:
    """A hard link; a symbolic one on another disk; a copy where there are no links."""
    for link in (os.link, lambda a, b: os.symlink(a.absolute(), b), shutil.copyfile):
        try:
            link(source, target)
            return
        except (OSError, NotImplementedError) as error:
            failed = error
    raise failed


def files_of(rows: TrainingSet) -> list[Path]:
    """The file of every row of an image folder.

    Raises:
        ValueError: one lies outside of the folder, or the captions are in a form that cannot be kept.
    """
    train = Path(rows.source)
    if other := [file for name in OTHER_METADATA for file in train.rglob(name)]:
        raise ValueError(f"TRAIN: captions in {other[0]} cannot be kept, allowed: {METADATA}, or NAME.txt")
    files = [Path(rows.raw(row)) for row in range(len(rows))]
    if outside := [file for file in files if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(train))]:
        raise ValueError(f"TRAIN: {outside[0]} lies outside of {train}")
    return files


def _captions_in(train: Path) -> dict[Path, list[Path]]:
    """By path without suffix, the files that are no images."""
    found: dict[Path, list[Path]] = {}
    for file in train.rglob("*"):
        if file.suffix.lower() not in IMAGE_SUFFIXES and file.name != METADATA and file.is_file():
            found.setdefault(file.with_suffix(""), []).append(file)
    return found


def _copy_files(files: Sequence[Path], folder: Path, copy: Copy) -> None:
    """Put files into a folder. One that is missing stays missing, one that is there already is left."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.is_file() and not (folder / file.name).exists():
            copy(file, folder / file.name)


def copy_lines(metadata: Path, target: Path, gone: Collection[Path]) -> None:
    """Copy the lines of a ``metadata.jsonl`` as they are, but those of images that are gone."""

    def stays(line: str) -> bool:
        row = json.loads(line)
        name = row.get("file_name") if isinstance(row, Mapping) else None
        return name is None or (metadata.parent / name).resolve() not in gone

    lines = [line for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{line}\n" for line in lines if stays(line)), encoding="utf-8")
