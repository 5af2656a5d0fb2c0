"""``memwatch pick TRAIN --out DIR``: what to watch of a training set, shown before training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from memwatch.cli.scan import require_option
from memwatch.config import PickConfig
from memwatch.measure.probes import ProbeError
from memwatch.picking.choice import choose, training_set
from memwatch.picking.folder import claim, write_folder

DEFAULTS = PickConfig()
EPILOG = """\
TRAIN is an image folder (captions in metadata.jsonl, or NAME.txt beside NAME.png), or a folder that
datasets.Dataset.save_to_disk has written. It is only read. The folder DIR then holds probes/, controls/ and peers/ as
image folders with a metadata.jsonl, choice.json (rows by number and name), and index.html, a page that shows the
choice. Rows that are held out must not be trained on: leave out those that choice.json names. Exit code: 0 done, 1 some
rows cannot be read (they are named), 2 nothing could be done, for the one reason given.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Pick what to watch of a training set: duplicates, shared parts, outliers, and what is normal."
    parser.epilog = EPILOG
    add = parser.add_argument
    add("train", metavar="TRAIN", type=Path, help="the training set")
    add("--out", metavar="DIR", type=Path, required=True, help="a new folder, or an earlier choice, which is renewed")
    add("--probes", type=int, default=16, metavar="N", help="rows that are watched (default: %(default)s)")
    help_ = "rows that are held out from training as controls; 0 for none (default: %(default)s)"
    add("--hold-out", type=int, default=DEFAULTS.hold_out, metavar="N", help=help_)
    help_ = "pictures of a set too small for that which are held out all the same: siblings of a subject"
    add("--set-aside", type=int, default=DEFAULTS.set_aside, metavar="N", help=help_)
    help_ = "ordinary training images, a second reference (default: %(default)s)"
    add("--peers", type=int, default=DEFAULTS.peers, metavar="N", help=help_)
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn at random (default: %(default)s)")
    help_ = "images that are not trained on, instead of rows held out; what is trained on all the same is named"
    add("--controls", type=Path, metavar="DIR", help=help_)
    add("--image-column", metavar="NAME", help="of the images; default: the names that training scripts use")
    add("--caption-column", metavar="NAME", help="of the captions; likewise")


def run(args: argparse.Namespace) -> int:
    """0; or 1 when rows could not be read."""
    require_option(args.probes >= 1, "--probes", args.probes, "1 or greater")
    require_option(args.seed >= 0, "--seed", args.seed, "0 or greater")
    require_option(args.train.is_dir(), "TRAIN", str(args.train), "an image folder, or one of save_to_disk")
    ok = args.controls is None or args.controls.is_dir()
    require_option(ok, "--controls", str(args.controls), "an image folder")
    names = ("hold_out", "set_aside", "peers", "image_column", "caption_column")
    pick = PickConfig(**{name: getattr(args, name) for name in names})
    rows = training_set(opened(args.train), pick)
    claim(args.out, args.train, *([args.controls] if args.controls is not None else []))
    choice = choose(rows, pick, probes=args.probes, seed=args.seed, controls=args.controls)
    page = write_folder(choice, args.out)
    for note in choice.notes:
        print(f"{note}.")
    unreadable = choice.survey.unreadable
    for row, why in unreadable.items():
        print(f"cannot be read: {choice.rows.name(row)}: {why}", file=sys.stderr)
    print(f"page: {page}")
    return 1 if unreadable else 0


def opened(train: Path) -> Any:
    """What is in a folder: a dataset that was saved, or images.

    Raises:
        ProbeError: it is a saved dataset that cannot be read.
    """
    is_saved = (train / "state.json").is_file() or (train / "dataset_dict.json").is_file()
    if not is_saved:
        return train
    try:
        from datasets import load_from_disk  # type: ignore[import-untyped]
    except ImportError as error:
        raise ProbeError(f"{train} holds a saved dataset, and the package 'datasets' is not installed") from error
    saved: Any = load_from_disk(str(train))
    if hasattr(saved, "column_names") and not isinstance(saved, dict):
        return saved
    if "train" not in saved:
        raise ProbeError(f"{train} holds the splits {', '.join(saved)}; 'train' is not among them")
    return saved["train"]
