"""Choose: from the survey of a training set to what is watched and what is held out; a pure function of its seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from memwatch.picking.hold_out import held_out, plan, readable_rows
from memwatch.picking.mix import ordinary_rows, pick_rows, rotation_of
from memwatch.picking.picked import Picked
from memwatch.picking.survey import GroupKind, Survey
from memwatch.picking.text import counted, listed
from memwatch.picking.training_set import TrainingSet

PEERS = 8  # ordinary rows, a second reference


def choose(
    rows: TrainingSet,
    found: Survey,
    *,
    probes: int,
    controls: int,
    seed: int,
    class_images: TrainingSet | None = None,
) -> Picked:
    """Pick probes, controls, peers and the rotation from what a survey has found.

    Which rows fill the budget is said in ``mix``, which become controls in ``hold_out``. The same rows, numbers and
    seed give the same answer. A budget that would leave too few rows for controls is cut.

    Args:
        probes: how many rows are watched, at least 0.
        controls: how many rows and class images are held out, where that is possible; 0 for none.
        class_images: DreamBooth's, if any.
    """
    rng = np.random.default_rng([seed, 29])
    ordinary, readable = ordinary_rows(found), found.size - len(found.unreadable)
    of_class = [] if class_images is None or not controls else readable_rows(class_images, controls, rng)
    planned = plan(controls, readable, len(ordinary), 0 if class_images is None else len(class_images), len(of_class))
    room = len(ordinary) - planned.number
    watched = pick_rows(found, probes, rng, lambda group: group.best_first, room)
    picked = [w.row for w in watched]
    out = held_out(found, ordinary, picked, planned.number, rng)
    free = [row for row in ordinary if row not in {*picked, *out}]
    peers = tuple(sorted(free[i] for i in rng.permutation(len(free))[:PEERS]))
    result = Picked(
        rows,
        found,
        watched,
        out,
        peers,
        tuple(rotation_of(found, picked, (*out, *peers), rng)),
        class_images=class_images,
        class_held_out=tuple(sorted(of_class[: planned.class_number])),
        budget=probes,
        seed=seed,
    )
    return replace(result, notes=(*notes_of(result), *planned.notes))


def notes_of(picked: Picked) -> list[str]:
    """What was found and what is done, in numbers."""
    found, unreadable = picked.survey, picked.survey.unreadable
    notes = [f"{counted(found.size, 'training row')}, {len(picked.watched)} of them watched"]
    if found.groups:
        kinds = [sum(g.kind is kind for g in found.groups) for kind in GroupKind]
        what = f"{counted(kinds[0], 'group')} of near-duplicates and {counted(kinds[1], 'shared part')}"
        says = f"{what}, in {counted(len({row for g in found.groups for row in g.rows}), 'row')}"
        without = len(picked.unwatched_groups)
        notes.append(f"{says}; of {without} of them no row is watched" if without else says)
    if found.sampled is not None:
        what = f"shared parts were searched in {found.sampled} rows, and those found were looked for in the others"
        notes.append(f"{what}; a part that few rows share can be missed")
    if unreadable:
        names = listed([picked.rows.name(row) for row in unreadable])
        notes.append(f"{counted(len(unreadable), 'row')} unreadable, so not looked at: {names}")
    if len(picked.watched) < picked.budget:
        fewer = "the others are held out, near-duplicates of those picked, or unreadable"
        notes.append(f"{counted(len(picked.watched), 'row')} picked, where {picked.budget} were asked for: {fewer}")
    return notes
