"""The folder of ``memwatch pick``: probes, controls and peers as image folders, the choice as JSON, and a page."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memwatch.measure.probes import Probe
from memwatch.picking.choice import Choice
from memwatch.picking.folder_rows import METADATA
from memwatch.picking.hold_out import picture_of
from memwatch.picking.page import render
from memwatch.picking.survey import Group
from memwatch.run_folder import write_whole

MADE_BY = "memwatch pick"  # by this in ``choice.json`` a folder is known as one of ours
CHOICE, PAGE = "choice.json", "index.html"

Files = list[tuple[str, Probe]]


def claim(out: Path, *sources: Path) -> None:
    """See that a folder may be written, and make it one of ours.

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
    if not is_ours(out):
        write_whole(out / CHOICE, json.dumps({"made_by": MADE_BY, "files": []}))


def is_ours(out: Path) -> bool:
    """Whether ``memwatch pick`` has written a folder."""
    try:
        saved = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and saved.get("made_by") == MADE_BY


def write_folder(choice: Choice, out: Path) -> Path:
    """Write a choice into a folder that ``claim`` has made ours; what an earlier choice left there goes.

    | file | holds |
    |---|---|
    | ``probes/``, ``controls/``, ``peers/`` | pictures, byte for byte where they are files, and ``metadata.jsonl`` |
    | ``choice.json`` | the choice in numbers and names |
    | ``index.html`` | the page |

    Returns:
        The page.
    """
    parts = {"probes": choice.probes(), "controls": choice.controls(), "peers": choice.peer_probes()}
    files = {part: named_files(probes) for part, probes in parts.items()}
    ours = [f"{part}/{name}" for part, some in files.items() for name in (*(name for name, _ in some), METADATA)]
    clear(out)
    write_whole(out / CHOICE, json.dumps(as_json(choice) | {"files": ours}, indent=1, allow_nan=False) + "\n")
    for part, some in files.items():
        write_part(out / part, some)
    write_whole(out / PAGE, render(choice))
    return out / PAGE


def clear(out: Path) -> None:
    """Remove the files of an earlier choice; whatever else lies there stays."""
    saved = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    for name in (*saved.get("files", ()), PAGE):
        if (file := out / name).resolve().is_relative_to(out.resolve()):
            file.unlink(missing_ok=True)


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
        elif (picture := picture_of(probe)) is not None:
            picture.save(folder / name)
        row = {} if probe.row is None else {"row": probe.row}
        lines.append(json.dumps({"file_name": name, "text": probe.prompt} | row, ensure_ascii=False) + "\n")
    write_whole(folder / METADATA, "".join(lines))


def as_json(choice: Choice) -> dict[str, Any]:
    """A choice as plain values."""
    rows, found = choice.rows, choice.survey

    def numbered(indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{"row": row, "name": rows.name(row)} for row in indices]

    classes = rows.class_images
    return {
        "made_by": MADE_BY,
        "source": str(rows.folder) if rows.folder is not None else type(rows.source).__name__,
        "rows": found.size,
        "budget": choice.budget,
        "seed": choice.seed,
        "notes": list(choice.notes),
        "mix": dict(Counter(str(picked.why) for picked in choice.picked)),
        "picked": [
            {"row": p.row, "name": rows.name(p.row), "why": str(p.why), "group": group_json(p.group)}
            for p in choice.picked
        ],
        "held_out": numbered(choice.held_out),
        "class_images": [classes.name(row) for row in choice.class_rows] if classes is not None else [],
        "peers": numbered(choice.peers),
        "turns": numbered(choice.turns),
        "without_place": [group_json(group) for group in choice.without_place],
        "unreadable": [{"row": row, "name": rows.name(row), "why": why} for row, why in found.unreadable.items()],
    }


def group_json(group: Group | None) -> dict[str, Any] | None:
    """A group's kind, size and rows."""
    return None if group is None else {"kind": str(group.kind), "size": len(group.rows), "rows": list(group.rows)}
