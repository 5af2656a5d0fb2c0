"""What is found in a training set before training: planted groups, moved marks, and whether they are picked."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from photographs import UNSEEN, random_view
from PIL import Image

from evidence.pages.markdown import markdown_table
from evidence.worlds.items import DOSES, PLANTED, Item, Kind, known_pictures, mark, planted_set
from evidence.worlds.shapes import rectangle
from memwatch.measure.images import decoded
from memwatch.picking.hashes import hash_of
from memwatch.picking.pick import choose
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import Group, Survey, survey
from memwatch.picking.training_set import TrainingSet
from memwatch.report.about import machine

PACKAGES = ("numpy", "scipy", "pillow", "imagehash", "memwatch")  # that results depend on
SEEDS = tuple(range(10))
MOVED_SEEDS = tuple(range(5))
BUDGET = 0.05  # probes, share of the set
PURE, COVER = 0.8, 0.5  # a group counts when so much of it is of one item, and so much of the item is in it
INNOCENT = (Kind.ORDINARY, Kind.LEARNED, Kind.CONTROL)  # nothing of them is shown twice
SIDES = (48, 64, 80, 96)  # of moved marks, pixels of 256
MEMBERS, OTHERS = 8, 200  # pictures with each moved mark, and without any
TIMED = 200  # pictures that hashing is timed on

PAGE = """# What is found before training

Written by `bench.py --pick`. {machine}.

The benchmark's own sets as files would hold them: every planted item is drawn as often as its dose says, an ordinary
photo once: about 780 pictures of 64 px, seeds {seeds}. The survey (`memwatch pick`) knows nothing of what was planted.

* `found`: items of which there is a group that holds at least {cover:.0%} of its pictures, and of whose pictures at
  least {pure:.0%} are the item's.
* `picked`: items of which at least one picture is among the probes, with a budget of {budget:.0%} of the set.

{table}

Logos found: {logos:.1%}. Planted items picked: {picked:.1%}. Ordinary and learned pictures that are put into any group:
{false:.2%}. The latter are random views of a few photographs, so that some truly overlap.

## Moved marks

Views of photographs, 256 px, JPEG: {members} show the same mark, each at a random place, among {others} without one. A
`flat` mark has three colours, a `photo` is a view of a photograph.

{moved}

Pictures without a mark that are put into any group: {moved_false:.2%}.

## Time

