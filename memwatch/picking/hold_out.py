"""Hold out: which rows become controls where none are given, and whether given ones were trained on.

Controls are of the training data's own kind and not trained on: they show what is normal. Siblings (other pictures
under the same caption) are the best: they tell a subject that is learned from a picture that is stored. Augmented views
of training pictures are none, because they are trained on.

A set is too small where a fifth of it is less than the controls that judging takes. What remains there: class (prior
preservation) images, one or two pictures set aside as the only siblings of the subject, and controls by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from memwatch.config import PickConfig
from memwatch.measure.probes import MIN_CONTROLS, Probe
from memwatch.picking.pictures import decoded
from memwatch.picking.rows import RowError, TrainingSet
from memwatch.picking.survey import Survey, matches
from memwatch.picking.words import counted, listed

SHARE = 5  # at most one row in so many is held out
LEAST = 5  # the smallest set of which pictures are set aside: two of five at most
SIBLINGS = 5  # a caption with so many rows has a control of its own where one of its rows is watched
WITHOUT = "alerts are uncalibrated, and nothing is called memorized"
BY_HAND = "controls= takes pictures of the same kind by hand; augmented views of training pictures are none"
SIBLING = "none of the controls is a sibling of the subject, so that learned cannot be told from stored"


@dataclass(frozen=True)
class Plan:
    """How controls come about.

    Attributes:
        number: training rows to hold out.
        class_rows: rows of the set's class images that are controls.
        notes: for people.
    """

    number: int
    class_rows: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def plan(
    rows: TrainingSet, readable: int, ordinary: int, pick: PickConfig, given: int | None, rng: np.random.Generator
) -> Plan:
    """How many rows are held out, and what else is a control.

    Args:
        readable: rows that can be read. ordinary: those of them in no group, of which alone controls are taken.
        given: controls that were given; ``None`` where none were.
    """
    is_small = readable // SHARE < MIN_CONTROLS
    aside = min(pick.set_aside, ordinary, 2 * readable // LEAST) if is_small and readable >= LEAST else 0
    cut = [_cut_note(pick.set_aside, aside)] if is_small and aside < pick.set_aside else []
    if given is not None:
        return Plan(aside, notes=(*_given_notes(given, aside), *cut))
    if not pick.hold_out:
        return Plan(0, notes=(f"pick.hold_out is 0, so that there are no controls: {WITHOUT}",))
    number = min(number_of(pick.hold_out, readable), ordinary)
    if number >= MIN_CONTROLS:
        more = class_images(rows, pick.hold_out - number, rng)
        return Plan(number, more, (f"{counted(number, 'row')} held out as controls: leave them out of training",))
    found = class_images(rows, max(0, pick.hold_out - aside), rng)
    if aside + len(found) < MIN_CONTROLS:
        return Plan(0, notes=(_none_note(pick, readable, ordinary, aside, len(found)), *_offer(readable)))
    notes = [f"{len(found)} class images are controls, since the set is too small to hold out rows of it"]
    if aside:
        notes.append(_aside_note(aside))
    else:
        notes.append(f"{SIBLING}; {_aside_offer(readable)}")
    return Plan(aside, found, (*notes, *cut))


def number_of(hold_out: int, readable: int) -> int:
    """Rows that are held out: a fifth of the set at most, and none where that is too few to judge by.

    >>> number_of(20, 1000), number_of(20, 60), number_of(20, 49)
    (20, 12, 0)
    """
    number = min(hold_out, readable // SHARE)
    return number if number >= MIN_CONTROLS else 0


def class_images(rows: TrainingSet, number: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Readable class images, drawn at random; none where the training set has none."""
    if rows.class_images is None or number <= 0:
        return ()
    found: list[int] = []
    for row in rng.permutation(len(rows.class_images)).tolist():
        try:
            rows.class_images.image(row)
            found.append(row)
        except RowError:
            continue
        if len(found) == number:
            break
    return tuple(sorted(found))


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


def not_trained_on(given: Sequence[Probe], rows: TrainingSet, survey: Survey) -> tuple[list[Probe], list[str]]:
    """The given controls that are no near-duplicates of a training row, and a note that names the others.

    Prompts stay, and so do pictures that cannot be read: whoever encodes them says so.
    """
    pictures = {i: picture for i, probe in enumerate(given) if (picture := picture_of(probe)) is not None}
    same = dict(zip(pictures, matches(list(pictures.values()), survey), strict=True)) if pictures else {}
    known = {i: row for i, row in same.items() if row is not None}
    if not known:
        return list(given), []
    names = [f"{given[i].name} ({rows.name(row)})" for i, row in known.items()]
    which = "left out, because training rows are near-duplicates of them"
    note = f"{len(known)} of {counted(len(given), 'given control')} {which}: {listed(names)}"
    return [probe for i, probe in enumerate(given) if i not in known], [note]


def picture_of(probe: Probe) -> Image.Image | None:
    """The image of a probe as RGB; ``None`` where it has none, or none that can be read."""
    try:
        return None if probe.image is None else decoded(probe.image)
    except (OSError, SyntaxError, ValueError):  # PIL raises SyntaxError on some broken files
        return None


def _given_notes(given: int, aside: int) -> list[str]:
    few = f"too few controls ({given + aside}): judging takes {MIN_CONTROLS}, so that nothing is called memorized"
    notes = [few] if given + aside < MIN_CONTROLS else []
    return notes + ([_aside_note(aside)] if aside else [])


def _aside_note(aside: int) -> str:
    return f"{counted(aside, 'row')} set aside as siblings of the subject: leave them out of training"


def _cut_note(wanted: int, aside: int) -> str:
    rule = f"two of every {LEAST} readable rows at most, and none of near-duplicates or with a shared part"
    return f"pick.set_aside is {wanted}, but {aside} can be set aside: {rule}"


def _none_note(pick: PickConfig, readable: int, ordinary: int, aside: int, class_rows: int) -> str:
    if 0 < pick.hold_out < MIN_CONTROLS:
        why = f"pick.hold_out is {pick.hold_out}, and judging takes {MIN_CONTROLS} controls"
    elif number_of(pick.hold_out, readable):
        why = f"{ordinary} rows are in no group, and judging takes {MIN_CONTROLS} controls"
    else:
        why = f"a fifth of {readable} readable rows is fewer than the {MIN_CONTROLS} controls that judging takes"
    more = [f"{n} {what}" for n, what in ((aside, "pictures set aside"), (class_rows, "class images")) if n]
    also = f", and so are {' with '.join(more)}" if more else ""
    return f"no row is held out, because {why}{also}; without controls {WITHOUT}"


def _offer(readable: int) -> list[str]:
    needs = f"class (prior preservation) images are controls where the training set has {MIN_CONTROLS} or more of them"
    return [f"{needs}; {BY_HAND}", f"beside such controls, {_aside_offer(readable)}"]


def _aside_offer(readable: int) -> str:
    if readable < LEAST:
        return f"pictures can be set aside as siblings of the subject where there are {LEAST} or more"
    number = 2 if readable > LEAST else 1
    return f"pick.set_aside: {number} keeps so many pictures out of training, as the only siblings that the subject has"
