"""Files of one JSON object per line, written while others read them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memwatch.run_folder import write_whole


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects that have a ``step``; ``[]`` without the file. A line that is not whole is passed over."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            found.append(row)
    return found


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add objects; where a full disk has cut the last line off, that line is ended first.

    Raises:
        OSError: the disk refused. ValueError: a number is not finite.
    """
    text = _to_text(rows)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else f"\n{text}"
        file.write(text.encode())


def rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put these objects in the place of all others; whole or not at all."""
    write_whole(path, _to_text(rows))


def _to_text(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