{milliseconds:.1f} ms of one core to hash a JPEG file of 512 px: {minutes:.1f} minutes for 20,000 on two cores.
"""


@dataclass(frozen=True)
class Planted:
    """A finite training set, and the truth about it.

    Attributes:
        names: what is planted, by number.
        owner: for each row the number of what it shows; -1 for nothing.
        rows: the training set.
    """

    names: tuple[str, ...]
    owner: np.ndarray
    rows: TrainingSet


def files_of(items: Sequence[Item], seed: int) -> Planted:
    """Every item drawn as often as its dose says."""
    rng = np.random.default_rng([seed, 31])
    owner = [number for number, item in enumerate(items) for _ in range(item.dose)]
    pairs = [(items[number].draw(rng), items[number].caption) for number in owner]
    return Planted(tuple(item.name for item in items), np.array(owner), as_training_set(pairs))


def moved_marks(seed: int, others: int = OTHERS, members: int = MEMBERS) -> Planted:
    """Photographs with marks at random places: a flat and a photographic one of each of ``SIDES``."""
    rng = np.random.default_rng([seed, 37])
    marks = {}
    for side in SIDES:
        small = mark(rectangle(0, 0, 18, 18), rng).crop((0, 0, 18, 18))
        marks[f"flat {side} px"] = small.resize((side, side), Image.Resampling.NEAREST)
        marks[f"photo {side} px"] = random_view(UNSEEN[int(rng.integers(len(UNSEEN)))].image(), rng, side)
    owner = [number for number in range(len(marks)) for _ in range(members)] + [-1] * others
    pictures, known = [], known_pictures()
    for number in owner:
        picture = random_view(known[int(rng.integers(len(known)))][0], rng, 256)
        if number >= 0:
            on = list(marks.values())[number]
            left, top = rng.integers(0, 256 - on.width, 2)
            picture.paste(on, (int(left), int(top)))
        pictures.append(decoded(jpeg(picture)))
    return Planted(tuple(marks), np.array(owner), as_training_set([(picture, "") for picture in pictures]))


def is_found(number: int, owner: np.ndarray, groups: Iterable[Group]) -> bool:
    """Whether a group holds most of an item, and little else; see ``PURE`` and ``COVER``."""
    members = int((owner == number).sum())
    of = [(len(group.rows), int((owner[list(group.rows)] == number).sum())) for group in groups]
    return any(inside >= PURE * size and inside >= COVER * members for size, inside in of)


def grouped(rows: np.ndarray, groups: Iterable[Group]) -> float:
    """Share of ``rows`` that are in any group."""
    inside = {row for group in groups for row in group.rows}
    return sum(int(row) in inside for row in rows) / max(1, len(rows))


def picked(planted: Planted, found: Survey, seed: int) -> set[int]:
    """Numbers of what is among the picks, at the budget."""
    budget = math.ceil(BUDGET * found.size)
    chosen = choose(planted.rows, found, probes=budget, controls=20, seed=seed)
    return {int(planted.owner[w.row]) for w in chosen.watched}


@dataclass
class Tally:
    """Counts over seeds.

    Attributes:
        planted: by kind and dose, for each item whether it was found and whether it was picked.
        moved: by mark, for each set whether it was found.
        false: for each set the share of ordinary and learned pictures in any group.
        moved_false: for each set of moved marks the share of pictures without one in any group.
    """

    planted: dict[tuple[Kind, int], list[tuple[bool, bool]]] = field(
        default_factory=lambda: {(kind, dose): [] for kind in PLANTED for dose in DOSES}
    )
    moved: dict[str, list[bool]] = field(default_factory=dict)
    false: list[float] = field(default_factory=list)
    moved_false: list[float] = field(default_factory=list)

    def add_planted(self, seed: int) -> None:
        items = planted_set(seed)
        planted = files_of(items, seed)
        found = survey(planted.rows)
        among = picked(planted, found, seed)
        for number, item in enumerate(items):
            if item.kind in PLANTED:
                pair = is_found(number, planted.owner, found.groups), number in among
                self.planted[item.kind, item.dose].append(pair)
        innocent = [number for number, item in enumerate(items) if item.kind in INNOCENT]
        self.false.append(grouped(np.flatnonzero(np.isin(planted.owner, innocent)), found.groups))

    def add_moved(self, seed: int) -> None:
        planted = moved_marks(seed)
        groups = survey(planted.rows).groups
        for number, name in enumerate(planted.names):
            self.moved.setdefault(name, []).append(is_found(number, planted.owner, groups))
        self.moved_false.append(grouped(np.flatnonzero(planted.owner < 0), groups))


def write_picking(folder: Path, seeds: Sequence[int] = SEEDS, moved_seeds: Sequence[int] = MOVED_SEEDS) -> Path:
    """``pick.md`` in ``folder``."""
    tally = Tally()
    for seed in seeds:
        tally.add_planted(seed)
    for seed in moved_seeds:
        tally.add_moved(seed)
    text = page(tally, f"{min(seeds)} to {max(seeds)}", hashing_time())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pick.md"
    file.write_text(text, encoding="utf-8")
    return file


def page(tally: Tally, seeds: str, milliseconds: float) -> str:
    """The results in words and tables.

    Args:
        milliseconds: to hash a picture on one core.
    """
    cells = tally.planted.items()
    rows = [
        {"kind": kind.value, "dose": dose, "found": _count(f for f, _ in of), "picked": _count(p for _, p in of)}
        for (kind, dose), of in cells
    ]
    return PAGE.format(
        machine=machine(*PACKAGES),
        seeds=seeds,
        pure=PURE,
        cover=COVER,
        budget=BUDGET,
        table=markdown_table(rows),
        logos=_mean(f for (kind, _), of in cells if kind is Kind.LOGO for f, _ in of),
        picked=_mean(p for _, of in cells for _, p in of),
        false=_mean(tally.false),
        members=MEMBERS,
        others=OTHERS,
        moved=markdown_table([{"mark": name, "found": _count(of)} for name, of in tally.moved.items()]),
        moved_false=_mean(tally.moved_false),
        milliseconds=milliseconds,
        minutes=20000 * milliseconds / 1000 / 60 / 2,
    )


def hashing_time() -> float:
    """Milliseconds of processor time to read and hash a JPEG of 512 px."""
    rng = np.random.default_rng(41)
    files = [jpeg(random_view(known_pictures()[i % len(known_pictures())][0], rng, 512)) for i in range(TIMED)]
    start = time.process_time()
    for file in files:
        hash_of(decoded(file, 256))
    return (time.process_time() - start) / TIMED * 1000


def jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    """The bytes of a JPEG file."""
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _count(values: Iterable[bool]) -> str:
    values = list(values)
    return f"{sum(values)}/{len(values)}"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))
