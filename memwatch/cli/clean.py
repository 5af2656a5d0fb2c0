"""``memwatch clean TRAIN --flagged FILE --out TRAIN2``: an image folder without the rows behind what was found."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from memwatch.act.flagged import FLAGGED, Flagged, read_flagged
from memwatch.cli import require_option
from memwatch.judge.verdict import Verdict
from memwatch.messages import counted, listed
from memwatch.picking.folder import check_out, copy_without
from memwatch.picking.rows import as_training_set
from memwatch.picking.training_set import TrainingSet

VERDICTS = (str(Verdict.MEMORIZED), str(Verdict.SUSPICIOUS))
EPILOG = f"""\
TRAIN is an image folder, and is only read. {FLAGGED} lies in the output_dir of a run that picked its probes from TRAIN.
All else in it is copied byte for byte, whatever it is; a flagged image goes with its caption and mask, and out of the
metadata file that names it. Each file that is left out is named. --keep one keeps the first image of each group; a
single image is left out all the same. Exit code: 0 done, 2 nothing was written, for the reason given.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write an image folder without the images behind memorized probes, their duplicates included."
    parser.epilog = EPILOG
    add = parser.add_argument
    add("train", metavar="TRAIN", type=Path, help="the image folder")
    add("--flagged", metavar="FILE", type=Path, required=True, help=f"{FLAGGED} of a run")
    add("--out", metavar="TRAIN2", type=Path, required=True, help="a new or empty folder")
    add("--keep", choices=["none", "one"], default="none", help="of each group (default: %(default)s)")
    help_ = "suspicious leaves out what is behind suspicious probes as well (default: %(default)s)"
    add("--verdict", choices=VERDICTS, default=VERDICTS[0], help=help_)


def run(args: argparse.Namespace) -> int:
    require_option(args.train.is_dir(), "TRAIN", str(args.train), "an image folder")
    check_out(args.out, args.train)
    bad = [f for f in read_flagged(args.flagged) if f.is_memorized or args.verdict == Verdict.SUSPICIOUS]
    flagged, others = [f for f in bad if f.files], [f.probe for f in bad if not f.files]
    if not flagged:
        least = "memorized" if args.verdict == Verdict.MEMORIZED else "suspicious or memorized"
        raise ValueError(f"{args.flagged}: no probe from a training set is {least}; there is nothing to leave out")
    rows = as_training_set(args.train)
    found = rows_named(flagged, rows, args.train)
    kept = first_of_groups(list(found.values())) if args.keep == "one" else set()
    goes = {row for some in found.values() for row in some} - kept
    if len(goes) == len(rows):
        raise ValueError(f"every image of {args.train} is flagged, and would be left out; nothing was written")
    left_out = copy_without(rows, args.out, goes)
    for f in flagged:
        kept_of_it = sum(row not in goes for row in found[f.probe])
        number = f"{len(found[f.probe]) - kept_of_it} left out" + (f", {kept_of_it} kept" if kept_of_it else "")
        print(f"{f.probe}: {f.verdict} at step {f.step}, {f.severity:.1f}x; {f.why}: {number}")
    if others:
        print(f"nothing is left out for these probes, which are not from the training set: {listed(others)}")
    for name in map(str, left_out):
        print(f"left out: {name if name.isprintable() else repr(name)}")
    for note in rows.notes:
        print(note)
    print(f"{len(goes)} of {counted(len(rows), 'image')} left out; all else is in {args.out}")
    return 0


def rows_named(flagged: Sequence[Flagged], rows: TrainingSet, train: Path) -> dict[str, list[int]]:
    """By probe, the rows of the training set that its files are; a ``ValueError`` names those that are not in it."""
    row_of: dict[str, list[int]] = {}
    for row in range(len(rows)):  # a run on a data set that was loaded from the folder knows paths
        row_of.setdefault(place_of(rows.raw(row)), []).append(row)
    row_of |= {rows.name(row): row_of[place_of(rows.raw(row))] for row in range(len(rows))}  # all rows of the file
    files = {file: file if file in row_of else place_of(Path(file)) for f in flagged for file in f.files}
    if missing := [file for file, known in files.items() if known not in row_of]:
        why = "it belongs to another training set"
        if all(file.startswith("row-") for file in missing):
            why = "the run was given rows, not a folder, so it has their numbers only; train on a folder to use clean"
        raise ValueError(f"--flagged: it names files that are not in {train}: {listed(missing)}; {why}")
    return {f.probe: sorted({row for file in f.files for row in row_of[files[file]]}) for f in flagged}


def place_of(file: Path) -> str:
    """A file by the resolved path of its folder: two links to one file are two images."""
    return str(file.parent.resolve() / file.name)


def first_of_groups(groups: Sequence[Collection[int]]) -> set[int]:
    """The first row of each group of two or more; groups that share rows are one."""
    merged: list[set[int]] = []
    for group in groups:
        apart = [other for other in merged if other.isdisjoint(group)]
        together = set(group).union(*(other for other in merged if not other.isdisjoint(group)))
        merged = [*apart, together]
    return {min(group) for group in merged if len(group) > 1}
