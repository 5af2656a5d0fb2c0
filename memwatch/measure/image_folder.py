"""Image folders: the one reader of them, for probes, controls, ``pick``, ``clean``, ``scan`` and the examples.

Where a metadata file is, the rows are its rows, as ``datasets``' ``imagefolder`` reads them. Where there is none, every
image is a row, and its caption is in a text file beside it, as kohya, OneTrainer and ai-toolkit read them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from memwatch.measure.captions import ProbeError, as_caption, column_of, guessed, lines_of
from memwatch.measure.metadata_files import METADATA, place_in, table_rows
from memwatch.messages import counted, listed

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
UNREAD = {".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".svg", ".tga"}
UNREAD |= {".mp4", ".mov", ".webm", ".mkv", ".avi"}
CAPTION_SUFFIXES = (".txt", ".caption")  # the first that holds a text
CHOICE = "choice.json"  # in a folder that 'memwatch pick' has written
REPEATS = re.compile(r"\d+_(.+)")  # kohya's ``10_sks dog``: images that are shown ten times, under these words
MASK = re.compile(r"(.+)[-_.](masklabel|condlabel|mask)", re.IGNORECASE)  # OneTrainer's, and what people write
MASK_FOLDERS = ("mask", "masks")


@dataclass(frozen=True)
class FolderRow:
    """An image of a folder.

    Attributes:
        file: below the folder; missing where a metadata file names what is not there.
        caption: "" where there is none.
        metadata, number: the metadata file that names the image, and which of its rows that is, from 0; ``None`` where
            there is no such file.
    """

    file: Path
    caption: str
    metadata: Path | None = None
    number: int = 0


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder of any depth.

    Attributes:
        rows: in the order of the metadata files, else of the files' names.
        notes: what a person should know, with counts: what is not read, and where captions come from.
        instead: what lies there instead of captions, in words; "" where nothing is missing.
    """

    rows: tuple[FolderRow, ...]
    notes: tuple[str, ...]
    instead: str


