"""An image folder without some of its rows: images, what lies beside them, and the lines of ``metadata.jsonl``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from memwatch.measure.probes import IMAGE_SUFFIXES
from memwatch.picking.folder_rows import METADATA
from memwatch.picking.training_set import TrainingSet

OTHER_METADATA = ("metadata.csv", "metadata.parquet")

Copy = Callable[[Path, Path], object]


def linked(source: Path, target: Path) -> None:
    """A hard link; a symbolic one on another disk; a copy where there are no links."""
    for link in (os.link, lambda a, b: os.symlink(a.absolute(), b), shutil.copyfile):
        try:
            link(source, target)
            return
        except (OSError, NotImplementedError) as error:
            failed = error
    raise failed


def copy_without(
    rows: TrainingSet, train: Path, out: Path, goes: Collection[int], copy: Copy = shutil.copyfile
) -> None:
    """Write the folder, whole or not at all.

    Args:
        rows: those of ``train``. goes: the numbers of those that are left out.
        out: a new or empty folder.
        copy: puts one file in another place.

    Raises:
        ValueError: as ``files_of``.
    """
    files, beside = files_of(rows, train), captions_in(train)
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    try:
        part.mkdir(parents=True)
        for row, file in files.items():
            if row not in goes:
                copy_files([file, *beside.get(file.with_suffix(""), ())], part / file.parent.relative_to(train), copy)
        gone = {files[row].resolve() for row in goes}
        for metadata in train.rglob(METADATA):
            copy_lines(metadata, part / metadata.relative_to(train), gone)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def files_of(rows: TrainingSet, train: Path) -> dict[int, Path]:
    """The file of every row of an image folder.

    Raises:
        ValueError: one lies outside of ``train``, or the captions are in a form that cannot be kept.
    """
    if other := [file for name in OTHER_METADATA for file in train.rglob(name)]:
        raise ValueError(f"TRAIN: captions in {other[0]} cannot be kept, allowed: {METADATA}, or NAME.txt")
    files: dict[int, Path] = {}
    for row in range(len(rows)):
        file = rows.file(row)
        if file is None or not file.is_relative_to(train):
            raise ValueError(f"TRAIN: {file} lies outside of {train}")
        files[row] = file
    return files


def captions_in(train: Path) -> dict[Path, list[Path]]:
    """By path without suffix, the files that are no images."""
    found: dict[Path, list[Path]] = {}
    for file in train.rglob("*"):
        if file.suffix.lower() not in IMAGE_SUFFIXES and file.name != METADATA and file.is_file():
            found.setdefault(file.with_suffix(""), []).append(file)
    return found


def copy_files(files: Sequence[Path], folder: Path, copy: Copy) -> None:
    """Put files into a folder. One that is missing stays missing, one that is there already is left."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.is_file() and not (folder / file.name).exists():
            copy(file, folder / file.name)


def copy_lines(metadata: Path, target: Path, gone: Collection[Path]) -> None:
    """The lines of a ``metadata.jsonl`` as they are, but those of images that are gone."""

    def stays(line: str) -> bool:
        row = json.loads(line)
        name = row.get("file_name") if isinstance(row, Mapping) else None
        return name is None or (metadata.parent / name).resolve() not in gone

    lines = [line for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{line}\n" for line in lines if stays(line)), encoding="utf-8")
