"""A training set: images with captions, by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from memwatch.measure.probes import ProbeError
from memwatch.picking.pictures import decoded

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixel_values", "pixels")
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt", "captions", "prompts")


class RowError(ProbeError):
    """One row that cannot be read; the message names the row, and its file where it has one."""


class TrainingSet:
    """Images with captions. Row numbers are those of what was given.

    Args:
        source: the object that was given: the dataset itself, or the folder's path.
        length: how many rows there are.
        raw: what the source holds as the image of a row, see ``pictures.decoded``.
        caption: the caption of a row; "" where there is none.
        folder: the image folder that the rows lie in, if they do.
        class_images: the prior-preservation images of a DreamBooth dataset.

    Raises:
        ProbeError: there are no rows.
    """

    def __init__(
        self,
        source: Any,
        length: int,
        raw: Callable[[int], Any],
        caption: Callable[[int], str],
        *,
        folder: Path | None = None,
        class_images: TrainingSet | None = None,
    ) -> None:
        if length < 1:
            raise ProbeError(f"dataset: {called(source)} holds no image")
        self.source, self.folder, self.class_images = source, folder, class_images
        self._length, self._raw, self._caption = length, raw, caption

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
            return not_decoded(self._raw(row))
        except RowError:
            raise  # of the set that this one is a part of
        except Exception as error:  # a dataset may raise anything
            raise RowError(f"row {row}: cannot be read: {error!r}") from error

    def image(self, row: int) -> Image.Image:
        """RGB, turned as its EXIF data say.

        Raises:
            RowError: it cannot be read.
        """
        raw = self.raw(row)
        try:
            return decoded(raw)
        except Exception as error:  # PIL has its own for broken, cut off and huge files
            file = f" ({raw})" if isinstance(raw, Path) else ""
            raise RowError(f"row {row}{file}: cannot be read: {error!r}") from error

    def caption(self, row: int) -> str:
        return self._caption(row)

    def name(self, row: int) -> str:
        """Unique: the file's name relative to the folder, or ``row-00012``."""
        file = self.file(row) if self.folder is not None else None
        if self.folder is not None and file is not None and file.is_relative_to(self.folder):
            return file.relative_to(self.folder).as_posix()
        return f"row-{row:05d}"

    def file(self, row: int) -> Path | None:
        """The file that holds nothing but the image of ``row``."""
        try:
            raw = self.raw(row)
        except RowError:  # said by whoever asks for the image
            return None
        return raw if isinstance(raw, Path) else None

    def indices(self, row: int) -> list[int]:
        """Indices of ``source`` that show ``row``; a script's dataset may show each picture several times."""
        length = len(self.source) if hasattr(self.source, "__len__") else len(self)
        return list(range(row, max(length, len(self)), len(self)))

    def row_of(self, index: int) -> int:
        """The row that an index of ``source`` shows, see ``indices``."""
        return index % len(self)


def column_of(names: Sequence[str], given: str | None, known: Sequence[str], key: str) -> str | None:
    """The column that is meant; ``None`` where none is given and no known name is there.

    Args:
        key: what the setting is called, for the message.

    Raises:
        ProbeError: the given one is not there.
    """
    if given is not None and given not in names:
        raise ProbeError(f"dataset: {key} is {given!r}, but its columns are: {', '.join(names)}")
    return given or next((name for name in known if name in names), None)


def image_column_of(names: Sequence[str], given: str | None) -> str:
    """Likewise for the images, of which there must be a column."""
    column = column_of(names, given, IMAGE_COLUMNS, "image_column")
    if column is None:
        raise ProbeError(f"dataset: found no column of images; set image_column to one of: {', '.join(names)}")
    return column


def caption_column_of(names: Sequence[str], given: str | None) -> str | None:
    """Likewise for the captions, which there need not be."""
    return column_of(names, given, CAPTION_COLUMNS, "caption_column")


def as_caption(value: Any) -> str:
    """A caption as text; of several the first."""
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    return value if isinstance(value, str) else ""


def called(source: Any) -> str:
    """What a message calls a source."""
    return repr(str(source)) if isinstance(source, str | Path) else f"a {type(source).__name__}"


def not_decoded(raw: Any) -> Any:
    """The file of a picture that was opened from one, and of a text: it can be read anew, by any process."""
    if isinstance(raw, str):
        return Path(raw)
    if isinstance(raw, ImageFile.ImageFile) and isinstance(raw.filename, str) and raw.filename:
        file = Path(raw.filename)
        return file if file.is_file() else raw
    return raw
