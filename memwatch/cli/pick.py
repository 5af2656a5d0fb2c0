"""``memwatch pick TRAIN --out DIR``: what to watch and what to hold out of a training set, ahead of training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memwatch.cli import require_option
from memwatch.picking.folder import check_out, is_ours, write_folder
from memwatch.picking.pick import pick

EPILOG = """\
TRAIN is an image folder (captions in metadata.jsonl, .csv or .parquet, or in NAME.txt or NAME.caption beside NAME.png).
It is only read. The folder DIR then holds train/ (links to what is trained on, with captions: --train_data_dir
DIR/train), with --class-images class/, and probes/ and controls/ as image folders, choice.json (rows by number and
name), and index.html, a page that shows the choice. Give DIR to MemWatch as picked=DIR, or in its settings as
'picked: DIR'. Exit code: 0 done, 1 some rows cannot be read (they are named), 2 nothing could be done, for the one
reason given.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Pick what to watch of a training set, and hold out controls: links to the rest are what to train on."
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add("train", metavar="TRAIN", type=Path, help="the training images")
    add("--out", metavar="DIR", type=Path, required=True, help="a new folder, or an earlier choice, which is replaced")
    add("--probes", type=int, default=16, metavar="N", help="rows that are watched (default: %(default)s)")
    help_ = "rows that are held out from training as controls; 0 for none (default: %(default)s)"
    add("--controls", type=int, default=20, metavar="N", help=help_)
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn at random (default: %(default)s)")
    add("--prompt", metavar="TEXT", help="the caption of images that have none (DreamBooth: the instance prompt)")
    add("--class-images", metavar="CLASS", type=Path, help="DreamBooth's class images; up to half become controls")
    add("--class-prompt", metavar="TEXT", help="their caption")
    add("--caption-column", metavar="NAME", help="of the metadata file; default: the names that training scripts use")


def run(args: argparse.Namespace) -> int:
    """0; or 1 when rows could not be read."""
    require_option(args.probes >= 1, "--probes", args.probes, "1 or greater")
    sources = [args.train, *([args.class_images] if args.class_images is not None else [])]
    for option, folder in zip(("TRAIN", "--class-images"), sources, strict=False):
        require_option(folder.is_dir(), option, str(folder), "an image folder")
    check_out(args.out, *sources, is_ours=is_ours(args.out))
    names = ("probes", "controls", "seed", "prompt", "class_images", "class_prompt", "caption_column")
    picked = pick(args.train, **{name: getattr(args, name) for name in names})
    page = write_folder(picked, args.out)
    for note in picked.notes:
        print(f"{note}.")
    unreadable = picked.survey.unreadable
    for row, why in unreadable.items():
        print(f"cannot be read: {picked.rows.name(row)}: {why}", file=sys.stderr)
    print(f"page: {page}")
    return 1 if unreadable else 0
