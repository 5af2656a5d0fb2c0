"""Captions: which column or file holds the text of an image, and how it is read; the same for folders and rows."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = {  # names that training scripts use
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "picture"),
    "caption": ("text", "caption", "prompt", "txt", "captions", "prompts"),
}
LIKE_A_CAPTION = {"text", "caption", "prompt"}  # a word of the name of the only such column: ``en_text``
NO_CAPTION = {"negative", "file", "path", "score", "id", "url"}  # a word of the name of another kind of column
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

    For a caption then the only one that has "text", "caption" or "prompt" as a word of its name; ``None`` where there
    is none. A ``ProbeError`` where the given one is not there.
    """
    if given is not None:
        if given not in names:
            raise ProbeError(f"{kind}_column is {given!r}, but its columns are: {', '.join(names)}")
        return given
    by_name = {name.lower(): name for name in reversed(names)}
    if known := next((by_name[name] for name in COLUMNS[kind] if name in by_name), None):
        return known
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in names}
    alike = [name for name in names if words[name] & LIKE_A_CAPTION and not words[name] & NO_CAPTION]
    return alike[0] if kind == "caption" and len(alike) == 1 else None


def guessed(column: str | None, given: str | None) -> list[str]:
    """What a person is told where the column of captions was found by a word of its name."""
    is_known = column is None or column == given or column.lower() in COLUMNS["caption"]
    return [] if is_known else [f"captions are read from the column {column!r}"]


def as_caption(value: Any) -> str:
    """A caption as text: of several the first, as diffusers' scripts take it when they validate; "" for what is none.

    A ``ProbeError`` where it is bytes that are not UTF-8.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return as_caption(value[0]) if value else ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ProbeError(f"the caption {value[:40]!r} is not UTF-8") from error
    return str(value) if isinstance(value, str) else ""


def text_of(file: Path) -> str:
    """The text of a file in UTF-8, or as its byte order mark says; a ``ProbeError`` names the line that is neither."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ProbeError(f"{file}: cannot be read: {error.strerror}") from error
    encoding = next((name for mark, name in BYTE_ORDER.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, byte = data[: error.start].count(b"\n") + 1, data[error.start]
        raise ProbeError(f"{file}, line {line}: byte 0x{byte:02x} is no {encoding}; save the file as UTF-8") from error
    if 4 * text.count("\0") > len(text):
        raise ProbeError(f"{file}, line 1: full of zero bytes, as UTF-16 without a mark is; save the file as UTF-8")
    return text


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
