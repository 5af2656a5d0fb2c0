"""A training set: images with captions, by row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch.utils.data import Subset

from memwatch.measure.captions import ProbeError
from memwatch.measure.images import decoded
from memwatch.measure.probes import Probe


class RowError(ProbeError):
    """One row that cannot be read; the message names the row, and its file where it has one."""


@dataclass(eq=False)
class TrainingSet:
    """Images with captions. Row numbers are those of what was given.

    Attributes:
        source: the object that was given: the dataset itself, or the folder's path.
        raw_of: what the source holds as the image of a row, see ``images.decoded``; it may raise anything.
        caption_of: the caption of a row; "" where there is none, which is ``prompt`` then.
        image_column, caption_column: where the source has columns.
        names: of the rows, unique: files relative to the folder; ``None`` for ``row-00012``.
        prompt: the caption of rows that have none.
        notes, instead: what a person should know, see ``ImageFolder``.
    """

    source: Any
    length: int
    raw_of: Callable[[int], Any]
    caption_of: Callable[[int], str]
    image_column: str | None = None
    caption_column: str | None = None
    names: Sequence[str] | None = None
    prompt: str = ""
    notes: tuple[str, ...] = ()
    instead: str = ""

    def __len__(self) -> int:
        return self.length

    @property
    def folder(self) -> Path | None:
        """The image folder that the rows lie in, if they do."""
        return self.source if isinstance(self.source, Path) else None

    def raw(self, row: int) -> Any:
        """What the source holds as the image of ``row``, not decoded where that can be helped; or a ``RowError``."""
        try:
            raw = self.raw_of(row)
        except RowError:
            raise  # of the set that this one is a part of
        except Exception as error:  # a dataset may raise anything
            raise RowError(f"row {row}: cannot be read: {error!r}") from error
        if isinstance(raw, ImageFile.ImageFile) and isinstance(raw.filename, str) and Path(raw.filename).is_file():
            raw = raw.filename  # any thread can read it anew
        return Path(raw) if isinstance(raw, str) else raw

    def image(self, row: int) -> Image.Image:
        """RGB, turned as its EXIF data say; a ``RowError`` where it cannot be read."""
        return image_from(self.raw(row), row)

    def caption(self, row: int) -> str:
        try:
            caption = self.caption_of(row)
            return caption if caption.strip() else self.prompt
        except Exception:  # its image cannot be read either, which is reported
            return self.prompt

    def name(self, row: int) -> str:
        return f"row-{row:05d}" if self.names is None else self.names[row]

    def file(self, row: int) -> Path | None:
        """The file that holds nothing but the image of ``row``, if any."""
        try:
            raw = self.raw(row)
        except RowError:  # reported by whoever asks for the image
            return None
        return raw if isinstance(raw, Path) else None

    def probe(self, row: int) -> Probe:
        """A row as a probe: its file where it has one, else its picture."""
        return Probe(self.caption(row), self.file(row) or self.image(row), name=self.name(row), row=row)

    def some(self, rows: Sequence[int]) -> Any:
        """These rows in the source's own type, see ``Picked.train``."""
        source = self.source
        if self.folder is not None:
            return [{"image": self.raw(row), "text": self.caption(row)} for row in rows]
        if hasattr(source, "select"):
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

    An ``OSError`` where the file cannot be read, a ``ValueError`` where it is no image.
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
