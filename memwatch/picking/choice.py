"""Choice: what is watched of a training set, what is held out from training, and what a person must know of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memwatch.config import PickConfig, require
from memwatch.measure.probes import Probe, as_probes
from memwatch.picking.hold_out import held_out, not_trained_on, plan
from memwatch.picking.mix import Picked, Why, ordinary_rows, pick_rows, turns_of
from memwatch.picking.rows import TrainingSet, as_training_set
from memwatch.picking.survey import Group, GroupKind, Survey, survey
from memwatch.picking.words import counted, listed

__all__ = ["Choice", "Picked", "Why", "choose"]

DEFAULT = PickConfig()


@dataclass(frozen=True, eq=False)
class Choice:
    """What is watched of a training set.

    Attributes:
        rows: the training set. survey: what was found in it.
        picked: rows that are watched at every event.
        held_out: rows that must not be trained on: controls.
        peers: ordinary rows, a second reference. turns: rows that take turns, in order.
        notes: what a person must know: numbers, what is not possible and why, what could be done.
        class_rows: rows of ``rows.class_images`` that are controls.
        given_controls, given_peers: those that were given, less controls that are trained on; ``None`` where none were.
        budget, seed: as they were asked for.
    """

    rows: TrainingSet
    survey: Survey
    picked: tuple[Picked, ...]
    held_out: tuple[int, ...]
    peers: tuple[int, ...]
    turns: tuple[int, ...]
    notes: tuple[str, ...]
    class_rows: tuple[int, ...] = ()
    given_controls: tuple[Probe, ...] | None = None
    given_peers: tuple[Probe, ...] | None = None
    budget: int = 0
    seed: int = 0

    @property
    def training_indices(self) -> list[int]:
        """All rows but those held out, rising.

        Rows that cannot be read are among them: what becomes of those is the loader's business, with or without
        memwatch.
        """
        out = set(self.held_out)
        return [row for row in range(self.survey.size) if row not in out]

    def probes(self) -> list[Probe]:
        """The picked rows."""
        return [probe_of(self.rows, picked.row) for picked in self.picked]

    def controls(self) -> list[Probe]:
        """The given controls, the rows held out, and class images."""
        own = [probe_of(self.rows, row) for row in self.held_out]
        kept, ofs = self.rows.class_images, self.class_rows
        images = [] if kept is None else [replace(probe_of(kept, row), row=None) for row in ofs]
        named = [replace(probe, name=f"class-{probe.name}") for probe in images]
        return [*(self.given_controls or ()), *own, *named]

    def peer_probes(self) -> list[Probe]:
        """The given peers, or those that were drawn."""
        return [*(self.given_peers or ()), *(probe_of(self.rows, row) for row in self.peers)]

    def turn_probes(self) -> list[Probe]:
        """The rows that take turns."""
        return [replace(probe_of(self.rows, row), takes_turns=True) for row in self.turns]

    def behind(self, row: int) -> tuple[Group, ...]:
        """All groups that a row is in, the largest first."""
        return tuple(group for group in self.survey.groups if row in group.rows)

    @property
    def without_place(self) -> tuple[Group, ...]:
        """Groups of which no row is watched."""
        watched = {picked.row for picked in self.picked}
        return tuple(group for group in self.survey.groups if watched.isdisjoint(group.rows))


def choose(
    source: Any,
    pick: PickConfig = DEFAULT,
    *,
    probes: int = 16,
    seed: int = 0,
    controls: Any = None,
    peers: Any = None,
) -> Choice:
    """Pick probes, controls, peers and rows that take turns.

    Which rows fill the budget is said in ``picking.mix``, which become controls in ``picking.hold_out``.
    The same rows, settings and seed give the same choice. A budget that would leave too few rows for controls is cut.

    Args:
        source: a dataset, an image folder, an indexable of rows (see ``as_training_set``), or a ``Choice``, which is
            returned as it is.
        probes: how many rows are watched, at least 0.
        controls: as for ``as_probes``. They take the place of rows held out; what is trained on is left out of them.
        peers: likewise; they take the place of rows drawn at random.

    Raises:
        ProbeError: the source holds no image that can be read.
    """
    if isinstance(source, Choice):
        return source
    require(probes >= 0, "probes", probes, "0 or greater")
    rows = source if isinstance(source, TrainingSet) else training_set(source, pick)
    return choose_from(
        rows,
        survey(rows, workers=pick.workers),
        pick,
        budget=probes,
        seed=seed,
        controls=None if controls is None else as_probes(controls),
        peers=None if peers is None else as_probes(peers),
    )


def training_set(source: Any, pick: PickConfig) -> TrainingSet:
    """The rows of a source, by the columns of the configuration."""
    return as_training_set(source, image_column=pick.image_column, caption_column=pick.caption_column)


def choose_from(
    rows: TrainingSet,
    found: Survey,
    pick: PickConfig,
    *,
    budget: int,
    seed: int,
    controls: Sequence[Probe] | None = None,
    peers: Sequence[Probe] | None = None,
) -> Choice:
    """The same from what a survey has found."""
    rng, notes = np.random.default_rng([seed, 29]), list[str]()
    ordinary, readable = ordinary_rows(found), found.size - len(found.unreadable)
    if controls is not None:
        controls, notes = not_trained_on(controls, rows, found)
    planned = plan(rows, readable, len(ordinary), pick, None if controls is None else len(controls), rng)
    room = len(ordinary) - planned.number
    picked = pick_rows(found, budget, rng, lambda group: group.best_first, room)
    watched = [p.row for p in picked]
    out = held_out(found, ordinary, watched, planned.number, rng)
    free = [row for row in ordinary if row not in {*watched, *out}]
    drawn = 0 if peers is not None else min(pick.peers, len(free))
    fellows = tuple(sorted(free[i] for i in rng.permutation(len(free))[:drawn]))
    choice = Choice(
        rows,
        found,
        picked,
        out,
        fellows,
        tuple(turns_of(found, watched, (*out, *fellows), rng)[: pick.rotation]),
        (),
        planned.class_rows,
        None if controls is None else tuple(controls),
        None if peers is None else tuple(peers),
        budget,
        seed,
    )
    return replace(choice, notes=(*notes_of(choice), *notes, *planned.notes))


def probe_of(rows: TrainingSet, row: int) -> Probe:
    """A row as a probe: its file where it has one, else its picture."""
    file = rows.file(row)
    return Probe(rows.caption(row), rows.image(row) if file is None else file, name=rows.name(row), row=row)


def notes_of(choice: Choice) -> list[str]:
    """What was found and what is done, in numbers."""
    found, unreadable = choice.survey, choice.survey.unreadable
    looked_at = [f"{len(choice.picked)} watched", f"{len(choice.turns)} taking turns"]
    rest = found.size - len(unreadable) - sum(map(len, (choice.picked, choice.turns, choice.held_out, choice.peers)))
    looked_at += [f"{rest} not looked at"] if rest else []
    notes = [f"{counted(found.size, 'training row')}: {', '.join(looked_at)}"]
    if found.groups:
        kinds = [sum(g.kind is kind for g in found.groups) for kind in GroupKind]
        what = f"{counted(kinds[0], 'group')} of near-duplicates and {counted(kinds[1], 'shared part')}"
        says = f"{what}, in {counted(len({row for g in found.groups for row in g.rows}), 'row')}"
        without = len(choice.without_place)
        notes.append(f"{says}; {without} without a place of its own" if without else says)
    if unreadable:
        names = listed([choice.rows.name(row) for row in unreadable])
        notes.append(f"{counted(len(unreadable), 'row')} unreadable, so not looked at: {names}")
    if len(choice.picked) < choice.budget:
        fewer = "the others are held out, near-duplicates of those picked, or unreadable"
        notes.append(f"{counted(len(choice.picked), 'row')} picked, where {choice.budget} were asked for: {fewer}")
    return notes
