"""Probes: the fixed things that memwatch looks at, and where they come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from memwatch.config import MemWatchConfig, require
from memwatch.measure.captions import ProbeError, caption_in, column_of, lines_of, naming, without_caption
from memwatch.measure.image_folder import IMAGE_SUFFIXES, read_image_folder
from memwatch.messages import counted, warn

# What judging takes. A control is judged by the others, and a standard deviation of fewer than ten says too little; so
# with eleven both a probe and every control have at least ten to be compared with.
MIN_CONTROLS = 11
ALLOWED = "an image folder, a text file of prompts, a list of prompts and Probes, or rows with 'image' and 'text'"
TITLE = 40  # characters of a caption that people are shown
NO_PROMPTS = {".toml", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".parquet"}
OPTION = re.compile(r"\s--(n|w|h|d|s|l|g|f|fs|ss|cn|ctr)\s+", re.IGNORECASE)  # of kohya's sample prompts; d is the seed


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
    elif isinstance(source, str | Path):
        path = Path(source)
        probes = _from_folder(path, key) if path.is_dir() else _from_text(path, key, seed)
    elif isinstance(source, Mapping | bytes) or not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise ProbeError(f"{key}: got {source!r}, allowed: {ALLOWED}")
    else:
        probes = [_from_item(item, i, seed, key) for i, item in enumerate(source)]
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
        lines = [line.strip() for line in lines_of(file)]
    comments, unused, probes = 0, set[str](), []
    for line in filter(None, lines):
        prompt, *options = OPTION.split(line)
        given = dict(zip(map(str.lower, options[::2]), options[1::2], strict=True))
        own_seed = given.pop("d", "").strip()
        if line.startswith("#"):
            comments += 1
        else:
            unused |= given.keys()
            probes.append(Probe(prompt.strip(), seed=int(own_seed) if own_seed.isdecimal() else seed))
    if comments:
        warn(f"{key}: {counted(comments, 'line')} of {file} begin with #, and are taken for comments")
    if unused:
        warn(f"{key}: memwatch does not use the options {', '.join(f'--{o}' for o in sorted(unused))} in {file}")
    return probes


def _from_folder(folder: Path, key: str) -> list[Probe]:
    with naming(key):
        found, probes = read_image_folder(folder), list[Probe]()
    for row in found.rows:
        picked = row.fields.get("row")  # 'memwatch pick' writes it
        probes.append(Probe(row.caption, row.file, row=picked if isinstance(picked, int) else None))
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
    if isinstance(item, Mapping):
        column = column_of("image", list(item))
        image, caption = None if column is None else item[column], caption_in(item)
        if caption or (caption is not None and image is not None):
            return Probe(caption, image, seed=int(item.get("seed", seed)), name=str(item.get("name", "")))
    expected = "expected a prompt, a Probe or a row with 'image' and 'text'"
    raise ProbeError(f"{key}: item {index} is a {type(item).__name__}; {expected}")


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
