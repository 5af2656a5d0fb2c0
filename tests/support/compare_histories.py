"""Compare two output folders of memwatch, or two benchmark runs.

``python tests/support/compare_histories.py BEFORE AFTER``. Of an output folder: ``history.jsonl`` line by line,
``maps`` bit by bit, ``heatmaps`` pixel by pixel. Of a benchmark run: ``event_*.safetensors`` bit by bit, and
``event_*.json``. What only says how long something took is left out. Every difference is a line: where, how many
values, and the largest difference. Exit code: 0 all the same, 1 something differs, 2 nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, uint8

TIMES = ("seconds", "overhead", "memwatch/seconds", "memwatch/overhead")


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every plain value of nested JSON by its path, less the times."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, item in items:
        if key not in TIMES:
            found |= leaves(item, f"{path}/{key}" if path else str(key))
    return found


def compare_values(where: str, before: Any, after: Any) -> Iterator[str]:
    """Two JSON values."""
    a, b = leaves(before), leaves(after)
    yield from only_in_one(where, a, b)
    both = [path for path in a if path in b]
    different = [path for path in both if json.dumps(a[path]) != json.dumps(b[path])]  # NaN is NaN
    if different:
        numbers = [(a[path], b[path]) for path in different if is_number(a[path]) and is_number(b[path])]
        largest = max((abs(x - y) for x, y in numbers), default=None)
        path = different[0]
        first = f"first {path}: {a[path]!r} -> {b[path]!r}"
        yield f"{said(where, len(different), len(both), largest)}; {first}"


def compare_json(where: str, before: Path, after: Path) -> Iterator[str]:
    """Two JSON files."""
    a, b = (json.loads(file.read_text(encoding="utf-8")) for file in (before, after))
    yield from compare_values(where, a, b)


def compare_lines(where: str, before: Path, after: Path) -> Iterator[str]:
    """Two files with one JSON value per line."""
    a, b = (file.read_text(encoding="utf-8").splitlines() for file in (before, after))
    for number, (x, y) in enumerate(zip_longest(a, b), start=1):
        if x is None or y is None:
            yield f"{where}: {len(a)} lines -> {len(b)} lines"
            return
        yield from compare_values(f"{where}, line {number}", json.loads(x), json.loads(y))


def compare_tensors(where: str, before: Path, after: Path) -> Iterator[str]:
    """Two safetensors files, tensor by tensor, bit by bit."""
    a, b = load_file(before), load_file(after)
    yield from only_in_one(where, a, b)
    for name in a:
        if name in b:
            yield from compare_two_tensors(f"{where}, {name}", a[name], b[name])


def compare_two_tensors(where: str, a: Tensor, b: Tensor) -> Iterator[str]:
    """Bit by bit: a NaN equals itself, and 0 is not -0."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        yield f"{where}: {a.dtype} {tuple(a.shape)} -> {b.dtype} {tuple(b.shape)}"
        return
    bits = [t.contiguous().reshape(-1).view(uint8).reshape(t.numel(), t.element_size()) for t in (a, b)]
    different = (bits[0] != bits[1]).any(1)
    if different.any():
        largest = (a.double() - b.double()).abs().reshape(-1)[different].max().item()
        yield said(where, int(different.sum()), a.numel(), largest)


def compare_pixels(where: str, before: Path, after: Path) -> Iterator[str]:
    """Two pictures."""
    a, b = (np.asarray(Image.open(file)).astype(np.int64) for file in (before, after))
    if a.shape != b.shape:
        yield f"{where}: {a.shape} -> {b.shape}"
    elif (different := a != b).any():
        yield said(where, int(different.sum()), a.size, np.abs(a - b).max())


def only_in_one(where: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Names that the other does not have."""
    for which, names in (("BEFORE", a.keys() - b.keys()), ("AFTER", b.keys() - a.keys())):
        if names:
            yield f"{where}: only in {which}: {', '.join(sorted(names))}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def said(where: str, count: int, total: int, largest: float | None) -> str:
    """A difference as a line; words have no largest one."""
    by = "" if largest is None else f", largest difference {largest:g}"
    return f"{where}: {count} of {total} values differ{by}"


KINDS: dict[str, Callable[[str, Path, Path], Iterator[str]]] = {
    "history.jsonl": compare_lines,
    "maps/step_*.safetensors": compare_tensors,
    "heatmaps/**/step_*": compare_pixels,
    "event_*.safetensors": compare_tensors,
    "event_*.json": compare_json,
}


def compare(before: Path, after: Path) -> Iterator[tuple[str, list[str]]]:
    """Every file that either folder has, with its differences."""
    for pattern, kind in KINDS.items():
        names = {file.relative_to(folder).as_posix() for folder in (before, after) for file in folder.glob(pattern)}
        for name in sorted(names):
            missing = [
                which for which, folder in (("BEFORE", before), ("AFTER", after)) if not (folder / name).exists()
            ]
            yield name, [f"{name}: not in {missing[0]}"] if missing else list(kind(name, before / name, after / name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE", type=Path)
    parser.add_argument("after", metavar="AFTER", type=Path)
    args = parser.parse_args(argv)
    compared = list(compare(args.before, args.after))
    if not compared:
        print(f"nothing to compare: neither {args.before} nor {args.after} holds any of: {', '.join(KINDS)}")
        return 2
    different = 0
    for _, lines in compared:
        different += bool(lines)
        for line in lines:
            print(line)
    print(f"{len(compared)} files compared, {different} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
