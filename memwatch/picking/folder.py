"""The folder of ``memwatch pick``: what to train on, probes, controls and peers as image folders, and a page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memwatch.measure.probes import Probe, ProbeError
from memwatch.picking.cache import read_survey, write_survey
from memwatch.picking.image_folder import METADATA, copy_without, files_of, linked
from memwatch.picking.mix import PickedRow, Why
from memwatch.picking.page import render
from memwatch.picking.picked import Picked
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import Survey
from memwatch.picking.training_set import TrainingSet
from memwatch.run_folder import write_whole

MADE_BY = "memwatch pick"  # by this in ``choice.json`` a folder is known as one of ours
CHOICE, PAGE, SURVEY = "choice.json", "index.html", "survey.json"
TRAIN, CLASS, PROBES, CONTROLS, PEERS = "train", "class", "probes", "controls", "peers"
ROTATION = 4096  # rows of the rotation that are kept


def is_ours(out: Path) -> bool:
    """Whether ``memwatch pick`` has written a folder."""
    try:
        saved = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and saved.get("made_by") == MADE_BY


def write_folder(picked: Picked, out: Path) -> Path:
    """Write what was picked from an image folder into a folder that ``check_out`` has passed.

    | file | holds |
    |---|---|
    | ``train/``, ``class/`` | links to what is trained on, with captions |
    | ``probes/``, ``controls/``, ``peers/`` | pictures, byte for byte, and ``metadata.jsonl`` |
    | ``choice.json`` | the choice in numbers and names |
    | ``survey.json`` | what was found in the training set |
    | ``index.html`` | the page |

    These replace those of an earlier choice; whatever else lies in ``out`` stays.

    Returns:
        The page.

    Raises:
        ValueError: the captions are in a form that cannot be kept; then nothing is written.
    """
    trained_on = [(TRAIN, picked.rows, picked.held_out)]
    if picked.class_images is not None:
        trained_on.append((CLASS, picked.class_images, picked.class_held_out))
    for _, rows, _ in trained_on:
        files_of(rows)
    looked_at = {PROBES: picked.probes(), CONTROLS: picked.controls(), PEERS: picked.peer_probes()}
    if is_ours(out):
        for part in (TRAIN, CLASS, *looked_at):
            shutil.rmtree(out / part, ignore_errors=True)
    write_whole(out / CHOICE, json.dumps(as_json(picked), indent=1, allow_nan=False) + "\n")
    write_survey(out / SURVEY, picked.survey)
    for part, probes in looked_at.items():
        copy_probes(probes, out / part)
    for part, rows, held_out in trained_on:
        copy_without(rows, out / part, set(held_out), linked)
    write_whole(out / PAGE, render(picked))
    return out / PAGE


def copy_probes(probes: Sequence[Probe], folder: Path) -> None:
    """Copy the files of probes, under the probes' names, and write ``metadata.jsonl``; no folder for no probes."""
    lines = []
    for probe in probes:
        (folder / probe.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(str(probe.image)), folder / probe.name)
        row = {} if probe.row is None else {"row": probe.row}
        lines.append(json.dumps({"file_name": probe.name, "text": probe.prompt} | row, ensure_ascii=False) + "\n")
    if lines:
        write_whole(folder / METADATA, "".join(lines))


def as_json(picked: Picked) -> dict[str, Any]:
    """A choice as plain values."""
    rows, classes = picked.rows, picked.class_images
    number_of = {id(group): i for i, group in enumerate(picked.survey.groups)}

    def named(indices: Iterable[int]) -> list[dict[str, Any]]:
        return [{"row": row, "name": rows.name(row)} for row in indices]

    return {
        "made_by": MADE_BY,
        "source": str(Path(rows.source).absolute()),
        "budget": picked.budget,
        "seed": picked.seed,
        "prompt": rows.prompt,
        "caption_column": rows.caption_column,
        "notes": list(picked.notes),
        "watched": [
            {"row": w.row, "name": rows.name(w.row), "why": str(w.why), "group": number_of.get(id(w.group))}
            for w in picked.watched
        ],
        "held_out": named(picked.held_out),
        "class_images": [] if classes is None else [classes.name(row) for row in picked.class_held_out],
        "peers": named(picked.peers),
        "rotation": list(picked.rotation[:ROTATION]),
        "names": [rows.name(row) for row in range(len(rows))],
    }


def read_folder(out: Path) -> Picked:
    """What ``write_folder`` has written. The original training folder need not be there any more.

    Of the class images only the controls are in it; those that are trained on lie in ``class/``.

    Raises:
        ProbeError: it is no such folder, or parts of it are missing.
    """
    survey = read_survey(out / SURVEY)
    if not is_ours(out) or survey is None or not (out / TRAIN).is_dir():
        what = f"picked: {str(out)!r} holds no whole choice of 'memwatch pick TRAIN --out {out}'"
        raise ProbeError(f"{what}; give that folder, or what memwatch.pick returns")
    saved = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    train = as_training_set(out / TRAIN, caption_column=saved["caption_column"], prompt=saved["prompt"])
    aside = as_training_set(out / CONTROLS) if saved["held_out"] or saved["class_images"] else None
    known = {rows.name(row): (rows, row) for rows in (aside, train) if rows is not None for row in range(len(rows))}
    classes = {name: known.get(f"class-{name}") for name in saved["class_images"]}
    return Picked(
        _rows_from(out / TRAIN, {name: known.get(name) for name in saved["names"]}),
        survey,
        _watched(saved["watched"], survey),
        tuple(entry["row"] for entry in saved["held_out"]),
        tuple(entry["row"] for entry in saved["peers"]),
        tuple(saved["rotation"]),
        tuple(saved["notes"]),
        _rows_from(out / CONTROLS, classes) if classes else None,
        tuple(range(len(classes))),
        saved["budget"],
        saved["seed"],
    )


def _watched(entries: Sequence[dict[str, Any]], survey: Survey) -> tuple[PickedRow, ...]:
    groups = [None if entry["group"] is None else survey.groups[entry["group"]] for entry in entries]
    return tuple(PickedRow(e["row"], Why(e["why"]), group) for e, group in zip(entries, groups, strict=True))


def _rows_from(folder: Path, found: dict[str, tuple[TrainingSet, int] | None]) -> TrainingSet:
    """Rows by name, each a row of another set; ``None`` where it is missing."""
    if missing := [name for name, at in found.items() if at is None]:
        raise ProbeError(f"picked: {folder} has changed since it was written: {missing[0]} is missing")
    at = [at for at in found.values() if at is not None]

    def raw(row: int) -> Any:
        rows, number = at[row]
        return rows.raw(number)

    def caption(row: int) -> str:
        rows, number = at[row]
        return rows.caption(number)

    return TrainingSet(folder, len(at), raw, caption, folder=folder, names=list(found))
