"""Trained on: a control is never among the rows that are trained on, where memwatch can see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from memwatch.measure.probes import Probe, ProbeError
from memwatch.picking.picked import Picked
from memwatch.picking.pictures import decoded
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import matches
from memwatch.picking.text import counted, listed
from memwatch.picking.training_set import RowError, called, content_key

COMPARED = 5_000  # rows of a dataloader that are hashed at most; reading more would delay the first step

RowOf = Callable[[int], int | None]


def refuse_trained_on(given: Sequence[Probe], picked: Picked) -> None:
    """See that no control that was given shows a training row.

    Raises:
        ProbeError: near-duplicates of some are trained on; the message names both.
    """
    shown = [probe for probe in given if probe.image is not None]
    readable = [(probe, picture) for probe in shown if (picture := picture_of(probe)) is not None]
    rows, out = matches([picture for _, picture in readable], picked.survey, picked.rows), set(picked.held_out)
    pairs = [(p.name, row) for (p, _), row in zip(readable, rows, strict=True) if row is not None and row not in out]
    if both := [f"{name} ({picked.rows.name(row)})" for name, row in pairs]:
        what = f"{len(both)} of {counted(len(given), 'control')} given show rows that are trained on"
        raise ProbeError(f"controls: {what}: {listed(both)}; give pictures that are held out from training")


def picture_of(probe: Probe) -> Image.Image | None:
    """The image of a probe as RGB; ``None`` where it has none, or none that can be read: whoever encodes it says so."""
    try:
        return None if probe.image is None else decoded(probe.image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL raises SyntaxError on broken files
        return None


def held_out_rows_in(dataset: Any, picked: Picked) -> tuple[list[str], bool]:
    """The controls that a dataloader's data set gives, by name, and whether memwatch could see all of its rows.

    Args:
        dataset: ``picked.train``, a view of it (a ``Subset``, another format or selection of the same
            ``datasets.Dataset``), an object that holds it as an attribute, or a data set whose raw rows can be read,
            which are compared by the hash of their content. What is in any other cannot be seen.
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
    column = next(iter(picked.rows.columns), None)
    mine, theirs = _places(dataset, column), _places(picked.rows.source, column)
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
    column = next(iter(picked.rows.columns), None)
    try:
        rows = as_training_set(dataset, image_column=column) if is_raw and hasattr(dataset, "__len__") else None
    except ProbeError:
        rows = None
    if rows is None:
        return [], False
    given = set()
    for row in range(min(len(rows), COMPARED)):
        try:
            given.add(content_key(rows.raw(row)))
        except (RowError, OSError, ValueError):
            continue
    return [name for name, key in picked.control_keys.items() if key in given], len(rows) <= COMPARED


def cannot_be_seen(dataset: Any, picked: Picked) -> str:
    """What a person is told where the rows cannot be seen."""
    what = f"memwatch cannot see which rows {called(dataset)} gives"
    number = len(picked.held_out) + len(picked.class_held_out)
    return f"{what}; make sure that it was made from picked.train, so that none of the {number} controls is trained on"
