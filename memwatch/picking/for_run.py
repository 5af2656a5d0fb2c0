"""For a run: its probes and controls, picked or given; and that no control is trained on."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Subset

from memwatch.config import MemWatchConfig, require
from memwatch.measure.captions import ProbeError
from memwatch.measure.images import read_image
from memwatch.measure.probes import Probe, as_probes
from memwatch.messages import counted, listed
from memwatch.picking.duplicates import MAX_BITS, bits_apart, duplicate_groups
from memwatch.picking.folder import read_folder
from memwatch.picking.hashes import hash_of, hash_rows
from memwatch.picking.picked import Picked
from memwatch.picking.rows import as_training_set
from memwatch.picking.training_set import RowError, called, content_key

CANDIDATES = 64  # training rows that are read at most to tell whether one shows a given picture
COMPARED = 5_000  # rows of a dataloader that are hashed at most; reading more would delay the first step


@dataclass(frozen=True)
class ForRun:
    """What a run looks at; ``control_keys`` has by the name of every control with an image its ``content_key``."""

    picked: Picked | None
    probes: list[Probe]
    controls: list[Probe]
    control_keys: dict[str, str]


def for_run(picked: Any, config: MemWatchConfig, probes: Any, controls: Any, *, has_rotation: bool) -> ForRun:
    """What is picked and what is given, together; arguments go before the configuration's.

    Args:
        picked: what ``memwatch.pick`` returned, a folder that ``memwatch pick`` has written, or ``None``.
        has_rotation: whether rows can be screened a few per event.

    A ``ConfigError`` where ``picked`` is something else, a ``ProbeError`` where a given control is trained on.
    """
    source = picked if picked is not None else config.picked
    allowed = "what memwatch.pick(dataset) returns, or a folder that 'memwatch pick' has written"
    require(source is None or isinstance(source, Picked | str | Path), "picked", type(source), allowed)
    found = read_folder(Path(source)) if isinstance(source, str | Path) else source
    given = {"probes": probes, "controls": controls}
    sources = {key: getattr(config, key) if value is None else value for key, value in given.items()}
    watched, held_out = (as_probes(source, key, seed=config.seed) for key, source in sources.items())
    keys: dict[str, str] = {}
    for probe in held_out:
        with suppress(OSError, ValueError):  # there is none, or whoever reads it says so
            keys[probe.name] = content_key(probe.image)
    if found is None:
        return ForRun(None, watched, held_out, keys)
    refuse_trained_on(held_out, found)
    rotation = found.rotation_probes(config.rotation.rows) if has_rotation and config.rotation.per_event else []
    probes, controls = [*found.probes(), *watched, *rotation], [*found.controls(), *held_out]
    return ForRun(found, probes, controls, found.control_keys | keys)


def refuse_trained_on(given: Sequence[Probe], picked: Picked) -> None:
    """Raise a ``ProbeError`` that names both, where controls that were given show rows that are trained on."""
    both = []
    for probe in given:
        with suppress(ProbeError):  # it has no image, or none that can be read: whoever encodes it says so
            row = row_shown(read_image(probe), picked)
            if row is not None and row not in picked.held_out:
                both.append(f"{probe.name} ({picked.rows.name(row)})")
    if both:
        what = f"{len(both)} of {counted(len(given), 'control')} given show rows that are trained on"
        raise ProbeError(f"controls: {what}: {listed(both)}; give pictures that are held out from training")


def row_shown(picture: Image.Image, picked: Picked) -> int | None:
    """A training row that a picture is a near-duplicate of; ``None`` for none. Those of near hashes are read."""
    given, survey = hash_of(picture), picked.survey
    apart = np.minimum(*(bits_apart(bits, survey.bits) for bits in given[:2]))
    near = [row for row in np.argsort(apart, kind="stable").tolist() if apart[row] <= MAX_BITS]
    for row in [int(row) for row in near if row not in survey.unreadable][:CANDIDATES]:
        with suppress(RowError):  # it has gone since the survey
            if duplicate_groups(hash_rows(as_training_set([picked.rows.image(row), picture]))):
                return row
    return None


def held_out_rows_in(dataset: Any, picked: Picked) -> tuple[list[str], bool]:
    """The controls that a dataloader's data set gives, by name, and whether memwatch could see all of its rows.

    Rows of ``picked.train``, of the training set and of views of them are known by their places, those of an object
    that holds ``picked.train`` as an attribute are taken to be its own; raw rows of another list or
    ``datasets.Dataset`` are known by the hash of their content. Rows of anything else cannot be seen.
    """
    rows, column, given = picked.rows, picked.rows.image_column, _places(dataset, picked.rows.image_column)
    known = {place: row for row, place in enumerate(_places(rows.source, column) or [])}
    known |= dict(zip(_places(picked.train, column) or [], picked.train_rows, strict=False))
    if given is not None and {where for where, _ in given} <= {where for where, _ in known}:
        shown = {known.get(place) for place in given}
        return [rows.name(row) for row in picked.held_out if row in shown], True
    if any(value is picked.train for value in getattr(dataset, "__dict__", {}).values()):
        return [], True
    if not isinstance(dataset, list | tuple) and not hasattr(dataset, "select_columns"):
        return [], False
    try:
        raw = as_training_set(dataset, image_column=column)
    except ProbeError:
        return [], False
    keys = set()
    for row in range(min(len(raw), COMPARED)):
        with suppress(RowError, OSError, ValueError):
            keys.add(content_key(raw.raw(row)))
    return [name for name, key in picked.control_keys.items() if key in keys], len(raw) <= COMPARED


def _places(dataset: Any, column: str | None) -> list[tuple[Any, int]] | None:
    """Where each row lies: in which object or memory, and its number there; ``None`` where that is not known.

    Selections, shuffles and formats of a ``datasets.Dataset`` have tables of their own, over the buffers of what they
    were made from.
    """
    if isinstance(dataset, Subset):
        places = _places(dataset.dataset, column)
        return None if places is None else [places[int(i)] for i in dataset.indices]
    table = getattr(getattr(dataset, "data", None), "table", None)
    if table is not None and hasattr(dataset, "_indices") and column in table.column_names:
        places = [
            (tuple(buffer.address for buffer in chunk.buffers() if buffer is not None), row)
            for chunk in table.column(column).chunks
            for row in range(chunk.offset, chunk.offset + len(chunk))
        ]
        return places if dataset._indices is None else [places[row] for row in dataset._indices.column(0).to_pylist()]
    if isinstance(dataset, list | tuple):
        return [(id(row), 0) for row in dataset]  # a list made of some rows holds the very same
    return [(id(dataset), i) for i in range(len(dataset))] if isinstance(dataset, Sized) else None


def cannot_be_seen(dataset: Any, picked: Picked) -> str:
    """What a person is told where the rows cannot be seen."""
    what = f"memwatch cannot see which rows {called(dataset)} gives"
    number = len(picked.held_out) + len(picked.class_held_out)
    return f"{what}; make sure that it was made from picked.train, so that none of the {number} controls is trained on"
