"""Captions: which column or file holds the text of an image, and how it is read; the same for folders and rows."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = {  # names that training scripts use
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "picture"),
    "caption": ("text", "caption", "prompt", "txt", "captions", "prompts"),
}
LIKE_A_CAPTION = ("text", "caption", "prompt")  # inside the name of the only such column: ``en_text``
BYTE_ORDER = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class ProbeError(ValueError):
    """A probe, or a row of a training set, that cannot be used; the message names it and says why."""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the argument that was given in front of the message of a ``ProbeError``."""
    try:
        yield
    except ProbeError as error:
        raise ProbeError(f"{key}: {error}") from error


def column_of(kind: str, names: Sequence[str], given: str | None = None) -> str | None:
    """The column that holds an image or a caption: the one that is given, else the first of ``COLUMNS`` that is there.

    For a caption then the only one whose name holds "text", "caption" or "prompt"; ``None`` where there is none.
    A ``ProbeError`` where the given one is not there.
    """
    if given is not None:
        if given not in names:
            raise ProbeError(f"{kind}_column is {given!r}, but its columns are: {', '.join(names)}")
        return given
    known = [name for name in COLUMNS[kind] if name in names]
    if known or kind == "image":
        return known[0] if known else None
    alike = [name for name in names if any(word in name.lower() for word in LIKE_A_CAPTION)]
    return alike[0] if len(alike) == 1 else None


def as_caption(value: Any) -> str:
    """A caption as text: of several the first, as diffusers' scripts take it when they validate; "" for null."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return as_caption(value[0]) if value else ""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    is_number = isinstance(value, int | float | np.number) and not math.isnan(value)
    return str(value) if isinstance(value, str) or is_number else ""


def caption_in(row: Mapping[str, Any]) -> str | None:
    """The caption of one row by itself; ``None`` where it has no column for one."""
    column = column_of("caption", [str(name) for name in row])
    return None if column is None else as_caption(row[column])


def text_of(file: Path) -> str:
    """The text of a file in UTF-8, or as its byte order mark says; a ``ProbeError`` names the line that is neither."""
    data = file.read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line, byte = data[: error.start].count(b"\n") + 1, data[error.start]
        raise ProbeError(f"{file}, line {line}: byte 0x{byte:02x} is no {encoding}; save the file as UTF-8") from error


def lines_of(file: Path) -> list[str]:
    r"""The lines of a text file. They end at ``\n`` alone: captions may hold U+2028 and the like."""
    return [line.removesuffix("\r") for line in text_of(file).split("\n")]


def without_caption(captions: Iterable[str], *, noun: str = "image", found: str = "") -> str | None:
    """What a person is told where captions are missing, with counts; ``None`` where none is.

    Args:
        found: what was there instead.
    """
    empty = [not caption.strip() for caption in captions]
    if not any(empty):
        return None
    what = f"{sum(empty)} of {len(empty)} {noun}s have no caption"
    return "; ".join(filter(None, [what, found, "memwatch looks at them under the empty caption"]))
