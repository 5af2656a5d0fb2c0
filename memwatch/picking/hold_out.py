"""Hold out: which rows become controls, and what is said where there can be none.

Controls are of the training data's own kind and not trained on: they show what is normal. Siblings (other pictures
under the same caption) are the best: they tell a subject that is learned from a picture that is stored. Augmented views
of training pictures are none, because they are trained on.

One row in five is held out at most, and one class (prior preservation) image in two. Where that is less than judging
takes, nothing is held out, because it would be of no use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memwatch.measure.probes import MIN_CONTROLS
from memwatch.picking.rows import RowError, TrainingSet
from memwatch.picking.survey import Survey
from memwatch.picking.text import counted

SHARE, CLASS_SHARE = 5, 2  # at most one row in so many is held out; of class images more can be generated
SIBLINGS = 5  # a caption with so many rows has a control of its own where one of its rows is watched
WITHOUT = "alerts are uncalibrated, and nothing is called memorized"
BY_HAND = "MemWatch(controls=...) takes pictures of the same kind that are not trained on"


@dataclass(frozen=True)
class Plan:
    """How many controls there are.

    Attributes:
        number: training rows to hold out. class_number: class images to hold out.
        notes: for people.
    """

    number: int = 0
    class_number: int = 0
    notes: tuple[str, ...] = ()


def plan(controls: int, readable: int, ordinary: int, class_images: int = 0, class_readable: int = 0) -> Plan:
    """How many rows and class images are held out: as many as asked for, within the shares above, or none.

    Args:
        controls: as asked for; 0 for none.
        readable: rows that can be read. ordinary: those of them in no group, of which alone controls are taken.
        class_images: how many there are. class_readable: how many of them can be read, as far as that was tried.

    >>> plan(20, readable=1000, ordinary=1000).number, plan(20, 60, 60).number, plan(20, 54, 54).number
    (20, 12, 0)
    >>> dreambooth = plan(20, readable=6, ordinary=6, class_images=50, class_readable=50)
    >>> dreambooth.number, dreambooth.class_number
    (1, 19)
    """
    if not controls:
        return Plan(notes=(f"no controls were asked for: {WITHOUT}",))
    number = min(controls, readable // SHARE, ordinary)
    class_number = min(controls - number, class_images // CLASS_SHARE, class_readable)
    if number + class_number < MIN_CONTROLS:
        return Plan(notes=(_none_note(readable, ordinary, class_images), BY_HAND))
    held = [f"{counted(number, 'row')} held out as controls: train on picked.train"] if number else []
    if class_number:
        held.append(f"{counted(class_number, 'class image')} held out as controls: train on picked.class_train")
        if not number:
            why = "no sibling of the subject is held out, so that learned cannot be told from stored"
            held.append(f"{why}; that takes {SHARE} pictures of it or more")
    return Plan(number, class_number, tuple(held))


def readable_rows(rows: TrainingSet, number: int, rng: np.random.Generator) -> list[int]:
    """Up to ``number`` rows that can be read, in random order."""
    found: list[int] = []
    for row in rng.permutation(len(rows)).tolist():
        if len(found) == number:
            break
        try:
            rows.image(row)
            found.append(row)
        except RowError:
            continue
    return found


def held_out(
    survey: Survey, ordinary: Sequence[int], watched: Sequence[int], number: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """The rows that are held out.

    Each caption that several rows share is asked in proportion to its rows, as are all the others together; one of at
    least 5 rows of which one is watched gives a row first, as far as the number goes. A caption of which most rows are
    in groups comes last: its other rows may belong to them as well, unnoticed.

    Args:
        ordinary: rows in no group; those that are not watched may be held out.
        watched: rows that are picked.
    """
    taken, among = set(watched), set(ordinary)
    free = [ordinary[i] for i in rng.permutation(len(ordinary)) if ordinary[i] not in taken]
    caption_of = {row: i for i, rows in enumerate(survey.captions) for row in rows}
    doubtful = {i for i, rows in enumerate(survey.captions) if 2 * sum(row in among for row in rows) < len(rows)}
    strata: dict[int, list[int]] = {}
    for row in free:
        if (i := caption_of.get(row, -1)) not in doubtful:
            strata.setdefault(i, []).append(row)
    asked = {caption_of[row] for row in taken if row in caption_of}
    firsts = [i for i, rows in enumerate(survey.captions) if i in asked and len(rows) >= SIBLINGS and i in strata]
    chosen = [strata[i].pop() for i in firsts[:number]]
    shares = in_proportion({i: len(rows) for i, rows in strata.items()}, number - len(chosen))
    for i, share in shares.items():
        chosen += strata[i][:share]
    last = [row for row in free if caption_of.get(row, -1) in doubtful]
    return tuple(sorted([*chosen, *last[: number - len(chosen)]]))


def in_proportion(sizes: dict[int, int], number: int) -> dict[int, int]:
    """``number`` split in proportion to sizes, by largest remainders; never more than there are.

    >>> in_proportion({0: 60, 1: 30, 2: 10}, 5)
    {0: 3, 1: 2, 2: 0}
    """
    total = sum(sizes.values())
    if number >= total:
        return dict(sizes)
    exact = {i: number * size / total for i, size in sizes.items()}
    shares = {i: int(share) for i, share in exact.items()}
    rest = sorted(exact, key=lambda i: shares[i] - exact[i])[: number - sum(shares.values())]
    return {i: share + (i in rest) for i, share in shares.items()}


def _none_note(readable: int, ordinary: int, class_images: int) -> str:
    of_class = f" and {class_images} class images" if class_images else ""
    few = f"a fifth of {counted(readable, 'readable row')}" + (f" and half of{of_class[4:]}" if of_class else "")
    few = f"{few} is fewer than the {MIN_CONTROLS} controls that judging takes"
    grouped = f"only {ordinary} of {readable} readable rows are in no group, and judging takes {MIN_CONTROLS} controls"
    why = grouped if ordinary < min(MIN_CONTROLS, readable // SHARE) else few
    return f"nothing is held out, because {why}; without controls {WITHOUT}"
