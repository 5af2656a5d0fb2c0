"""The folder of ``memwatch pick``: what to train on, probes, controls and peers as image folders, and a page."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memwatch.measure.probes import Probe, ProbeError, as_probes
from memwatch.picking.cache import read_survey, write_survey
from memwatch.picking.image_folder import METADATA, copy_without, files_of, linked
from memwatch.picking.mix import PickedRow, Why
from memwatch.picking.page import render
from memwatch.picking.picked import Picked
from memwatch.picking.rows import as_training_set
from memwatch.picking.training_set import TrainingSet
from memwatch.run_folder import write_whole

MADE_BY = "memwatch pick"  # by this in ``choice.json`` a folder is known as one of ours
CHOICE, PAGE, SURVEY = "choice.json", "index.html", "survey.json"
TRAIN, CLASS = "train", "class"
ROTATION = 4096  # rows of the rotation that are kept

Files = list[tuple[str, Probe]]


def check_out(out: Path, *sources: Path) -> None:
    """See that a folder may be written; nothing is.

    Args:
        sources: folders that are read; they must not lie in ``out``, nor ``out`` in them.

    Raises:
        ValueError: it may not be written; the message says why.
    """
    for source in sources:
        a, b = out.resolve(), source.resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise ValueError(f"--out: got {str(out)!r}, allowed: a folder outside of {source}, which is only read")
    if out.exists() and not (out.is_dir() and (is_ours(out) or not any(out.iterdir()))):
        raise ValueError(f"--out: got {str(out)!r}, allowed: a new folder, or one that memwatch pick has written")


def is_ours(out: Path) -> bool:
    """Whether ``memwatch pick`` has written a folder."""
    try:
        saved = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and saved.get("made_by") == MADE_BY


def write_folder(picked: Picked, out: Path) -> Path:
    """Write what was picked from an image folder into a folder that ``check_out`` has passed.

    What an earlier choice left there goes.

    | file | holds |
    |---|---|
    | ``train/``, ``class/`` | links to what is trained on, with captions |
    | ``probes/``, ``controls/``, ``peers/`` | pictures, byte for byte, and ``metadata.jsonl`` |
    | ``choice.json`` | the choice in numbers and names |
    | ``survey.json`` | what was found in the training set |
    | ``index.html`` | the page |

    Returns:
        The page.

    Raises:
        ValueError: the captions are in a form that cannot be kept; then nothing is written.
    """
    linked_parts = [(TRAIN, picked.rows, picked.held_out), (CLASS, picked.class_images, picked.class_held_out)]
    for _, rows, _ in linked_parts:
        if rows is not None and rows.folder is not None:
            files_of(rows, rows.folder)
    parts = {"probes": picked.probes(), "controls": picked.controls(), "peers": picked.peer_probes()}
    files = {part: named_files(probes) for part, probes in parts.items()}
    ours = [f"{part}/{name}" for part, some in files.items() for name in (*(name for name, _ in some), METADATA)]
    clear(out)
    write_whole(out / CHOICE, json.dumps(as_json(picked) | {"files": ours}, indent=1, allow_nan=False) + "\n")
    for part, some in files.items():
        write_part(out / part, some)
    for part, rows, goes in linked_parts:
        if rows is not None and rows.folder is not None:
            copy_without(rows, rows.folder, out / part, set(goes), linked)
    write_survey(out / SURVEY, picked.survey)
    write_whole(out / PAGE, render(picked))
    return out / PAGE


def read_folder(out: Path) -> Picked:
    """What ``write_folder`` has written. The original training folder need not be there any more.

    Raises:
        ProbeError: it is no such folder, or parts of it are missing.
    """
    survey = read_survey(out / SURVEY)
    if not is_ours(out) or survey is None or not (out / TRAIN).is_dir():
        what = f"picked: {str(out)!r} holds no whole choice of 'memwatch pick TRAIN --out {out}'"
        raise ProbeError(f"{what}; give that folder, or what memwatch.pick returns")
    saved = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    train = as_training_set(out / TRAIN, caption_column=saved["caption_column"], prompt=saved["prompt"])
    row_of = {train.name(row): row for row in range(len(train))}
    held = as_probes(out / "controls") if saved["held_out"] or saved["class_images"] else []
    own, of_class = held[: len(saved["held_out"])], held[len(saved["held_out"]) :]
    by_row = dict(zip((entry["row"] for entry in saved["held_out"]), own, strict=True))
    names: list[str] = saved["names"]
    if missing := [name for row, name in enumerate(names) if row not in by_row and name not in row_of]:
        raise ProbeError(f"picked: {out / TRAIN} has changed since it was written: {missing[0]} is missing")

    def raw(row: int) -> Any:
        return by_row[row].image if row in by_row else train.raw(row_of[names[row]])

    def caption(row: int) -> str:
        return by_row[row].prompt if row in by_row else train.caption(row_of[names[row]])

    groups = survey.groups
    return Picked(
        TrainingSet(out / TRAIN, len(names), raw, caption, folder=out / TRAIN, names=names),
        survey,
        tuple(
            PickedRow(entry["row"], Why(entry["why"]), None if entry["group"] is None else groups[entry["group"]])
            for entry in saved["watched"]
        ),
        tuple(entry["row"] for entry in saved["held_out"]),
        tuple(entry["row"] for entry in saved["peers"]),
        tuple(saved["rotation"]),
        tuple(saved["notes"]),
        as_class_images(of_class, saved["class_images"]),
        tuple(range(len(of_class))),
        saved["budget"],
        saved["seed"],
    )


def as_class_images(probes: Sequence[Probe], names: Sequence[str]) -> TrainingSet | None:
    """The class images that are controls; those that are trained on lie in ``class/``."""
    if not probes:
        return None
    images, captions = [probe.image for probe in probes], [probe.prompt for probe in probes]
    return TrainingSet(images, len(images), images.__getitem__, captions.__getitem__, names=names)


def clear(out: Path) -> None:
    """Remove the files of an earlier choice, if there is one; whatever else lies there stays."""
    if not is_ours(out):
        return
    saved = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    for name in (*saved.get("files", ()), PAGE, SURVEY):
        if (file := out / name).resolve().is_relative_to(out.resolve()):
            file.unlink(missing_ok=True)
    for part in (TRAIN, CLASS):  # links of our own
        if "names" in saved:
            shutil.rmtree(out / part, ignore_errors=True)


def named_files(probes: Sequence[Probe]) -> Files:
    """A file name for every probe that has an image: its own name made flat, and unique."""
    used: set[str] = set()
    named: Files = []
    for probe in probes:
        if probe.image is None:
            continue
        is_file = isinstance(probe.image, str | Path)
        suffix = Path(str(probe.image)).suffix if is_file else ".png"
        flat = re.sub(r"[^\w.-]+", "-", probe.name.removesuffix(suffix)).strip("-.") or "image"
        name, number = f"{flat}{suffix}", 2
        while name.lower() in used:
            name, number = f"{flat}-{number}{suffix}", number + 1
        used.add(name.lower())
        named.append((name, probe))
    return named


def write_part(folder: Path, files: Files) -> None:
    """An image folder as ``MemWatch`` takes it, and as it is loaded by ``datasets``; none where there are no files."""
    if not files:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, probe in files:
        if isinstance(probe.image, str | Path):
            shutil.copyfile(probe.image, folder / name)
        elif probe.image is not None:
            probe.image.save(folder / name)
        row = {} if probe.row is None else {"row": probe.row}
        lines.append(json.dumps({"file_name": name, "text": probe.prompt} | row, ensure_ascii=False) + "\n")
    write_whole(folder / METADATA, "".join(lines))


def as_json(picked: Picked) -> dict[str, Any]:
    """A choice as plain values."""
    rows, found, classes = picked.rows, picked.survey, picked.class_images
    number_of = {id(group): i for i, group in enumerate(found.groups)}

    def numbered(indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{"row": row, "name": rows.name(row)} for row in indices]

    return {
        "made_by": MADE_BY,
        "source": str(rows.folder.absolute()) if rows.folder is not None else type(rows.source).__name__,
        "rows": found.size,
        "budget": picked.budget,
        "seed": picked.seed,
        "prompt": rows.prompt,
        "caption_column": next(iter(rows.columns[1:]), None),
        "notes": list(picked.notes),
        "mix": dict(Counter(str(watched.why) for watched in picked.watched)),
        "watched": [
            {"row": w.row, "name": rows.name(w.row), "why": str(w.why), "group": number_of.get(id(w.group))}
            for w in picked.watched
        ],
        "held_out": numbered(picked.held_out),
        "class_images": [] if classes is None else [classes.name(row) for row in picked.class_held_out],
        "peers": numbered(picked.peers),
        "rotation": list(picked.rotation[:ROTATION]),
        "groups": [{"kind": str(g.kind), "size": len(g.rows), "rows": list(g.rows)} for g in found.groups],
        "unreadable": [{"row": row, "name": rows.name(row), "why": why} for row, why in found.unreadable.items()],
        "names": [rows.name(row) for row in range(len(rows))],
    }
