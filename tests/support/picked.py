"""Training sets and surveys made by hand: what the choice is made from, without a pixel being looked for."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memwatch.picking.hashes import Hashes, hash_rows
from memwatch.picking.pick import choose
from memwatch.picking.picked import Picked
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import Group, GroupKind, Survey
from memwatch.picking.training_set import TrainingSet

WHOLE = (0.0, 0.0, 1.0, 1.0)


def duplicates(*rows: int) -> Group:
    return Group(GroupKind.DUPLICATES, rows, (WHOLE,) * len(rows))


def part(*rows: int, box: tuple[float, float, float, float] = (0.0, 0.0, 0.5, 0.5)) -> Group:
    """A part that rows share, at the same place in each."""
    return Group(GroupKind.PART, rows, (box,) * len(rows))


def surveyed(size: int, *groups: Group, **parts: Any) -> Survey:
    """A survey of so many rows, which grow stranger by their number; ``parts`` go to ``Survey``."""
    strangeness = np.arange(size, dtype=float)
    unreadable = parts.pop("unreadable", {})
    strangeness[list(unreadable)] = np.nan
    known: dict[str, Any] = {"captions": (), "rare_captions": (), "bits": np.zeros((size, 8), np.uint8)}
    ordered = tuple(sorted(groups, key=lambda g: (-len(g.rows), g.kind != GroupKind.DUPLICATES)))
    return Survey(size=size, unreadable=unreadable, groups=ordered, strangeness=strangeness, **known | parts)


def chosen(survey: Survey, rows: TrainingSet | None = None, **numbers: Any) -> Picked:
    """What is picked by a survey that was made by hand, with ``memwatch.pick``'s own defaults."""
    rows = plain_rows(survey.size) if rows is None else rows
    return choose(rows, survey, **{"probes": 16, "controls": 20, "seed": 0} | numbers)


def plain_rows(size: int, captions: Sequence[str] | None = None) -> TrainingSet:
    """Rows in memory, each of a colour of its own."""
    texts = captions or [f"a photo of number {i}" for i in range(size)]
    return as_training_set([(shade(i), text) for i, text in zip(range(size), texts, strict=True)])


def hugging_face(**columns: Any) -> Any:
    """A ``datasets.Dataset`` with a column ``image``; the lowest versions are tested without the package."""
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def shade(i: int, side: int = 16) -> Image.Image:
    return Image.new("RGB", (side, side), (i * 7 % 256, i * 13 % 256, i * 29 % 256))


def photo(seed: int, side: int = 64) -> Image.Image:
    """A smooth picture with texture that is like no other seed's."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 12, (side, side, 3))
    return Image.fromarray((np.asarray(coarse, float) + noise).clip(0, 255).astype(np.uint8))


def logo(side: int, seed: int = 99) -> Image.Image:
    """A mark that has corners."""
    rng, mark = np.random.default_rng(seed), Image.new("RGB", (20, 20), (250, 220, 40))
    for _ in range(4):
        x, y = (int(v) for v in rng.integers(0, 13, 2))
        mark.paste(tuple(int(v) for v in rng.integers(0, 256, 3)), (x, y, x + 7, y + 7))
    return mark.resize((side, side), Image.Resampling.NEAREST)


def with_logo(picture: Image.Image, left: int = 4, top: int = 4, side: int = 20, seed: int = 99) -> Image.Image:
    marked = picture.copy()
    marked.paste(logo(side, seed), (left, top))
    return marked


def hashes_of(pictures: Sequence[Image.Image]) -> Hashes:
    return hash_rows(as_training_set(list(pictures)))


def jpeg(picture: Image.Image, quality: int = 85) -> Image.Image:
    """The picture, compressed."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def save_folder(folder: Path, pictures: dict[str, Image.Image], captions: dict[str, str] | None = None) -> Path:
    """An image folder; ``captions`` go into ``metadata.jsonl`` with a key that nobody knows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    if captions is not None:
        lines = [{"file_name": name, "text": text, "score": i} for i, (name, text) in enumerate(captions.items())]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, by its relative name."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def same_survey(a: Survey, b: Survey) -> bool:
    """Whether two surveys are equal in everything."""
    bare = [replace(survey, bits=None, strangeness=None) for survey in (a, b)]
    numbers = np.array_equal(a.bits, b.bits) and np.array_equal(a.strangeness, b.strangeness, equal_nan=True)
    return bare[0] == bare[1] and numbers
