"""For a run: its probes, controls and peers, picked or given; and that no control is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memwatch.config import MemWatchConfig, require
from memwatch.measure.probes import Probe, ProbeError, as_probes
from memwatch.picking.duplicates import MAX_BITS, MAX_DIFFERENCE, bits_apart, difference
from memwatch.picking.folder import read_folder
from memwatch.picking.hashes import hashes_of
from memwatch.picking.picked import Picked, picture_of
from memwatch.picking.rows import RowError, as_training_set
from memwatch.picking.text import counted, listed
from memwatch.picking.training_set import called, content_key

CANDIDATES = 64  # training rows that are read at most to tell whether one shows a given picture
COMPARED = 5_000  # rows of a dataloader that are hashed at most; reading more would delay the first step

RowOf = Callable[[int], int | None]


@dataclass(frozen=True)
class ForRun:
    """What a run looks at.

    Attributes:
        picked: what was picked from the training set; ``None`` where nothing was.
        control_keys: by the name of every control with an image its hash, see ``content_key``.
    """

    picked: Picked | None
    probes: list[Probe]
    controls: list[Probe]
    peers: list[Probe]
    control_keys: dict[str, str] = field(default_factory=dict)


def for_run(
    picked: Any, config: MemWatchConfig, probes: Any, controls: Any, peers: Any, *, has_rotation: bool
) -> ForRun:
    """What is picked and what is given, together; arguments go before the configuration's.

    Args:
        picked: what ``memwatch.pick`` returned, a folder that ``memwatch pick`` has written, or ``None``.
        has_rotation: whether rows can be screened a few per event.

    Raises:
        ConfigError: ``picked`` is something else.
        ProbeError: a source is unusable, or a given control shows a row that is trained on.
    """
    source = picked if picked is not None else config.picked
    allowed = "what memwatch.pick(dataset) returns, or a folder that 'memwatch pick' has written"
    require(source is None or isinstance(source, Picked | str | Path), "picked", type(source), allowed)
    found = read_folder(Path(source)) if isinstance(source, str | Path) else source
    watched, held_out, ordinary = (
        as_probes(mine if mine is not None else theirs, key, seed=config.seed)
        for key, mine, theirs in (
            ("probes", probes, config.probes),
            ("controls", controls, config.controls),
            ("peers", peers, config.peers),
        )
    )
    keys: dict[str, str] = {}
    for probe in held_out:
        with suppress(OSError, ValueError):  # whoever reads the image says so
            keys |= {probe.name: content_key(probe.image)} if probe.image is not None else {}
    if found is None:
        return ForRun(None, watched, held_out, ordinary, keys)
    refuse_trained_on(held_out, found)
    rotation = found.rotation_probes(config.rotation.rows) if has_rotation and config.rotation.per_event else []
    return ForRun(
        found,
        [*found.probes(), *watched, *rotation],
        [*found.controls(), *held_out],
        [*found.peer_probes(), *ordinary],
        found.control_keys | keys,
    )


# --- controls that are given -----------------------------------------------------------------------------------------


def refuse_trained_on(given: Sequence[Probe], picked: Picked) -> None:
    """See that no control that was given shows a training row.

    Raises:
        ProbeError: near-duplicates of some are trained on; the message names both.
    """
    pictures = [(probe.name, picture) for probe in given if (picture := picture_of(probe)) is not None]
    found = [(name, row_shown(picture, picked)) for name, picture in pictures]
    both = [
        f"{name} ({picked.rows.name(row)})" for name, row in found if row is not None and row not in picked.held_out
    ]
    if both:
        what = f"{len(both)} of {counted(len(given), 'control')} given show rows that are trained on"
        raise ProbeError(f"controls: {what}: {listed(both)}; give pictures that are held out from training")


def row_shown(picture: Image.Image, picked: Picked) -> int | None:
    """A training row that a picture is a near-duplicate of; ``None`` for none.

    Rows with a near hash are read, the nearest first, ``CANDIDATES`` at most.
    """
    given, bits = hashes_of([picture]), picked.survey.bits
    apart = np.stack([bits_apart(given.whole[0], bits), bits_apart(given.mirrored[0], bits)], axis=1)
    near = [row for row in np.flatnonzero(apart.min(1) <= MAX_BITS).tolist() if row not in picked.survey.unreadable]
    for row in sorted(near, key=lambda row: int(apart[row].min()))[:CANDIDATES]:
        try:
            known = hashes_of([picked.rows.image(row)]).thumbnails
        except RowError:  # it has gone since the survey
            continue
        for is_mirrored, mine in enumerate((given.thumbnails, given.thumbnails[:, :, ::-1])):
            if apart[row, is_mirrored] <= MAX_BITS and difference(mine, known)[0] <= MAX_DIFFERENCE:
                return int(row)
    return None


# --- the dataloader --------------------------------------------------------------------------------------------------


def held_out_rows_in(dataset: Any, picked: Picked) -> tuple[list[str], bool]:
    """The controls that a dataloader's data set gives, by name, and whether memwatch could see all of its rows.

    Args:
        dataset: ``picked.train``, a view of it (a ``Subset``, another format or selection of the same
            ``datasets.Dataset``), an object that holds it as an attribute, or a data set whose raw rows can be read,
            which are compared by the hash of their content. Rows of any other cannot be seen.
    """
    row_of = _rows_by_identity(dataset, picked)
    if row_of is not None:
        given = {row_of(index) for index in range(len(dataset))}
        return [picked.rows.name(row) for row in picked.held_out if row in given], True
    if any(value is picked.train for value in getattr(dataset, "__dict__", {}).values()):
        return [], True
    return _found_by_hash(dataset, picked)


def _rows_by_identity(dataset: Any, picked: Picked) -> RowOf | None:
    """The row of the training set that an index of ``dataset`` stands for; ``None`` where that cannot be seen."""
    if dataset is picked.train:
        return picked.train_rows.__getitem__
    if dataset is picked.rows.source:
        return lambda index: index
    indices, inner = getattr(dataset, "indices", None), getattr(dataset, "dataset", None)
    if indices is not None and inner is not None:
        outer = _rows_by_identity(inner, picked)
        return None if outer is None else lambda index: outer(int(indices[index]))
    mine, theirs = (_places(rows, picked.rows.image_column) for rows in (dataset, picked.rows.source))
    if not mine or not theirs or not {buffers for buffers, _ in mine} <= {buffers for buffers, _ in theirs}:
        return None
    by_place = {place: row for row, place in enumerate(theirs)}
    return lambda index: by_place.get(mine[index])


def _places(dataset: Any, column: str | None) -> list[tuple[tuple[int, ...], int]] | None:
    """Where each row of a ``datasets.Dataset`` lies: addresses of buffers, and its number in them; ``None`` for others.

    Selections, shuffles and formats have tables of their own, over the buffers of what they were made from.
    """
    table = getattr(getattr(dataset, "data", None), "table", None)
    if table is None or not hasattr(dataset, "_indices") or column not in table.column_names:
        return None
    places = [
        (tuple(buffer.address for buffer in chunk.buffers() if buffer is not None), row)
        for chunk in table.column(column).chunks
        for row in range(chunk.offset, chunk.offset + len(chunk))
    ]
    indices = dataset._indices
    return places if indices is None else [places[row] for row in indices.column(0).to_pylist()]


def _found_by_hash(dataset: Any, picked: Picked) -> tuple[list[str], bool]:
    """Names of the controls whose content is among the raw rows of a data set, and whether all were compared."""
    is_raw = isinstance(dataset, list | tuple) or hasattr(dataset, "select_columns")
    if not is_raw or not hasattr(dataset, "__len__"):
        return [], False
    try:
        rows = as_training_set(dataset, image_column=picked.rows.image_column)
    except ProbeError:
        return [], False
    given = set()
    for row in range(min(len(rows), COMPARED)):
        with suppress(RowError, OSError, ValueError):
            given.add(content_key(rows.raw(row)))
    return [name for name, key in picked.control_keys.items() if key in given], len(rows) <= COMPARED


def cannot_be_seen(dataset: Any, picked: Picked) -> str:
    """What a person is told where the rows cannot be seen."""
    what = f"memwatch cannot see which rows {called(dataset)} gives"
    number = len(picked.held_out) + len(picked.class_held_out)
    return f"{what}; make sure that it was made from picked.train, so that none of the {number} controls is trained on"
