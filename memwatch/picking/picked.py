"""Picked: what is watched of a training set, what is held out of it, and what is left to train on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from memwatch.measure.probes import Probe
from memwatch.picking.mix import PickedRow
from memwatch.picking.survey import Group, Survey
from memwatch.picking.training_set import TrainingSet, content_key


@dataclass(frozen=True, eq=False)
class Picked:
    """What ``memwatch.pick`` returns. Row numbers are those of what it was given.

    Attributes:
        rows: the training set as images with captions. survey: what was found in it.
        watched: rows that are watched at every event.
        held_out, class_held_out: rows, and class images, that become controls; ``train``, ``class_train`` lack them.
        rotation: the other rows, in the order in which they are screened, a few per event.
        notes: what a person should know: numbers, what is not possible and why, what could be done.
        class_images: DreamBooth's class (prior preservation) images; ``None`` without them.
        budget, seed: as they were asked for.
    """

    rows: TrainingSet
    survey: Survey
    watched: tuple[PickedRow, ...] = ()
    held_out: tuple[int, ...] = ()
    rotation: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    class_images: TrainingSet | None = None
    class_held_out: tuple[int, ...] = ()
    budget: int = 0
    seed: int = 0

    @cached_property
    def train(self) -> Any:
        """The training set without the held-out rows, in its own type; unreadable rows are in it.

        Of a ``datasets.Dataset`` a ``select``, of a list a list, of an image folder a list of
        ``{"image": path, "text": caption}``, and of anything else a ``Subset``.
        """
        return self.rows.some(self.train_rows)

    @property
    def train_rows(self) -> list[int]:
        """The numbers of the rows in ``train``, rising."""
        out = set(self.held_out)
        return [row for row in range(len(self.rows)) if row not in out]

    @cached_property
    def class_train(self) -> Any:
        """The class images without those held out, in their own type; ``None`` where there are no class images."""
        if self.class_images is None:
            return None
        out = set(self.class_held_out)
        return self.class_images.some([row for row in range(len(self.class_images)) if row not in out])

    def probes(self) -> list[Probe]:
        """The watched rows."""
        return [self.rows.probe(watched.row) for watched in self.watched]

    def controls(self) -> list[Probe]:
        """The rows held out, and class images held out, whose names begin with ``class-``."""
        images = [] if self.class_images is None else [self.class_images.probe(row) for row in self.class_held_out]
        own = [self.rows.probe(row) for row in self.held_out]
        return own + [replace(probe, row=None, name=f"class-{probe.name}") for probe in images]

    def rotation_probes(self, number: int) -> list[Probe]:
        """The first ``number`` rows of the rotation."""
        return [replace(self.rows.probe(row), in_rotation=True) for row in self.rotation[:number]]

    @cached_property
    def control_keys(self) -> dict[str, str]:
        """By the name of a control the hash of its image, see ``content_key``."""
        keys = {self.rows.name(row): content_key(self.rows.raw(row)) for row in self.held_out}
        if (images := self.class_images) is not None:
            keys |= {f"class-{images.name(row)}": content_key(images.raw(row)) for row in self.class_held_out}
        return keys

    def groups_with(self, row: int) -> tuple[Group, ...]:
        """All groups that a row is in, the largest first."""
        return tuple(group for group in self.survey.groups if row in group.rows)

    @property
    def unwatched_groups(self) -> tuple[Group, ...]:
        """Groups of which no row is watched."""
        watched = {picked.row for picked in self.watched}
        return tuple(group for group in self.survey.groups if watched.isdisjoint(group.rows))
