"""Metadata files: tables of file names and captions in an image folder, read as ``datasets``' ``imagefolder`` does."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from memwatch.measure.captions import ProbeError, lines_of, text_of

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMNS = ("file_name", "image_file_name")
OUTSIDE = re.compile(r"/|\.\.(/|$)|[A-Za-z]:/|.*\0", re.DOTALL)  # a path that may lead out of the folder


def table_rows(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a metadata file, and where it stands, for messages; a ``ProbeError`` where it cannot be read."""
    if metadata.suffix == ".jsonl":
        yield from json_lines(metadata)
        return
    with _reading(metadata):
        table = _csv(metadata) if metadata.suffix == ".csv" else _parquet(metadata)
        rows = table.to_dict("records") if metadata.suffix == ".csv" else table.to_pylist()
    yield from ((f"{metadata}, row {number}", row) for number, row in enumerate(rows, start=1))


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on every line that is not empty, and where it stands; a ``ProbeError`` where it is none."""
    for number, line in enumerate(lines_of(file), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ProbeError(f"{file}, line {number}: expected a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise ProbeError(f"{file}, line {number}: expected a JSON object, got {line[:80]}")
            yield f"{file}, line {number}", row


def copy_table_without(metadata: Path, target: Path, goes: Collection[int]) -> None:
    """Write a metadata file without rows of these numbers, with all keys of the others."""
    with _reading(metadata):
        if metadata.suffix == ".jsonl":
            lines = [line for line in lines_of(metadata) if line.strip()]
            kept = "".join(f"{line}\n" for number, line in enumerate(lines) if number not in goes)
            target.write_text(kept, encoding="utf-8", newline="\n")
        elif metadata.suffix == ".csv":
            table = _csv(metadata, header=None, keep_default_na=False)  # the header is its first row, as it is
            kept_rows = table.drop(index=[row + 1 for row in goes])
            kept_rows.to_csv(target, header=False, index=False, lineterminator="\r\n")  # so a return is in quotes
        else:
            from pyarrow import parquet

            table = _parquet(metadata)
            parquet.write_table(table.take([row for row in range(len(table)) if row not in goes]), target)


def place_in(metadata: Path, row: Mapping[str, Any]) -> Path:
    """The image that a row names; a ``ProbeError`` unless its path leads below the metadata file's own folder."""
    name = next((row[key] for key in FILE_COLUMNS if row.get(key) is not None), None)
    plain = posixpath.normpath(name.replace("\\", "/")) if isinstance(name, str) else ""  # Windows writes those
    is_no_file = plain in ("", ".", *METADATA) or os.path.isdir(metadata.parent / plain)
    if is_no_file or OUTSIDE.match(plain) or "://" in str(name):
        got = f"got {name!r}" if name is not None else f"the columns are {', '.join(map(str, row))}"
        raise ProbeError(f"expected 'file_name', the path of an image below {metadata.parent}; {got}")
    return metadata.parent / plain


@contextmanager
def _reading(metadata: Path) -> Iterator[None]:
    """Turn what pandas and pyarrow raise, which is of many kinds, into a ``ProbeError`` that names the file."""
    try:
        yield
    except (ProbeError, OSError):
        raise
    except ImportError as error:
        raise ProbeError(f"{metadata}: memwatch reads it with pandas and pyarrow; pip install both") from error
    except Exception as error:
        raise ProbeError(f"{metadata}: cannot be read: {str(error).strip() or type(error).__name__}") from error


def _csv(metadata: Path, **options: Any) -> Any:
    """A pandas table, as ``datasets`` reads it, but numbers stay text."""
    import pandas

    table = pandas.read_csv(StringIO(text_of(metadata)), dtype=str, **options)
    if not isinstance(table.index, pandas.RangeIndex):  # pandas takes what stands before the header for an index
        raise ProbeError(f"{metadata}: its rows have more cells than its header; captions with a comma need quotes")
    return table


def _parquet(metadata: Path) -> Any:
    from pyarrow import parquet

    return parquet.read_table(metadata)
