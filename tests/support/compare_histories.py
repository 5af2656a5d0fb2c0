"""Compare output folders of memwatch, or benchmark runs: ``python tests/support/compare_histories.py BEFORE AFTER``.

Every difference is a line; how long something took does not count. Exit code: 0 all the same, 1 something differs, 2
nothing to compare.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

PATTERNS = ("history.jsonl", "maps/step_*.safetensors", "heatmaps/**/step_*", "event_*.safetensors", "event_*.json")
TIMES = ("seconds", "overhead", "memwatch/seconds", "memwatch/overhead")


def leaves(value: Any, path: str) -> dict[str, Any]:
    """Every plain value of nested JSON by its path, less the times."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, item in items if key not in TIMES for k, v in leaves(item, f"{path}/{key}").items()}


def values_of(file: Path) -> dict[str, Any]:
    """All that a file holds, by name: arrays, or plain values."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".jsonl":
        return leaves([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()], "line")
    if file.suffix == ".json":
        return leaves(json.loads(file.read_text(encoding="utf-8")), "")
    return {"pixels": np.asarray(Image.open(file))}


def difference(a: Any, b: Any) -> str | None:
    """What differs; a NaN equals itself, and 0 is not -0."""
    if not isinstance(a, np.ndarray):
        return None if json.dumps(a) == json.dumps(b) else f"{a!r} -> {b!r}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype} {a.shape} -> {b.dtype} {b.shape}"
    if a.tobytes() == b.tobytes():
        return None
    changed = np.array([x.tobytes() != y.tobytes() for x, y in zip(a.flat, b.flat, strict=True)])
    away = np.abs(a.astype(float) - b.astype(float)).flat[changed]
    return f"{changed.sum()} of {a.size} values differ, largest difference {away.max():g}"


def compare(before: Path, after: Path) -> Iterator[list[str]]:
    """The differences of every file that either folder has."""
    folders = (before, after)
    names = {file.relative_to(f).as_posix() for f in folders for p in PATTERNS for file in f.glob(p)}
    for name in sorted(names):
        a, b = (values_of(folder / name) if (folder / name).is_file() else {} for folder in folders)
        lines = [f"{name}, {key}: only in {'BEFORE' if key in a else 'AFTER'}" for key in a.keys() ^ b.keys()]
        found = {key: difference(a[key], b[key]) for key in a if key in b}
        yield lines + [f"{name}, {key}: {said}" for key, said in found.items() if said is not None]


def main(before: str, after: str) -> int:
    compared = list(compare(Path(before), Path(after)))
    print(*chain(*compared), f"{len(compared)} files compared, {sum(map(bool, compared))} differ", sep="\n")
    return 2 if not compared else int(any(compared))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
