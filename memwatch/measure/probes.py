"""Probes: the fixed things that memwatch looks at, and where they come from."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from memwatch.config import MemWatchConfig, require
from memwatch.measure.captions import ProbeError, as_caption, column_of, naming, text_of, without_caption
from memwatch.measure.image_folder import IMAGE_SUFFIXES, read_image_folder
from memwatch.messages import counted, warn

# What judging takes. A control is judged by the others, and a standard deviation of fewer than ten says too little; so
# with eleven both a probe and every control have at least ten to be compared with.
MIN_CONTROLS = 11
ALLOWED = "an image folder, a text file of prompts, a list of prompts and Probes, or rows with 'image' and 'text'"
TITLE = 40  # characters of a caption that people are shown
NO_PROMPTS = {".toml", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".parquet", ".ini", ".cfg", ".xml"}
OPTION = re.compile(r"(?:^|\s)--([A-Za-z][\w-]*)")  # of kohya's sample prompts: what follows is no prompt
SEED = ("d", "seed")


@dataclass(frozen=True)
class Probe:
    """What memwatch looks at: an image with its caption (a *reference probe*), or a prompt alone (a *prompt probe*).

    Attributes:
        prompt: the image's caption, or the prompt to generate from. Unconditional models ignore it.
        image: a file or a picture, or what else ``images.decoded`` reads; ``None`` makes it a prompt probe.
        seed: of the prompt probe's initial noise.
        name: unique, used in keys and file names. Made from the file name or the prompt when empty.
        is_control: held out from training. memwatch sets it on what comes as ``controls``.
        in_rotation: one of the training images that are screened a few per event.
        row: its number in the training set that it was picked from; ``None`` where it came otherwise.
    """

    prompt: str
    image: str | Path | Image.Image | None = None
    seed: int = 0
    name: str = ""
    is_control: bool = False
    in_rotation: bool = False
    row: int | None = None

    @property
    def is_reference(self) -> bool:
        return self.image is not None

    @property
    def title(self) -> str:
        """What people read: the caption, cut to 40 characters, and its source: a file, a row, or else its name."""
        caption = " ".join(self.prompt.split())
        caption = caption if len(caption) <= TITLE else f"{caption[: TITLE - 1].rstrip()}…"
        source = "" if self.name == slug(self.prompt) else self.name
        if isinstance(self.image, str | Path) and Path(self.image).suffix.lower() in IMAGE_SUFFIXES:
            source = Path(self.image).name
        elif self.row is not None:
            source = f"row {self.row}"
        return f"{caption} ({source})" if caption and source else caption or source or self.name


def as_probes(source: Any, key: str = "probes", *, seed: int = 0) -> list[Probe]:
    """Probes from whatever the user has, with unique names; a ``ProbeError`` where that is no probe.

    Args:
        source: an image folder (see ``read_image_folder``), a text file with one prompt per line (kohya's options and
            comments are known), prompts and ``Probe``s, or rows with ``image`` and a caption.
        key: what the argument is called, for messages.
        seed: of prompts without a seed of their own.
    """
    if source is None:
        return []
    if isinstance(source, Probe):
        probes = [source]
    elif isinstance(source, str | Path) and str(source):
        path = Path(source)
        probes = _from_folder(path, key) if path.is_dir() else _from_text(path, key, seed)
    elif isinstance(source, Mapping | bytes | str) or not _has_items(source):
        raise ProbeError(f"{key}: got {source!r}, allowed: {ALLOWED}")
    else:
        rows = source.with_format(None) if hasattr(source, "with_format") else source  # before transforms
        items = rows if hasattr(rows, "__iter__") else (rows[i] for i in range(len(rows)))
        probes = [_from_item(item, i, seed, key) for i, item in enumerate(items)]
        if missing := without_caption([p.prompt for p in probes if p.is_reference]):
            warn(f"{key}: {missing}")
    if not probes:
        raise ProbeError(f"{key}: {str(source)!r} holds no image and no prompt")
    return _named(probes)


def all_probes(config: MemWatchConfig, probes: Any = None, controls: Any = None) -> list[Probe]:
    """What is watched, then ``control/NAME``. Arguments go before the configuration's keys.

    Where nothing is to be watched it is a ``ConfigError``.
    """
    given = {"probes": probes, "controls": controls}
    sources = {key: getattr(config, key) if source is None else source for key, source in given.items()}
    watched, held_out = (as_probes(source, key, seed=config.seed) for key, source in sources.items())
    allowed = "picked (of memwatch.pick), prompts, Probes, an image folder or rows"
    require(bool(watched), "probes", sources["probes"], allowed)
    found = [replace(probe, is_control=False) for probe in watched]
    return found + [replace(probe, name=f"control/{probe.name}", is_control=True) for probe in held_out]


def _from_text(file: Path, key: str, seed: int) -> list[Probe]:
    """The prompts of a text file; of kohya's options only the seed counts, and what does not is said."""
    if not file.is_file():
        raise ProbeError(f"{key}: {str(file)!r} is neither a folder nor a file (give single prompts as a list)")
    if file.suffix.lower() in NO_PROMPTS | IMAGE_SUFFIXES:
        raise ProbeError(f"{key}: {str(file)!r} is no text file with one prompt per line; allowed: {ALLOWED}")
    with naming(key):
        text = text_of(file)
    if _is_data(text):
        raise ProbeError(f"{key}: {str(file)!r} holds TOML or JSON; allowed: {ALLOWED}")
    comments, unused, probes = 0, set[str](), []
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        prompt, *options = OPTION.split(line)
        if line.startswith("#"):
            comments += 1
        elif line and not prompt.strip():
            raise ProbeError(f"{key}: {file}, line {number}: expected a prompt before its options, got {line[:80]}")
        elif line:
            given = {name.lower(): value.strip() for name, value in zip(options[::2], options[1::2], strict=True)}
            seeds = [name for name in SEED if given.get(name, "").isdecimal()]
            unused |= given.keys() - {*seeds}
            probes.append(Probe(prompt.strip(), seed=int(given[seeds[0]]) if seeds else seed))
    if comments:
        warn(f"{key}: {counted(comments, 'line')} of {file} taken for comments, because of the # in front")
    if unused:
        warn(f"{key}: memwatch does not use the options {', '.join(f'--{o}' for o in sorted(unused))} in {file}")
    return probes


