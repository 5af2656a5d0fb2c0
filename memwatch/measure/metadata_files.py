"""Metadata files: tables of file names and captions in an image folder, read as ``datasets``' ``imagefolder`` does."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from memwatch.measure.captions import ProbeError, lines_of, text_of

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def table_rows(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a metadata file, and where it stands, for messages; a ``ProbeError`` where it cannot be read."""
    if metadata.suffix == ".jsonl":
        for number, line in enumerate(lines_of(metadata), start=1):
            if line.strip():
                yield (where := f"{metadata}, line {number}"), _object_in(line, where)
        return
    with _reading(metadata):
        table = _csv(metadata) if metadata.suffix == ".csv" else _parquet(metadata)
        rows = table.to_dict("records") if metadata.suffix == ".csv" else table.to_pylist()
    yield from ((f"{metadata}, row {number}", row) for number, row in enumerate(rows, start=1))


def copy_table_without(metadata: Path, target: Path, goes: Collection[int]) -> None:
    """Write a metadata file without rows of these numbers, with all keys of the others."""
    with _reading(metadata):
        if metadata.suffix == ".jsonl":
            lines = [line for line in lines_of(metadata) if line.strip()]
            kept = "".join(f"{line}\n" for number, line in enumerate(lines) if number not in goes)
            target.write_text(kept, encoding="utf-8", newline="\n")
        elif metadata.suffix == ".csv":
            table = _csv(metadata, keep_default_na=False)
            table.iloc[[row for row in range(len(table)) if row not in goes]].to_csv(target, index=False)
        else:
            from pyarrow import parquet

            table = _parquet(metadata)
            parquet.write_table(table.take([row for row in range(len(table)) if row not in goes]), target)


def place_in(metadata: Path, name: Any) -> Path:
    """The file that a metadata file names; a ``ProbeError`` unless it lies below the metadata file's own folder."""
    plain = posixpath.normpath(name.replace("\\", "/")) if isinstance(name, str) else ""  # Windows writes those
    if plain in ("", ".") or "\0" in plain or "://" in name or plain.startswith("/") or plain.split("/")[0] == "..":
        raise ProbeError(f"expected 'file_name', the path of an image below {metadata.parent}, got {name!r}")
    return metadata.parent / plain


def _object_in(line: str, where: str) -> dict[str, Any]:
    """The object of a line of JSON."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ProbeError(f"{where}: expected an object with 'file_name' and 'text' ({error})") from error
    if not isinstance(row, dict):
        raise ProbeError(f"{where}: expected an object with 'file_name' and 'text', got {line[:80]}")
    return row


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

    return pandas.read_csv(StringIO(text_of(metadata)), dtype=str, **options)


def _parquet(metadata: Path) -> Any:
    from pyarrow import parquet

    return parquet.read_table(metadata)
