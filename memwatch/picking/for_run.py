"""For a run: what was picked and what was given besides, as probes, controls and peers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memwatch.config import MemWatchConfig, require
from memwatch.measure.probes import Probe, as_probes
from memwatch.picking.folder import read_folder
from memwatch.picking.picked import Picked
from memwatch.picking.trained_on import refuse_trained_on
from memwatch.picking.training_set import content_key


@dataclass(frozen=True)
class ForRun:
    """What a run looks at.

    Attributes:
        picked: what was picked from the training set; ``None`` where nothing was.
        control_keys: by the name of every control with an image what that hashes to, see ``content_key``.
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
