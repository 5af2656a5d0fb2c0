"""``memwatch clean TRAIN --flagged FILE --out TRAIN2``: an image folder without the rows behind what was found."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from memwatch.act.flagged import FLAGGED, Flagged, read_flagged
from memwatch.cli.scan import require_option
from memwatch.judge.alerts import Verdict
from memwatch.measure.probes import IMAGE_SUFFIXES
from memwatch.picking.folder_rows import METADATA
from memwatch.picking.rows import TrainingSet, as_training_set
from memwatch.picking.words import counted, listed

OTHER_METADATA = ("metadata.csv", "metadata.parquet")
VERDICTS = (str(Verdict.MEMORIZED), str(Verdict.SUSPICIOUS))
EPILOG = f"""\
TRAIN is an image folder, and is only read. {FLAGGED} lies in the output_dir of a run that picked its probes from TRAIN.
Images are copied byte for byte, together with what lies beside them under the same name (captions), and the lines of
every {METADATA} with all their keys. --keep one leaves the first image of each group; one that has no group goes all
the same. Exit code: 0 done, 2 nothing was written, for the one reason given.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write an image folder without the images behind memorized probes, their duplicates included."
    parser.epilog = EPILOG
    add = parser.add_argument
    add("train", metavar="TRAIN", type=Path, help="the image folder")
    add("--flagged", metavar="FILE", type=Path, required=True, help=f"{FLAGGED} of a run")
    add("--out", metavar="TRAIN2", type=Path, required=True, help="a new or empty folder")
    add("--keep", choices=["none", "one"], default="none", help="of each group (default: %(default)s)")
    help_ = "the least that counts; suspicious takes both (default: %(default)s)"
    add("--verdict", choices=VERDICTS, default=VERDICTS[0], help=help_)


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises a ``ValueError`` or ``OSError`` where nothing can be written."""
    require_option(args.train.is_dir(), "TRAIN", str(args.train), "an image folder")
    check_out(args.out, args.train)
    bad = [f for f in read_flagged(args.flagged) if f.is_memorized or args.verdict == Verdict.SUSPICIOUS]
    flagged, others = [f for f in bad if f.files], [f.probe for f in bad if not f.files]
    if not flagged:
        least = "memorized" if args.verdict == Verdict.MEMORIZED else "suspicious or memorized"
        raise ValueError(f"{args.flagged}: no probe from a training set is {least}, so there is nothing to leave out")
    rows = as_training_set(args.train)
    found = rows_named(flagged, rows, args.train)
    kept = first_of_groups(list(found.values())) if args.keep == "one" else set()
    goes = {row for some in found.values() for row in some} - kept
    if len(goes) == len(rows):
        raise ValueError(f"every image of {args.train} is flagged; --keep one leaves one of each group")
    copy_without(rows, args.train, args.out, goes)
    for f in flagged:
        print(told(f, found[f.probe], goes))
    if others:
        print(f"not of the training set, so nothing is left out for them: {listed(others)}")
    print(f"{len(goes)} of {counted(len(rows), 'image')} left out; the others are in {args.out}")
    return 0


def check_out(out: Path, train: Path) -> None:
    """See that a folder may be written.

    Raises:
        ValueError: it exists and is not empty, or lies in the training set.
    """
    inside = out.resolve().is_relative_to(train.resolve())
    require_option(not inside, "--out", str(out), f"a folder outside of {train}, which is only read")
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require_option(is_free, "--out", str(out), "a new or empty folder")


def rows_named(flagged: Sequence[Flagged], rows: TrainingSet, train: Path) -> dict[str, list[int]]:
    """By probe, the rows of the training set that its files are.

    Raises:
        ValueError: some are not in it; the message names them.
    """
    by_name = {rows.name(row): row for row in range(len(rows))}
    root, missing = train.resolve(), []

    def row_of(file: str) -> int | None:
        path = Path(file).resolve()
        inside = path.relative_to(root).as_posix() if path.is_relative_to(root) else file
        return by_name.get(file, by_name.get(inside))

    found: dict[str, list[int]] = {}
    for f in flagged:
        known = {file: row_of(file) for file in f.files}
        found[f.probe] = [row for row in known.values() if row is not None]
        missing += [file for file, row in known.items() if row is None]
    if missing:
        names = listed(list(dict.fromkeys(missing)))
        raise ValueError(f"--flagged: names files that are not in {train}: {names}; it is of another training set")
    return found


def first_of_groups(groups: Sequence[Collection[int]]) -> set[int]:
    """The first row of each group of two or more; groups that share rows are one."""
    merged: list[set[int]] = []
    for group in groups:
        apart = [other for other in merged if other.isdisjoint(group)]
        together = set(group).union(*(other for other in merged if not other.isdisjoint(group)))
        merged = [*apart, together]
    return {min(group) for group in merged if len(group) > 1}


def told(flagged: Flagged, rows: Sequence[int], goes: Collection[int]) -> str:
    """Why images go, and how many."""
    kept = sum(row not in goes for row in rows)
    number = f"{len(rows) - kept} left out" + (f", {kept} kept" if kept else "")
    what = f"{flagged.verdict} at step {flagged.step}, {flagged.severity:.1f}x"
    return f"{flagged.probe}: {what}; {flagged.why}: {number}"


def copy_without(rows: TrainingSet, train: Path, out: Path, goes: Collection[int]) -> None:
    """Write the folder, whole or not at all.

    Raises:
        ValueError: a file lies outside of ``train``, or the captions are in a form that cannot be kept.
    """
    other = [file for name in OTHER_METADATA for file in train.rglob(name)]
    if other:
        raise ValueError(f"TRAIN: captions in {other[0]} cannot be kept, allowed: {METADATA}, or NAME.txt")
    files = {row: rows.file(row) for row in range(len(rows))}
    stray = [file for file in files.values() if file is None or not file.is_relative_to(train)]
    if stray:
        raise ValueError(f"TRAIN: {stray[0]} lies outside of {train}")
    beside = captions_in(train)
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    try:
        part.mkdir(parents=True)
        for row, file in files.items():
            if row not in goes and file is not None:
                copy([file, *beside.get(file.with_suffix(""), ())], part / file.parent.relative_to(train))
        gone = {file.resolve() for row in goes if (file := files[row]) is not None}
        for metadata in train.rglob(METADATA):
            copy_lines(metadata, part / metadata.relative_to(train), gone)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def captions_in(train: Path) -> dict[Path, list[Path]]:
    """By path without suffix, the files that are no images."""
    found: dict[Path, list[Path]] = {}
    for file in train.rglob("*"):
        if file.suffix.lower() not in IMAGE_SUFFIXES and file.name != METADATA and file.is_file():
            found.setdefault(file.with_suffix(""), []).append(file)
    return found


def copy(files: Sequence[Path], folder: Path) -> None:
    """Copy files, byte for byte. One that is missing stays missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def copy_lines(metadata: Path, target: Path, gone: Collection[Path]) -> None:
    """The lines of a ``metadata.jsonl`` as they are, but those of images that are gone."""

    def stays(line: str) -> bool:
        row = json.loads(line)
        name = row.get("file_name") if isinstance(row, Mapping) else None
        return name is None or (metadata.parent / name).resolve() not in gone

    lines = [line for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{line}\n" for line in lines if stays(line)), encoding="utf-8")
