"""Actions: what follows from the findings of an event: hooks, flagged rows, and weights to roll back to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memwatch.act.alerts import WebhookSink, as_hooks
from memwatch.act.flagged import Flagged, FlaggedSink
from memwatch.act.last_clean import LastClean, is_clean
from memwatch.config import ConfigError, MemWatchConfig
from memwatch.faults import Faults
from memwatch.guard import rows_per_device
from memwatch.judge.findings import Judgement
from memwatch.judge.verdict import Verdict
from memwatch.measure.observer import Observer
from memwatch.messages import counted, listed
from memwatch.picking.for_run import cannot_be_seen, held_out_rows_in
from memwatch.picking.picked import Picked
from memwatch.report.sinks import Sink

logger = logging.getLogger("memwatch")


class Actions:
    """What memwatch does about its findings. Lives on every rank; ``follow`` and ``end`` are called on all of them.

    Args:
        config, observer, faults: the watch's.
        picked: what was picked from the training set; ``None`` where nothing was.
        controls: by name what every control's image hashes to.
        on_alert: see ``MemWatch``.

    Attributes:
        sinks: told of every report, on the main process.
        batches: how many the guarded dataloaders have given so far, on this rank.
    """

    def __init__(
        self,
        config: MemWatchConfig,
        observer: Observer,
        faults: Faults,
        picked: Picked | None,
        controls: Mapping[str, str],
        on_alert: Any,
    ) -> None:
        self.picked, self.controls, self.ranks = picked, controls, observer.ranks
        folder = Path(config.output_dir)
        self._flagged = FlaggedSink(folder, picked, self.rows_seen)
        self.sinks: list[Sink] = [*as_hooks(on_alert), self._flagged]
        if config.alerts.webhook is not None and self.ranks.accelerator.is_main_process:
            self.sinks.append(WebhookSink(config.alerts.webhook, config.output_dir))
        in_shards = config.rollback and self.ranks.lockstep
        if in_shards and self.ranks.accelerator.is_main_process:
            why = "holds the model in shards; to go back, use accelerate's checkpoints from before the alert"
            logger.warning("rollback is off, because %s %s", self.ranks.sharding, why)
        self._last_clean = LastClean(observer, folder, faults) if config.rollback and not in_shards else None
        self.batches = 0
        self._rows_per_batch: int | None = None

    def guard(self, dataloader: Any) -> None:
        """Check a dataloader of the loop, and note its batch size. Nothing in it is changed.

        Raises:
            ConfigError: on every rank, when it gives rows that are held out.
        """
        accelerator, picked = self.ranks.accelerator, self.picked
        rows = rows_per_device(dataloader, accelerator.num_processes)
        self._rows_per_batch = None if rows is None else rows * accelerator.num_processes
        if picked is None or not (picked.held_out or picked.class_held_out):
            return
        dataset = getattr(dataloader, "dataset", None)
        given, has_seen_all = held_out_rows_in(dataset, picked)
        if given:
            what = f"{counted(len(given), 'row')} that are held out as controls ({listed(given)})"
            raise ConfigError(f"dataloader: it gives {what}; make it from picked.train")
        if not has_seen_all and accelerator.is_main_process:
            logger.warning("%s", cannot_be_seen(dataset, picked))

    def on_batch(self) -> None:
        """A guarded dataloader gives a batch."""
        self.batches += 1

    def rows_seen(self) -> int | None:
        """How many rows training has seen so far, over all ranks; ``None`` where that is not known."""
        return self.batches * self._rows_per_batch if self._rows_per_batch and self.batches else None

    def follow(self, step: int, judgement: Judgement) -> None:
        """Keep the weights of an event that is clean."""
        if self._last_clean is not None:
            found = judgement.findings
            memorized = any(finding.verdict is Verdict.MEMORIZED for finding in found)
            self._last_clean.note(step, is_clean(judgement.states, found), final=memorized)

    def flagged(self) -> list[Flagged]:
        """The rows behind every alert so far, worst first."""
        return self._flagged.flagged

    def end(self) -> None:
        """The run ends: say where the weights to roll back to are, if there is a reason."""
        if self._last_clean is not None:
            self._last_clean.end()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        state = {"batches": self.batches, "controls": dict(self.controls), "flagged": self._flagged.to_list()}
        return state if self._last_clean is None else state | {"last_clean": self._last_clean.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, where ``{}`` is afresh; what was flagged after it is forgotten."""
        self.batches = int(state.get("batches", 0))
        if self.ranks.accelerator.is_main_process:
            self._flagged.restore(state.get("flagged"))
        if self._last_clean is not None:
            self._last_clean.load_state_dict(state.get("last_clean", {}))


def refuse_other_controls(now: Mapping[str, str], then: Mapping[str, str] | None) -> None:
    """Refuse to resume a run that did not hold out every control, since it may have trained on it.

    Args:
        now, then: by name what every control's image hashes to; ``None`` where the checkpoint does not say.

    Raises:
        ConfigError: some were not held out.
    """
    new = [] if then is None else [name for name, key in now.items() if key not in then.values()]
    if new:
        which = f"{len(new)} of {counted(len(now), 'control')} ({listed(new)})"
        why = "were not held out by the run that is resumed, so that it may have trained on them"
        how = "pick from the same rows, with the same seed and numbers, as that run did"
        raise ConfigError(f"controls: {which} {why}; {how}")
