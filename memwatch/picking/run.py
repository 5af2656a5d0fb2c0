"""Run: the choice of a training run, made once by the main process and the same on every rank."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from memwatch.config import MemWatchConfig, require
from memwatch.measure.probes import Probe, ProbeError, as_probes
from memwatch.picking.choice import Choice, choose
from memwatch.picking.rows import TrainingSet, as_training_set
from memwatch.ranks import Ranks

logger = logging.getLogger("memwatch")

BUDGET = 16  # probes


def choice_for(
    ranks: Ranks, config: MemWatchConfig, dataset: Any, probes: Any, controls: Any, peers: Any
) -> Choice | None:
    """What is picked from the training set of a run; ``None`` where there is none to pick from.

    Args:
        dataset: as for ``MemWatch``. Without it, and without probes, the prepared dataloader's own is taken.
        probes, controls, peers: those that are given.

    Raises:
        ProbeError: on every rank, when the training set cannot be used.
    """
    source = dataset if dataset is not None else config.dataset
    budget = config.probes if isinstance(config.probes, int) else BUDGET
    picks = probes is None and (config.probes is None or isinstance(config.probes, int))
    if implied := source is None and picks:
        source = prepared_dataset(ranks.accelerator)
    allowed = "prompts or images, because there is no dataset to pick from"
    require(source is not None or not isinstance(config.probes, int), "probes", config.probes, allowed)
    if source is None or isinstance(source, Choice):
        return source
    try:
        return _agreed(ranks, source, config, budget if picks else 0, controls, peers)
    except ProbeError as error:
        if not implied:
            raise
        if ranks.accelerator.is_main_process:
            what = "memwatch cannot pick from the prepared dataloader's data set"
            logger.warning("%s: %s; pass dataset=, or probes=", what, error)
        return None


def _agreed(ranks: Ranks, source: Any, config: MemWatchConfig, budget: int, controls: Any, peers: Any) -> Choice:
    """The main process chooses, and all ranks have the same choice, or raise the same error."""
    rows = as_training_set(source, image_column=config.pick.image_column, caption_column=config.pick.caption_column)
    made, error = None, None
    if ranks.accelerator.is_main_process:
        try:
            made = chosen(rows, config, budget, controls, peers)
        except ProbeError as caught:
            error = caught
    if (failed := ranks.agree(None if error is None else str(error))) is not None:
        raise ProbeError(failed) from error
    sent: Any = None if made is None else replace(made, rows=None)  # type: ignore[arg-type]  # each has its own
    return replace(ranks.broadcast(sent), rows=rows)  # type: ignore[no-any-return]


def chosen(rows: TrainingSet, config: MemWatchConfig, budget: int, controls: Any, peers: Any) -> Choice:
    """The choice, with what a person must know of it said."""
    given = {"controls": controls if controls is not None else config.controls}
    given |= {"peers": peers if peers is not None else config.peers}
    found = choose(rows, config.pick, probes=budget, seed=config.seed, **given)
    for note in found.notes:
        logger.warning("memwatch: %s", note)
    return found


def prepared_dataset(accelerator: Any) -> Any:
    """The data set of the one dataloader that accelerate has prepared; ``None`` where there are several or none."""
    loaders = list(getattr(accelerator, "_dataloaders", ()))
    return getattr(loaders[0], "dataset", None) if len(loaders) == 1 else None


def sources(
    choice: Choice, config: MemWatchConfig, probes: Any, controls: Any, peers: Any, *, turns: bool
) -> tuple[list[Probe], list[Probe] | None, list[Probe] | None]:
    """Probes, controls and peers of a run: those that are given, and the picked ones for the others.

    Args:
        turns: whether rows can take turns.
    """
    given = probes if probes is not None else None if isinstance(config.probes, int) else config.probes
    watched = choice.probes() if given is None else as_probes(given, seed=config.seed)
    watched = watched + (choice.turn_probes() if turns and config.pick.places else [])
    return watched, choice.controls() or None, choice.peer_probes() or None
