"""``memwatch scan``: finished checkpoints through the observer, judge and sinks of training, without its loop.

One model is one event; several are a history, as if the callback had been there. Each observation is cached in
``observations/``: a scan that was interrupted goes on, and one with other settings measures anew. The cache takes about
7 MB per probe and checkpoint at 512 px; ``follow`` keeps the newest events only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from memwatch.act.flagged import FlaggedSink
from memwatch.config import MemWatchConfig
from memwatch.denoiser import Components
from memwatch.event import conduct
from memwatch.faults import Faults
from memwatch.judge.findings import Judgement
from memwatch.measure.baselines import Baselines, open_stores
from memwatch.measure.measurement import Observation
from memwatch.measure.observer import Observer
from memwatch.ranks import Ranks
from memwatch.report.about import About
from memwatch.report.files import FileSink
from memwatch.report.report import Report
from memwatch.report.sinks import Sink, Sinks
from memwatch.resume import Progress, warn_of_baselines
from memwatch.run_folder import stem_of
from memwatch.scan.checkpoint_store import (
    CheckpointStore,
    CheckpointWeights,
    ObservationCache,
    earlier_model,
    own_text_encoders,
)
from memwatch.scan.checkpoints import load_model
from memwatch.scan.trainer_folder import Checkpoint, stamp
from memwatch.scan.weight_files import CheckpointError

logger = logging.getLogger("memwatch")

OBSERVATIONS = "observations"


class DecidingSink:
    """Writes the deciding map of each finding as an array ``(h, w)``, natural log of a factor."""

    name = "decisive"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, report: Report) -> None:
        folder = self.folder / stem_of(report.step)
        folder.mkdir(parents=True, exist_ok=True)
        for finding in report.findings:
            if finding.signals is not None and finding.signals.decisive is not None:
                np.save(folder / f"{finding.name}.npy", finding.signals.decisive.mean.numpy())

    def close(self) -> None:
        """Nothing is kept open."""


class Scan:
    """Scans checkpoints one by one.

    Args:
        accelerator: gives device, ranks and trackers.
        checkpoints: by step, smallest first. Those that cannot be read are named and skipped.
        pretrained: the pipeline that text encoder, VAE and scheduler come from, and the base of a LoRA. As a checkpoint
            of its own it is the base: its network, or the LoRA's with the LoRA off.
        config, probes, controls: as for ``MemWatch``; ``signals.baseline`` may be ``path:SOURCE`` with any source of
            ``memwatch.scan.checkpoints``.
        more: sinks beside the files, the trackers and the console.

    Attributes:
        failed: (step, probe or source, why) of everything skipped; the same on every rank.

    Raises:
        CheckpointError: no checkpoint can be read, or the baseline is of another family or size.
        ValueError: the output folder holds a history that no scan wrote.
    """

    def __init__(
        self,
        accelerator: Any,
        checkpoints: Sequence[Checkpoint],
        pretrained: Any,
        *,
        config: MemWatchConfig,
        probes: Any,
        controls: Any = None,
        more: Sequence[Sink] = (),
    ) -> None:
        self.accelerator, self.config, self.pretrained = accelerator, config, pretrained
        self.failed: list[tuple[int, str, str]] = []
        self.planned: int | None = None
        self.progress, folder = Progress(""), Path(config.output_dir)
        if (folder / "history.jsonl").exists() and not (folder / OBSERVATIONS).is_dir():
            raise ValueError(f"{folder} holds a history that no scan wrote; choose another output folder")
        self.checkpoints = list(checkpoints)
        model = self._first_readable().to(accelerator.device)
        self.ranks = Ranks.of(accelerator)
        encoders = own_text_encoders([c.source for c in self.checkpoints], pretrained, model)
        given = Components(None, text_encoders=encoders)
        watched = {"probes": probes, "controls": controls}
        self.observer = Observer(self.ranks, model, pretrained, given, config=config, **watched)
        kind, source = config.signals.baseline_parts
        fixed: Callable[[], Mapping[str, Tensor]] = self.observer.weights_without_lora
        if kind == "path":
            fixed = earlier_model(source, self.observer, pretrained)
        self.store = CheckpointStore(self.observer, str(pretrained))
        ledger, _ = open_stores(folder, self.ranks)
        weights = CheckpointWeights(self.store, folder / OBSERVATIONS / "weights", writes=self.ranks.writes_weights)
        self.baselines = Baselines(config.signals, ledger, weights, fixed)
        reading = self.observer.denoiser.schedule.prediction_type
        depends = [str(pretrained), stamp(source) if kind == "path" else None, reading]
        self.cache = ObservationCache(folder / OBSERVATIONS, config, depends, self.store.to_list)
        self.faults = Faults()  # a proof that fails costs the proof alone; a sink ends a strict scan
        sinks_faults = Faults(strict=True) if config.strict else self.faults
        self.sinks = Sinks(FileSink(folder), sinks_faults, [DecidingSink(folder / "decisive"), *more])
        self._flagged = next((sink for sink in more if isinstance(sink, FlaggedSink)), None)
        self.about = About.of(self.observer)

    def run(self) -> Report | None:
        """All events; the last one's report."""
        report, self.planned = None, len(self.checkpoints)
        self.begin()
        for checkpoint in self.checkpoints:
            try:
                report = self.look(checkpoint)
            except CheckpointError as error:
                self._skip(checkpoint, error)
        self.close()
        return report

    def begin(self) -> None:
        """Write the history anew; what was measured is cached."""
        self._rewind(-1, [])

    def look(self, checkpoint: Checkpoint) -> Report:
        """One event. Checkpoints come in order of step. After an error the scan is as it was before."""
        failed, before = len(self.failed), replace(self.progress)
        self.store.add(checkpoint)
        try:
            return conduct(self, checkpoint.step)
        except BaseException:
            self.progress = before
            self.store.remove(checkpoint)
            del self.failed[failed:]
            raise

    def close(self) -> None:
        """Close the sinks, and write the report page."""
        self.sinks.close()

    def _skip(self, checkpoint: Checkpoint, error: Exception) -> None:
        logger.error("checkpoint %d is skipped: %s", checkpoint.step, error)
        self.failed.append((checkpoint.step, checkpoint.source, str(error)))

    def _first_readable(self) -> torch.nn.Module:
        """The first checkpoint's model; those before it that cannot be read are dropped."""
        while True:
            try:
                return load_model(self.checkpoints[0].source, self.pretrained)
            except CheckpointError as error:
                if len(self.checkpoints) == 1:
                    raise
                self._skip(self.checkpoints.pop(0), error)

    # --- one event, see ``event.Watched`` ----------------------------------------------------------------------------

    def act(self, step: int, judgement: Judgement) -> None:
        """Nothing follows in finished models."""

    def observe(self, step: int, *, full: bool) -> tuple[list[Observation], None]:
        """Every probe with curvature. Each observation is cached as soon as it is made; a probe that fails fails alone.

        It is a ``CheckpointError`` if any rank cannot read the checkpoint, it predicts something else, or all fail.
        """
        error, mine, failed = None, [], []
        last_clean = {name: state.last_clean for name, state in self.progress.states.items()}
        try:
            self.store.load(step)
        except CheckpointError as caught:
            error = str(caught)
        if (error := self.ranks.agree(error)) is not None:
            raise CheckpointError(error)
        hidden = not self.accelerator.is_main_process
        with self.observer.borrowed():
            share = self.ranks.share(self.observer.probes)  # as a trained text encoder encodes them now
            for p in tqdm(share, desc=f"memwatch scan, step {step}", unit="probe", disable=hidden):
                try:
                    if (observation := self.cache.read(step, p)) is None:
                        (observation,) = self.observer.observe([p], self.baselines, last_clean)
                        self.cache.write(step, p, observation)
                    mine.append(observation)
                except Exception as why:  # named, counted, and the others go on
                    logger.error("probe %s is skipped at step %d: %s", p.name, step, why)
                    failed.append((step, p.name, str(why)))
        failed = gather_object(failed) if self.accelerator.num_processes > 1 else failed
        self.failed += failed
        observations = self.observer.in_order(self.ranks.gather(mine))
        if not observations:
            raise CheckpointError(f"no probe could be measured; {failed[0][1]}: {failed[0][2]}")
        if misread := self.ranks.broadcast(self.observer.misread(observations)):
            raise CheckpointError(misread)
        return observations, None

    def state_dict(self) -> dict[str, Any]:
        """Plain values; measurements are in ``output_dir``."""
        flagged = None if self._flagged is None else self._flagged.to_list()
        own = {"checkpoints": self.store.to_list(), "flagged": flagged}
        return self.progress.to_dict() | self.baselines.state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, on every rank; what was written after it is forgotten."""
        self.progress = Progress.from_dict(state)
        self.store.restore(state["checkpoints"])
        complete = self.baselines.load_state_dict(state)
        self._rewind(-1 if self.progress.last_step is None else self.progress.last_step, state.get("flagged"))
        if self.accelerator.is_main_process:
            probes = [p.probe for p in self.observer.probes]
            warn_of_baselines(self.baselines, probes, complete, self.config.output_dir)

    def _rewind(self, step: int, flagged: list[dict[str, Any]] | None) -> None:
        """Forget what was written of later steps."""
        if self.accelerator.is_main_process:
            self.sinks.files.rewind(step)
            if self._flagged is not None:
                self._flagged.restore(flagged)
