"""``memwatch.pick``: what to watch of a training set, and what to hold out of it, before a DataLoader exists.

Which rows are watched is decided in ``mix``. Controls are of the training data's own kind and not trained on: they show
what is normal. Siblings (other pictures under the same caption) are the best: they tell a subject that is learned from
a picture that is memorized. Augmented views of training pictures cannot be controls, because they are trained on.

One row in five is held out at most, and one class (prior preservation) image in two. Where that is fewer than judging
takes, nothing is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from memwatch.config import require
from memwatch.denoiser import untouched_streams
from memwatch.measure.probes import MIN_CONTROLS
from memwatch.messages import show_messages
from memwatch.picking.cache import shared_survey
from memwatch.picking.mix import ordinary_rows, pick_rows, rotation_of
from memwatch.picking.picked import Picked
from memwatch.picking.rows import RowError, TrainingSet, as_training_set
from memwatch.picking.survey import GroupKind, Survey
from memwatch.picking.text import counted, listed

PEERS = 8  # ordinary rows, a second reference
SHARE, CLASS_SHARE = 5, 2  # at most one row in so many is held out; of class images more can be generated
SIBLINGS = 5  # a caption with so many rows has a control of its own where one of its rows is watched
WITHOUT = "alerts are uncalibrated, and nothing is called memorized"
BY_HAND = "MemWatch(controls=...) takes pictures of the same kind that are not trained on"


def pick(
    source: Any,
    *,
    probes: int = 16,
    controls: int = 20,
    seed: int = 0,
    prompt: str | None = None,
    class_images: Any = None,
    class_prompt: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Picked:
    """Pick what to watch of a training set, and what to hold out of it as controls.

    It is a pure function of the rows and the seed, the same on every rank, and draws from no global random state. Call
    it before transforms and DataLoader, train on ``picked.train``, and give ``picked`` to ``MemWatch``::

        picked = memwatch.pick(dataset["train"])
        train_dataset = picked.train.with_transform(preprocess)

    The first process surveys the images (duplicates, shared parts, outliers) and keeps the result in the user's cache;
    others wait for it, and later calls read it.

    Args:
        source: an image folder, a ``datasets.Dataset`` (its raw rows are read), a list, a ``Subset``, or anything
            indexable whose rows have image and text.
        probes: how many rows are watched, at least 0.
        controls: how many are held out, at least 11, or 0 for none. One row in five at most, and where that is fewer
            than 11, none; ``picked.notes`` say so.
        prompt: the caption of rows that have none (DreamBooth's ``--instance_prompt``).
        class_images: DreamBooth's class (prior preservation) images, like ``source``; up to half of them become
            controls. Train on ``picked.class_train``.
        class_prompt: their caption.
        image_column, caption_column: where they have other names than training scripts use.

    Raises:
        ConfigError: a number that is not allowed.
        ProbeError: rows that cannot be read, or are transformed at random.
    """
    require(isinstance(probes, int) and probes >= 0, "probes", probes, "0 or greater")
    ok = isinstance(controls, int) and (controls == 0 or controls >= MIN_CONTROLS)
    require(ok, "controls", controls, f"{MIN_CONTROLS} or greater, as judging takes, or 0 for none")
    require(isinstance(seed, int) and seed >= 0, "seed", seed, "0 or greater")
    show_messages()
    columns = {"image_column": image_column, "caption_column": caption_column}
    with untouched_streams():
        rows = as_training_set(source, **columns, prompt=prompt)
        others = None if class_images is None else as_training_set(class_images, **columns, prompt=class_prompt)
        return choose(rows, shared_survey(rows), probes=probes, controls=controls, seed=seed, class_images=others)


def choose(
    rows: TrainingSet,
    found: Survey,
    *,
    probes: int,
    controls: int,
    seed: int,
    class_images: TrainingSet | None = None,
) -> Picked:
    """The same from the survey of the rows; a budget of probes that would leave too few rows for controls is cut."""
    rng = np.random.default_rng([seed, 29])
    ordinary, readable = ordinary_rows(found), found.size - len(found.unreadable)
    of_class = [] if class_images is None or not controls else _readable_rows(class_images, controls, rng)
    planned = plan(controls, readable, len(ordinary), 0 if class_images is None else len(class_images), len(of_class))
    watched = pick_rows(found, probes, rng, len(ordinary) - planned.number)
    taken = [w.row for w in watched]
    out = held_out(found, ordinary, taken, planned.number, rng)
    free = [row for row in ordinary if row not in {*taken, *out}]
    peers = tuple(sorted(free[i] for i in rng.permutation(len(free))[:PEERS]))
    result = Picked(
        rows,
        found,
        watched,
        out,
        peers,
        tuple(rotation_of(found, taken, (*out, *peers), rng)),
        class_images=class_images,
        class_held_out=tuple(sorted(of_class[: planned.class_number])),
        budget=probes,
        seed=seed,
    )
    return replace(result, notes=(*_notes_of(result), *planned.notes))


def _notes_of(picked: Picked) -> list[str]:
    """What was found and what is done, in numbers."""
    found, unreadable = picked.survey, picked.survey.unreadable
    notes = [f"{counted(found.size, 'training row')}, {len(picked.watched)} of them watched"]
    if found.groups:
        kinds = [sum(g.kind is kind for g in found.groups) for kind in GroupKind]
        what = f"{counted(kinds[0], 'group')} of near-duplicates and {counted(kinds[1], 'shared part')}"
        says = f"{what}, in {counted(len({row for g in found.groups for row in g.rows}), 'row')}"
        without = len(picked.unwatched_groups)
        notes.append(f"{says}; of {without} of them no row is watched" if without else says)
    notes += found.notes
    if unreadable:
        names = listed([picked.rows.name(row) for row in unreadable])
        notes.append(f"{counted(len(unreadable), 'row')} unreadable, so not looked at: {names}")
    if len(picked.watched) < picked.budget:
        fewer = "the others are held out, near-duplicates of those picked, or unreadable"
        notes.append(f"{counted(len(picked.watched), 'row')} picked, where {picked.budget} were asked for: {fewer}")
    return notes


# --- hold out --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How many training rows and class images are held out, and what a person is told."""

    number: int
    class_number: int
    notes: tuple[str, ...]


def plan(controls: int, readable: int, ordinary: int, class_images: int = 0, class_readable: int = 0) -> Plan:
    """How many rows and class images are held out: as many as asked for, within the shares above, or none.

    Training rows come first: they are of the training data's own kind.

    Args:
        readable: training rows that can be read. ordinary: of these, rows in no group.
        class_readable: class images known to be readable, ``controls`` at most.

    >>> plan(20, readable=1000, ordinary=900)[:2], plan(20, readable=30, ordinary=30)[:2]
    ((20, 0), (0, 0))
    >>> plan(20, readable=6, ordinary=6, class_images=50, class_readable=50)[:2]
    (1, 19)
    """
    if not controls:
        return Plan(0, 0, (f"no controls were asked for: {WITHOUT}",))
    number = min(controls, readable // SHARE, ordinary)
    class_number = min(controls - number, class_images // CLASS_SHARE, class_readable)
    if number + class_number < MIN_CONTROLS:
        return Plan(0, 0, (_none_note(readable, ordinary, class_images), BY_HAND))
    held = [f"{counted(number, 'row')} held out as controls: train on picked.train"] if number else []
    if class_number:
        held.append(f"{counted(class_number, 'class image')} held out as controls: train on picked.class_train")
        if not number:
            why = "no sibling of the subject is held out, so that learned cannot be told from memorized"
            held.append(f"{why}; that takes {SHARE} pictures of it or more")
    return Plan(number, class_number, tuple(held))


def _none_note(readable: int, ordinary: int, class_images: int) -> str:
    if ordinary < min(MIN_CONTROLS, readable // SHARE):
        why = f"only {ordinary} of {readable} readable rows are in no group, and judging takes {MIN_CONTROLS} controls"
    else:
        of_class = f" and half of {class_images} class images" if class_images else ""
        few = f"a fifth of {counted(readable, 'readable row')}{of_class}"
        why = f"{few} is fewer than the {MIN_CONTROLS} controls that judging takes"
    return f"nothing is held out, because {why}; without controls {WITHOUT}"


def _readable_rows(rows: TrainingSet, number: int, rng: np.random.Generator) -> list[int]:
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

    A caption of at least 5 rows of which one is watched gives a row first, as far as the number goes. Then each caption
    that several rows share gives rows in proportion to its size, as do all the others together. A caption of which most
    rows are in groups comes last: its other rows may belong to them as well, unnoticed.

    Args:
        ordinary: rows in no group; those that are not watched may be held out.
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