def read_image_folder(folder: Path, caption_column: str | None = None, *, folder_words: bool = True) -> ImageFolder:
    """The rows of an image folder; hidden files are left out.

    Args:
        caption_column: of the metadata files, see ``captions.column_of``.
        folder_words: whether images without a caption have the words of their folder, where it has kohya's layout.

    Raises:
        ProbeError: it is no folder, or holds no image; a metadata file or a caption cannot be read; or a metadata file
            names a file outside of its folder. The message names file and line.
        OSError: a folder below it cannot be read.
    """
    if not folder.is_dir():
        raise ProbeError(f"{str(folder)!r} is no folder")
    if (folder / CHOICE).is_file():
        raise ProbeError(f"{str(folder)!r} is a choice of 'memwatch pick': give it as picked, or {folder / 'train'}")
    files = [file for file in files_below(folder) if not any(p.startswith(".") for p in file.relative_to(folder).parts)]
    tables = [file for file in files if file.name in METADATA]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    stems = {file.with_suffix("") for file in images}
    stems -= {file.with_suffix("") for file in images if mask_of(file, stems) is not None}  # a mask has no mask
    captions = (file for file in files if file.suffix.lower() in CAPTION_SUFFIXES)
    texts = {file.with_suffix("") for file in captions if file.is_file() and file.stat().st_size}
    shown = [file for file in images if mask_of(file, stems) is None or file.with_suffix("") in texts]
    rows, notes, instead = _in_tables(tables, caption_column) if tables else _beside(shown, files, folder_words)
    if not rows:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ProbeError(f"{tables[0]} names no image" if tables else f"{str(folder)!r} holds no image ({suffixes})")
    named = {row.file for row in rows}
    if masks := [file.name for file in sorted({*images} - {*shown} - named)]:
        notes.append(f"{counted(len(masks), 'image')} not read, taken for masks: {listed(masks)}")
    if others := len(set(shown) - named):
        notes.append(f"{counted(others, 'image')} not read, not in {tables[0].name}")
    unread = Counter(file.suffix.lower() for file in {*files} - {*images} - named if is_media(file))
    if unread:
        notes.append(f"{counted(unread.total(), 'file')} not read: {_kinds(unread)}")
    if strange := [file for file in named if not _is_utf8(file)]:
        raise ProbeError(f"{str(strange[0])!r}: its name is not UTF-8")
    return ImageFolder(tuple(rows), tuple(notes), instead)


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, hidden ones too, by name; an ``OSError`` where a folder cannot be read.

    Links to folders are followed, but no folder is read twice: a link to one that is read anyway, or that holds this
    one, is in the list itself.
    """

    def fail(error: OSError) -> None:
        raise error

    found, links, seen, root = list[Path](), [folder], set[str](), Path(os.path.realpath(folder))
    for top in links:  # which grows
        real = os.path.realpath(top)
        if top != folder and (real in seen or root.is_relative_to(real)):
            found.append(top)
            continue
        for place, folders, names in os.walk(top, onerror=fail):
            seen.add(os.path.realpath(place))
            links += [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
            folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen]
            found += [Path(place, name) for name in names]
    return sorted(found)


def is_media(file: Path) -> bool:
    """Whether a file is a picture or a film by its name, whether memwatch reads those or not."""
    return file.suffix.lower() in IMAGE_SUFFIXES | UNREAD


def mask_of(file: Path, stems: Collection[Path]) -> Path | None:
    """The path without suffix of the image that a file is a mask of, one of ``stems``; ``None`` where it is none."""
    name = file.with_suffix("").name
    match = MASK.fullmatch(name)
    of = [file.with_name(match[1])] if match else []
    of += [file.parent.parent / name] if file.parent.name.lower() in MASK_FOLDERS else []
    return next((stem for stem in of if stem in stems), None)


def words_of(folder: Path) -> str:
    """The caption that kohya gives images of a folder ``10_sks dog``; "" where it has another name."""
    match = REPEATS.fullmatch(Path(os.path.abspath(folder)).name)
    return match[1].strip() if match else ""


def _in_tables(tables: Sequence[Path], caption_column: str | None) -> tuple[list[FolderRow], list[str], str]:
    """The rows that metadata files name, notes, and their columns where captions are missing."""
    if len({table.suffix for table in tables}) > 1:
        raise ProbeError(f"{tables[0]} and {tables[-1]}: allowed are metadata files of one kind")
    named = [(table, n, *row) for table in tables for n, row in enumerate(table_rows(table))]
    columns = list(dict.fromkeys(str(name) for *_, row in named for name in row))
    column, rows = column_of("caption", columns, caption_column), []
    for table, number, where, row in named:
        try:
            caption = "" if column is None else as_caption(row.get(column))
            caption.encode()
            rows.append(FolderRow(place_in(table, row), caption, table, number))
        except ValueError as error:  # half of a surrogate pair as well
            raise ProbeError(f"{where}: {error}") from error
    instead = f"the columns of {tables[0].name} are {', '.join(columns)}"
    instead += "; set caption_column to one of them" if column is None else f"; captions are read from {column!r}"
    return rows, guessed(column, caption_column), instead


def _beside(
    images: Sequence[Path], files: Sequence[Path], folder_words: bool
) -> tuple[list[FolderRow], list[str], str]:
    """Every image as a row, notes, and what lies there instead of captions."""
    texts: dict[Path, dict[str, Path]] = {}
    for file in files:
        if file.suffix.lower() in CAPTION_SUFFIXES:
            texts.setdefault(file.with_suffix(""), {})[file.suffix.lower()] = file
    rows, by_folder, read = list[FolderRow](), Counter[str](), set[Path]()
    for image in images:
        near = [file for _, file in sorted(texts.get(image.with_suffix(""), {}).items(), reverse=True)]  # .txt first
        read |= {*near}
        caption = next(filter(None, map(_first_line, near)), "")
        if not caption and folder_words and (caption := words_of(image.parent)):
            by_folder[caption] += 1
        rows.append(FolderRow(image, caption))
    notes = [f"{counted(n, 'image')} captioned {words!r}, as their folder is called" for words, n in by_folder.items()]
    others = Counter(file.suffix.lower() for file in files if not is_media(file) and file not in read)
    return rows, notes, f"found {_kinds(others)}" if others else ""


def _kinds(suffixes: Counter[str]) -> str:
    return ", ".join(f"{number} *{suffix}" for suffix, number in sorted(suffixes.items()))


def _is_utf8(file: Path) -> bool:
    try:
        return bool(str(file).encode())
    except UnicodeEncodeError:
        return False


def _first_line(file: Path) -> str:
    """The first line that is not empty; trainers that read more take the others for other captions."""
    return next(filter(None, (line.strip() for line in lines_of(file))), "")