def _is_data(text: str) -> bool:
    """Whether a text is TOML or JSON, such as other tools have prompts in."""
    for read in (tomllib.loads, json.loads):
        with suppress(ValueError, RecursionError):
            if isinstance(read(text), dict | list) and text.strip():
                return True
    return False


def _from_folder(folder: Path, key: str) -> list[Probe]:
    with naming(key):
        found = read_image_folder(folder)
    probes = [Probe(row.caption, row.file) for row in found.rows]
    missing = without_caption([p.prompt for p in probes], found=found.instead)
    for note in (*found.notes, *filter(None, [missing])):
        warn(f"{key}: {folder}: {note}")
    return probes


def _from_item(item: Any, index: int, seed: int, key: str) -> Probe:
    if isinstance(item, Probe):
        return item
    if isinstance(item, str):
        if not item.strip():
            raise ProbeError(f"{key}: prompt {index} is empty")
        return Probe(item, seed=seed)
    if isinstance(item, Mapping) and "file_name" not in item:
        names = [str(name) for name in item]
        column, caption = column_of("image", names), column_of("caption", names)
        image, text = (None if name is None else item[name] for name in (column, caption))
        said = "" if caption is None else as_caption(text)
        if caption is not None and (said if column is None else image is not None):
            given = item.get("seed")
            own_seed = given if isinstance(given, int) and not isinstance(given, bool) else seed
            return Probe(said, image, seed=own_seed, name=str(item.get("name") or ""))
    expected = "expected a prompt, a Probe or a row with 'image' and 'text'"
    raise ProbeError(f"{key}: item {index} is a {type(item).__name__}; {expected}")


def _has_items(source: Any) -> bool:
    """Whether something gives rows; a pandas table gives the names of its columns."""
    is_sequence = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return (hasattr(source, "__iter__") or is_sequence) and not hasattr(source, "iloc")


def _named(probes: Iterable[Probe]) -> list[Probe]:
    """Names for those without, made unique by a number."""
    used: set[str] = set()
    named = []
    for probe in probes:
        base = probe.name or (Path(probe.image).stem if isinstance(probe.image, str | Path) else probe.prompt)
        base = slug(base) or "probe"
        name, number = base, 2
        while name in used:
            name, number = f"{base}-{number}", number + 1
        used.add(name)
        named.append(replace(probe, name=name))
    return named


def slug(text: str) -> str:
    """A text as the part of a file name or key: ``A-red-bus-at-night``."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:60]
