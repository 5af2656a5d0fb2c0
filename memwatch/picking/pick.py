"""``memwatch.pick``: what to watch of a training set, and what to hold out of it, before a DataLoader exists.

Controls are of the training data's own kind and not trained on: they show what is normal. Siblings (other pictures
under the same caption) are the best: they tell a subject that is learned from a picture that is memorized.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from memwatch.config import require
from memwatch.denoiser import untouched_streams
from memwatch.measure.captions import without_caption
from memwatch.measure.probes import MIN_CONTROLS
from memwatch.messages import counted, listed, show_messages, warn
from memwatch.picking.cache import shared_survey
from memwatch.picking.mix import ordinary_rows, pick_rows, rotation_of
from memwatch.picking.picked import Picked
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import GroupKind, Survey
from memwatch.picking.training_set import RowError, TrainingSet

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

    The first process surveys the images (duplicates, shared parts, outliers) and keeps the result in the user's cache.

    Args:
        source: an image folder, a ``datasets.Dataset`` (its raw rows are read), a list, a ``Subset``, or anything
            indexable whose rows have image and text.
        probes: how many rows are watched, at least 0.
        controls: how many are held out, at least 11, or 0 for none. One row in five at most, and where that is fewer
            than 11, none; ``picked.notes`` say so.
        prompt: the caption of rows that have none (DreamBooth's ``--instance_prompt``).
        class_images, class_prompt: DreamBooth's class (prior preservation) images, like ``source``, and their caption;
            up to half of them become controls. Train on ``picked.class_train``.
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
        for some in filter(None, (rows, others)):
            if missing := _without_caption(some):
                warn(missing)
        return choose(rows, shared_survey(rows), probes=probes, controls=controls, seed=seed, class_images=others)


def choose(
    rows: TrainingSet, found: Survey, *, probes: int, controls: int, seed: int, class_images: TrainingSet | None = None
) -> Picked:
    """The same from the survey of the rows; a budget of probes that would leave too few rows for controls is cut."""
    rng = np.random.default_rng([seed, 29])
    readable = found.size - len(found.unreadable)
    ordinary = ordinary_rows(found, min(controls, readable // SHARE))
    of_class = [] if class_images is None or not controls else _readable_rows(class_images, controls, rng)
    total_class = 0 if class_images is None else len(class_images)
    number, class_number, notes = plan(controls, readable, len(ordinary), total_class, len(of_class))
    watched = pick_rows(found, probes, rng, len(ordinary) - number, ordinary)
    taken = [w.row for w in watched]
    out = held_out(found, ordinary, taken, number, rng)
    rotation = tuple(rotation_of(found, taken, out, rng))
    aside = tuple(sorted(of_class[:class_number]))
    if number and len(ordinary) > (alone := len(ordinary_rows(found))):
        why = f"{counted(alone, 'row')} {'is' if alone == 1 else 'are'} in no group, so rows that share a part are held"
        notes.append(f"{why} out as well; what controls show cannot be called memorized")
    picked = Picked(rows, found, watched, out, rotation, (), class_images, aside, budget=probes, seed=seed)
    return replace(picked, notes=(*_notes_of(picked), *notes))


def _without_caption(rows: TrainingSet) -> str | None:
    return without_caption((rows.caption(row) for row in range(len(rows))), noun="row", found=rows.instead)


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
    notes += [*picked.rows.notes, *found.notes]
    if missing := _without_caption(picked.rows):
        notes.append(missing)
    if unreadable:
        names = listed([picked.rows.name(row) for row in unreadable])
        notes.append(f"{counted(len(unreadable), 'row')} unreadable, so not looked at: {names}")
    if len(picked.watched) < min(picked.budget, found.size):
        fewer = "the others are held out, near-duplicates of those picked, or unreadable"
        notes.append(f"{counted(len(picked.watched), 'row')} picked, where {picked.budget} were asked for: {fewer}")
    return notes


def plan(
    controls: int, readable: int, ordinary: int, class_images: int = 0, class_readable: int = 0
) -> tuple[int, int, list[str]]:
    """How many rows and class images are held out, and what a person is told: as many as asked for, or none.

    Args:
        readable: training rows that can be read. ordinary: of these, rows in no group.
        class_readable: class images known to be readable, ``controls`` at most.

    >>> plan(20, readable=30, ordinary=30)[:2], plan(20, readable=6, ordinary=6, class_images=50, class_readable=50)[:2]
    ((0, 0), (1, 19))
    """
    if not controls:
        return 0, 0, [f"no controls were asked for: {WITHOUT}"]
    number = min(controls, readable // SHARE, ordinary)
    class_number = min(controls - number, class_images // CLASS_SHARE, class_readable)
    if number + class_number < MIN_CONTROLS:
        most = f"one in {SHARE} of {counted(readable, 'readable row')} ({ordinary} in no group)"
        most += f" and half of {class_images} class images" if class_images else ""
        why = f"at most {most} may be, and judging takes {MIN_CONTROLS} controls"
        return 0, 0, [f"nothing is held out: {why}; without controls {WITHOUT}", BY_HAND]
    aside = "held out as controls: train on picked"
    notes = [f"{counted(number, 'row')} {aside}.train (memwatch pick: OUT/train)"] if number else []
    if class_number:
        notes.append(f"{counted(class_number, 'class image')} {aside}.class_train (OUT/class)")
        if not number:
            why = "no sibling of the subject is held out, so that learned cannot be told from memorized"
            notes.append(f"{why}; that takes {SHARE} pictures of it or more")
    return number, class_number, notes


def _readable_rows(rows: TrainingSet, number: int, rng: np.random.Generator) -> list[int]:
    """Up to ``number`` rows that can be read, in random order."""
    found: list[int] = []
    for row in rng.permutation(len(rows)).tolist():
        if len(found) < number:
            with suppress(RowError):
                rows.image(row)
                found.append(row)
    return found


def held_out(
    survey: Survey, ordinary: Sequence[int], watched: Sequence[int], number: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """The rows that are held out: of those in no group (``ordinary``) that are not watched, ``number`` at most.

    A caption of at least 5 rows of which one is watched gives a row first, as far as the number goes. Then each caption
    that several rows share gives rows in proportion to its size, as do all the others together. A caption of which most
    rows are in groups comes last: its other rows may belong to them as well, unnoticed.
    """
    taken, among = set(watched), set(ordinary)
    free = [ordinary[i] for i in rng.permutation(len(ordinary)) if ordinary[i] not in taken]
    caption_of = {row: i for i, rows in enumerate(survey.captions) for row in rows}
    doubtful = {i for i, rows in enumerate(survey.captions) if 2 * sum(row in among for row in rows) < len(rows)}
    strata: dict[int, list[int]] = {}
    last: list[int] = []
    for row in free:
        i = caption_of.get(row, -1)
        (last if i in doubtful else strata.setdefault(i, [])).append(row)
    asked = {caption_of[row] for row in taken if row in caption_of}
    firsts = [i for i, rows in enumerate(survey.captions) if i in asked and len(rows) >= SIBLINGS and i in strata]
    chosen = [strata[i].pop() for i in firsts[:number]]
    for i, share in in_proportion({i: len(rows) for i, rows in strata.items()}, number - len(chosen)).items():
        chosen += strata[i][:share]
    return tuple(sorted([*chosen, *last[: number - len(chosen)]]))


def in_proportion(sizes: dict[int, int], number: int) -> dict[int, int]:
    """``number`` split in proportion to sizes, by largest remainders; never more than there are."""
    total = sum(sizes.values())
    if number >= total:
        return dict(sizes)
    exact = {i: number * size / total for i, size in sizes.items()}
    shares = {i: int(share) for i, share in exact.items()}
    rest = sorted(exact, key=lambda i: shares[i] - exact[i])[: number - sum(shares.values())]
    return {i: share + (i in rest) for i, share in shares.items()}
