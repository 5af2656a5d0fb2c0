"""A training set: images with captions, by row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch.utils.data import Subset

from memwatch.measure.images import decoded
from memwatch.measure.probes import ProbeError


class RowError(ProbeError):
    """One row that cannot be read; the message names the row, and its file where it has one."""


class TrainingSet:
    """Images with captions. Row numbers are those of what was given.

    Args:
        source: the object that was given: the dataset itself, or the folder's path.
        length: number of rows, at least 1.
        raw: what the source holds as the image of a row, see ``images.decoded``.
        caption: the caption of a row; "" where there is none.
        folder: the image folder that the rows lie in, if they do.
        image_column, caption_column: where the source has columns.
        names: of the rows, unique; by default file names relative to the folder, or ``row-00012``.

    Attributes:
        prompt: the caption of rows that have none of their own.
    """

    def __init__(
        self,
        source: Any,
        length: int,
        raw: Callable[[int], Any],
        caption: Callable[[int], str],
        *,
        folder: Path | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if length < 1:
            raise ProbeError(f"dataset: {called(source)} holds no image")
        self.source, self.folder, self.prompt = source, folder, ""
        self.image_column, self.caption_column = image_column, caption_column
        self._length, self._raw, self._caption, self._names = length, raw, caption, names

    def __len__(self) -> int:
        return self._length

    def raw(self, row: int) -> Any:
        """What the source holds as the image of ``row``, not decoded where that can be helped.

        Raises:
            RowError: the source itself fails on this row.
            IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a training set of {len(self)}")
        try:
            return _not_decoded(self._raw(row))
        except RowError:
            raise  # of the set that this one is a part of
        except Exception as error:  # a dataset may raise anything
            raise RowError(f"row {row}: cannot be read: {error!r}") from error

    def image(self, row: int) -> Image.Image:
        """RGB, turned as its EXIF data say.

        Raises:
            RowError: it cannot be read.
        """
        return image_from(self.raw(row), row)

    def caption(self, row: int) -> str:
        return self._caption(row) or self.prompt

    def name(self, row: int) -> str:
        """Unique: the file's name relative to the folder, or ``row-00012``."""
        if self._names is not None:
            return self._names[row]
        file = self.file(row) if self.folder is not None else None
        if self.folder is not None and file is not None and file.is_relative_to(self.folder):
            return file.relative_to(self.folder).as_posix()
        return f"row-{row:05d}"

    def file(self, row: int) -> Path | None:
        """The file that holds nothing but the image of ``row``."""
        try:
            raw = self.raw(row)
        except RowError:  # reported by whoever asks for the image
            return None
        return raw if isinstance(raw, Path) else None

    def some(self, rows: Sequence[int]) -> Any:
        """These rows in the source's own type, see ``Picked.train``."""
        source = self.source
        if self.folder is not None and isinstance(source, str | Path):
            return [{"image": self.raw(row), "text": self.caption(row)} for row in rows]
        if hasattr(source, "column_names") and hasattr(source, "select"):
            return source.select(rows)
        if isinstance(source, Subset):
            return Subset(source.dataset, [source.indices[row] for row in rows])
        if type(source) in (list, tuple):
            return type(source)(source[row] for row in rows)
        return Subset(source, list(rows))


def image_from(raw: Any, row: int, side: int | None = None) -> Image.Image:
    """The picture of what a row holds, see ``images.decoded``; a ``RowError`` where it cannot be read, or is empty."""
    try:
        picture = decoded(raw, side)
        if not all(picture.size):
            raise ValueError("it has no pixels")
        return picture
    except Exception as error:  # PIL has its own for broken, cut off and huge files
        file = f" ({raw})" if isinstance(raw, Path) else ""
        raise RowError(f"row {row}{file}: cannot be read: {error!r}") from error


def content_key(raw: Any) -> str:
    """A hash of an image's content: of a file its bytes, of a picture or of numbers in memory its pixels.

    Raises:
        OSError: the file cannot be read. ValueError: it is no image.
    """
    if isinstance(raw, str | Path):
        parts = [Path(raw).read_bytes()]
    elif isinstance(raw, bytes):
        parts = [raw]
    elif isinstance(raw, Image.Image):
        parts = [f"{raw.mode}{raw.size}".encode(), raw.tobytes()]
    else:
        values = raw.detach().cpu().numpy() if isinstance(raw, torch.Tensor) else np.asarray(raw)
        if values.dtype == object:
            raise ValueError(f"{called(raw)} is no image")
        parts = [f"{values.dtype}{values.shape}".encode(), np.ascontiguousarray(values).tobytes()]
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def called(source: Any) -> str:
    """What a message calls a source."""
    return repr(str(source)) if isinstance(source, str | Path) else f"a {type(source).__name__}"


def _not_decoded(raw: Any) -> Any:
    """The file, where the picture was opened from one or a path was given as text: any thread can read it anew."""
    if isinstance(raw, str):
        return Path(raw)
    if isinstance(raw, ImageFile.ImageFile) and isinstance(raw.filename, str) and raw.filename:
        file = Path(raw.filename)
        return file if file.is_file() else raw
    return raw
