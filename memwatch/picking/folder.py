"""Image folders that memwatch writes: a training set without some rows, and the whole folder of ``memwatch pick``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from memwatch.measure.captions import ProbeError
from memwatch.measure.image_folder import CHOICE, files_below, is_media, mask_of, read_image_folder
from memwatch.measure.metadata_files import METADATA, copy_table_without
from memwatch.picking.cache import read_survey, write_survey
from memwatch.picking.mix import PickedRow, Why
from memwatch.picking.page import render
from memwatch.picking.picked import Picked
from memwatch.picking.rows import as_training_set
from memwatch.picking.training_set import TrainingSet
from memwatch.run_folder import write_whole

BESIDE = (".txt", ".caption", ".json", ".npz")  # what trainers lay beside an image
MADE_BY = "memwatch pick"  # by this in ``choice.json`` a folder is known as one of ours
PAGE, SURVEY = "index.html", "survey.json"
TRAIN, CLASS, PROBES, CONTROLS = "train", "class", "probes", "controls"
ROTATION = 4096  # rows of the rotation that are kept


def check_out(out: Path, *sources: Path, is_ours: bool = False) -> None:
    """Raise a ``ValueError`` that says why, unless a folder may be written.

    Args:
        sources: folders that are only read; they must not lie in ``out``, nor ``out`` in them.
        is_ours: it may hold files, because memwatch has written them and replaces them.
    """
    for source in sources:
        a, b = out.resolve(), source.resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise ValueError(f"--out: got {str(out)!r}, allowed: a folder outside of {source}, which is only read")
    if out.exists() and not is_ours and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out: got {str(out)!r}, allowed: a new or empty folder")


def copy_without(
    rows: TrainingSet, out: Path, goes: Collection[int], copy: Callable[[Path, Path], object] = shutil.copyfile
) -> list[Path]:
    """Write a folder without the rows of ``goes``, whole or not at all: everything else is copied, whatever it is.

    A row goes with its mask and what lies beside it under its name, and out of the metadata file that names it; but
    nothing goes that a row that stays needs as well.

    Args:
        out: a new or empty folder.
        copy: puts one file in another place.

    Returns:
        The files that were left out, relative to the folder.
    """
    train, out = Path(rows.source), Path(os.path.realpath(out))
    found, files = read_image_folder(train, rows.caption_column).rows, files_below(train)
    if inside := [file for file in files if out.is_relative_to(os.path.realpath(file.parent))]:
        raise ValueError(
            f"--out: got {str(out)!r}, allowed: a folder outside of {inside[0].parent}, which TRAIN links to"
        )
    stays = {row.file for number, row in enumerate(found) if number not in goes}
    gone = {found[number].file for number in goes} - stays
    left_out = gone | _only_with(gone, stays, files)
    lines: dict[Path, set[int]] = {}  # of metadata files
    for row in (found[number] for number in goes):
        if row.metadata is not None:
            lines.setdefault(row.metadata, set()).add(row.number)
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    try:
        for file in (file for file in files if file not in left_out):
            target = part / file.relative_to(train)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in lines:
                copy_table_without(file, target, lines[file])
            elif file.is_file():
                (shutil.copyfile if file.name in METADATA else copy)(file, target)  # a link could be written through
            elif file.is_symlink():  # to nowhere, or to a folder that is there anyway
                target.symlink_to(os.readlink(file))
            else:
                raise ValueError(f"{file}: cannot be copied, because it is no regular file")
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(file.relative_to(train) for file in left_out.intersection(files))


def _only_with(gone: Collection[Path], stays: Collection[Path], files: Sequence[Path]) -> set[Path]:
    """Of these files the masks, captions and the like that belong to images that are gone, and to no other."""
    stems = {file.with_suffix("") for file in gone}
    of_rows = stems - {file.with_suffix("") for file in stays}
    alone = stems - {file.with_suffix("") for file in files if is_media(file) and file not in gone}  # read or not

    def goes(file: Path) -> bool:
        if file in stays or file.name in METADATA:
            return False
        if is_media(file):
            return mask_of(file, of_rows) is not None
        return file.suffix.lower() in BESIDE and file.with_suffix("") in alone

    return {file for file in files if goes(file)}


def linked(source: Path, target: Path) -> None:
    """A hard link; a symbolic one on another disk; a copy where there are no links."""
    source = source.resolve()  # a link to a link that is relative would lead nowhere
    for link in (os.link, lambda a, b: os.symlink(a, b), shutil.copyfile):
        try:
            link(source, target)
            return
        except (OSError, NotImplementedError) as error:
            failed = error
    raise failed


def is_ours(out: Path) -> bool:
    """Whether ``memwatch pick`` has written a folder."""
    try:
        saved = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and saved.get("made_by") == MADE_BY


def write_folder(picked: Picked, out: Path) -> Path:
    """Write what was picked from an image folder into a folder that ``check_out`` has passed. Returns the page.

    | file | holds |
    |---|---|
    | ``train/``, ``class/`` | links to what is trained on, with captions |
    | ``probes/``, ``controls/`` | pictures, byte for byte, and ``metadata.jsonl`` |
    | ``choice.json`` | the choice in numbers and names |
    | ``survey.json`` | what was found in the training set |
    | ``index.html`` | the page |

    These replace those of an earlier choice; whatever else lies in ``out`` stays.
    """
    trained_on = [(TRAIN, picked.rows, picked.held_out)]
    if picked.class_images is not None:
        trained_on.append((CLASS, picked.class_images, picked.class_held_out))
    looked_at = {PROBES: picked.probes(), CONTROLS: picked.controls()}
    if is_ours(out):
        for part in (TRAIN, CLASS, *looked_at):
            if os.path.lexists(out / part):
                shutil.rmtree(out / part)  # not where it is a link to elsewhere
    write_whole(out / CHOICE, json.dumps(_as_json(picked), indent=1, allow_nan=False) + "\n")
    write_survey(out / SURVEY, picked.survey)
    for part, probes in looked_at.items():
        lines = []
        for probe in probes:
            (out / part / probe.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(str(probe.image)), out / part / probe.name)
            line = {"file_name": probe.name, "text": probe.prompt} | ({} if probe.row is None else {"row": probe.row})
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if lines:
            write_whole(out / part / METADATA[0], "".join(lines))
    for part, rows, held_out in trained_on:
        copy_without(rows, out / part, set(held_out), linked)
    write_whole(out / PAGE, render(picked))
    return out / PAGE


def _as_json(picked: Picked) -> dict[str, Any]:
    rows, classes = picked.rows, picked.class_images
    number_of = {id(group): i for i, group in enumerate(picked.survey.groups)}
    watched = [
        {"row": w.row, "name": rows.name(w.row), "why": str(w.why), "group": number_of.get(id(w.group))}
        for w in picked.watched
    ]
    return {
        "made_by": MADE_BY,
        "source": str(Path(rows.source).absolute()),
        "budget": picked.budget,
        "seed": picked.seed,
        "prompt": rows.prompt,
        "caption_column": rows.caption_column,
        "notes": list(picked.notes),
        "watched": watched,
        "held_out": [{"row": row, "name": rows.name(row)} for row in picked.held_out],
        "class_images": [] if classes is None else [classes.name(row) for row in picked.class_held_out],
        "rotation": list(picked.rotation[:ROTATION]),
        "names": [rows.name(row) for row in range(len(rows))],
        "captions": [rows.caption(row) for row in range(len(rows))],
    }


def read_folder(out: Path) -> Picked:
    """What ``write_folder`` has written; of the class images the controls. The training folder may be gone.

    Raises:
        ProbeError: it is no such folder, or parts of it are missing.
    """
    survey = read_survey(out / SURVEY)
    if not is_ours(out) or survey is None or not (out / TRAIN).is_dir():
        what = f"picked: {str(out)!r} holds no whole choice of 'memwatch pick TRAIN --out {out}'"
        raise ProbeError(f"{what}; give that folder, or what memwatch.pick returns")
    saved = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    parts = [as_training_set(out / TRAIN, caption_column=saved["caption_column"], prompt=saved["prompt"])]
    if saved["held_out"] or saved["class_images"]:
        parts.insert(0, as_training_set(out / CONTROLS))
    known = {rows.name(row): (rows.raw(row), rows.caption(row)) for rows in parts for row in range(len(rows))}

    def named(folder: Path, names: list[str], prefix: str = "", captions: Sequence[str] | None = None) -> TrainingSet:
        """Rows of these names, wherever in ``out`` they lie."""
        if missing := [name for name in names if prefix + name not in known]:
            raise ProbeError(f"picked: {folder} has changed since it was written: {missing[0]} is missing")
        files, texts = zip(*(known[prefix + name] for name in names), strict=True)
        caption_of = (texts if captions is None else captions).__getitem__
        return TrainingSet(folder, len(names), files.__getitem__, caption_of, names=names)

    groups = [None if w["group"] is None else survey.groups[w["group"]] for w in saved["watched"]]
    return Picked(
        rows=named(out / TRAIN, saved["names"], captions=saved.get("captions")),  # earlier versions kept none
        survey=survey,
        watched=tuple(PickedRow(w["row"], Why(w["why"]), g) for w, g in zip(saved["watched"], groups, strict=True)),
        held_out=tuple(entry["row"] for entry in saved["held_out"]),
        rotation=tuple(saved["rotation"]),
        notes=tuple(saved["notes"]),
        class_images=named(out / CONTROLS, saved["class_images"], "class-") if saved["class_images"] else None,
        class_held_out=tuple(range(len(saved["class_images"]))),
        budget=saved["budget"],
        seed=saved["seed"],
    )
