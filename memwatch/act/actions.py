"""Actions: what follows from what an event has found. Hooks, the rows behind it, and the weights of before it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memwatch.act.flagged import Flagged, FlaggedSink
from memwatch.act.hooks import as_hooks
from memwatch.act.last_clean import LastClean, is_clean, is_memorized
from memwatch.act.webhook import WebhookSink
from memwatch.config import MemWatchConfig
from memwatch.faults import Faults
from memwatch.guard import Place, rows_per_device
from memwatch.judge.alerts import Verdict
from memwatch.judge.findings import Judgement
from memwatch.left_out import LeftOut, leave_out
from memwatch.measure.observer import Observer
from memwatch.picking.choice import Choice
from memwatch.report.sinks import Sink

logger = logging.getLogger("memwatch")


class Actions:
    """What memwatch does about its findings. Lives on every rank; ``follow`` and ``end`` are called on all of them.

    Args:
        config, observer, faults: the watch's.
        choice: what was picked from the training set; ``None`` where there is no training set.
        on_alert: see ``MemWatch``.

    Attributes:
        left_out: rows of the training set that the guarded dataloader does not give.
        sinks: told of every report, on the main process.
        place: how far the guarded dataloader has come on this rank.
    """

    def __init__(
        self, config: MemWatchConfig, observer: Observer, faults: Faults, choice: Choice | None, on_alert: Any
    ) -> None:
        self.config, self.choice, self.ranks = config, choice, observer.ranks
        folder = Path(config.output_dir)
        self.left_out = LeftOut(() if choice is None else choice.held_out)
        self._flagged = FlaggedSink(folder, choice, self.rows_seen)
        self.sinks: list[Sink] = [*as_hooks(on_alert), self._flagged]
        if config.alerts.webhook is not None and self.ranks.accelerator.is_main_process:
            self.sinks.append(WebhookSink(config.alerts.webhook, config.output_dir))
        self._last_clean = LastClean(observer, folder, faults) if config.rollback else None
        self.place = Place()
        self._rows_per_batch: int | None = None
        self._leaves_out = False

    # --- the dataloader ----------------------------------------------------------------------------------------------

    def guard(self, loader: Any) -> None:
        """This is a dataloader of the loop; it leaves out what is held out, where it can."""
        accelerator = self.ranks.accelerator
        rows = rows_per_device(loader, accelerator.num_processes)
        self._rows_per_batch = None if rows is None else rows * accelerator.num_processes
        if self.choice is None:
            return
        source = self.choice.rows
        first, self._leaves_out = self._leaves_out, leave_out(loader, self.left_out, source.source, source.row_of)
        if accelerator.is_main_process and not self._leaves_out:
            warn_of_loader(self.choice, self.config)
        elif accelerator.is_main_process and not first and self.left_out.held_out:
            held, total = len(self.left_out.held_out), len(source)
            logger.info("memwatch: the guarded dataloader leaves out %d of %d rows, the controls", held, total)

    def rows_seen(self) -> int | None:
        """How many rows training has seen so far, over all ranks; ``None`` where that is not known."""
        if self._rows_per_batch is None or not self.place.batches:
            return None
        return self.place.batches * self._rows_per_batch

    @property
    def drops(self) -> bool:
        """Whether rows behind what is memorized are dropped, and training goes on without them."""
        return self.config.on_memorized == "drop" and self._leaves_out

    # --- what follows ------------------------------------------------------------------------------------------------

    def follow(self, step: int, judgement: Judgement) -> None:
        """Keep weights that are clean, and drop rows behind what is memorized where the configuration says so."""
        if self._last_clean is not None:
            found = judgement.findings
            self._last_clean.note(step, is_clean(judgement.states, found), final=is_memorized(found))
        if not self.drops or self.choice is None:
            return
        position = self.ranks.largest(self.left_out.position)  # workers may have read ahead on one rank only
        for finding in judgement.findings:
            if finding.verdict is Verdict.MEMORIZED:
                new = self.left_out.drop(self._flagged.rows_behind(finding), position)
                if new and self.ranks.accelerator.is_main_process:
                    left = len(self.choice.rows) - len(self.left_out.held_out) - len(self.left_out.since)
                    said = "memwatch, step %d: %s is memorized; the %d rows behind it are dropped, %d are left"
                    logger.warning(said, step, finding.name, len(new), left)

    def flagged(self) -> list[Flagged]:
        """The rows behind every alert so far, worst first."""
        return self._flagged.flagged

    def end(self) -> None:
        """The run ends: write the weights of before the first alert, if there was one."""
        if self._last_clean is not None:
            self._last_clean.write()

    # --- resume ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        state = self.left_out.state_dict(at_end=self.place.is_at_end) | {"place": self.place.state_dict()}
        if self.choice is not None:
            state["training_set"] = {"digest": _digest(self.choice), "held_out": sorted(self.left_out.held_out)}
        return state if self._last_clean is None else state | {"last_clean": self._last_clean.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], step: int | None) -> None:
        """Go on from ``state``, where ``{}`` is afresh; what was flagged after ``step`` is forgotten."""
        self.left_out.load_state_dict(state)
        self.place.load_state_dict(state.get("place", {}))
        if step is None:
            self._flagged.forget()
        elif self.ranks.accelerator.is_main_process:
            self._flagged.rewind(step)
        if self._last_clean is not None:
            self._last_clean.load_state_dict(state.get("last_clean", {}))
        before = state.get("training_set")
        if before is not None and self.choice is not None and before["digest"] != _digest(self.choice):
            self._meet_other_set(before["held_out"])

    def _meet_other_set(self, held_out: list[int]) -> None:
        """The training set is not that of the checkpoint, so that its row numbers mean other rows."""
        self.left_out.since.clear()
        if self.ranks.accelerator.is_main_process:
            what = "the training set is not the one of the checkpoint; what memwatch picked from it may differ"
            then = "dropped rows are trained on again, and controls may have been trained on before"
            logger.warning("memwatch: %s: %s (%d rows were held out then)", what, then, len(held_out))


def warn_of_loader(choice: Choice, config: MemWatchConfig) -> None:
    """Say what follows where the guarded dataloader cannot leave rows out."""
    why = (
        "the guarded dataloader's data set is not the dataset that memwatch picked from, or no sampler chooses its rows"
    )
    if choice.held_out:
        fix = "train on Subset(dataset, watch.training_indices), or hold out a folder with 'memwatch pick'"
        what = f"{len(choice.held_out)} controls may be trained on, and alerts are then rarer than they should be"
        logger.warning("memwatch: %s; %s: %s", why, what, fix)
    if config.on_memorized == "drop":
        logger.warning("memwatch: %s; nothing can be dropped, and the rule of stop applies instead", why)


def _digest(choice: Choice) -> str:
    """Changes with the pictures of a training set, and with which captions are shared or rare."""
    found = choice.survey
    digest = hashlib.sha256(repr((found.size, sorted(found.unreadable), found.captions, found.rare_captions)).encode())
    digest.update(found.bits.tobytes())
    return digest.hexdigest()
