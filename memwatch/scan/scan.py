"""``memwatch scan``: finished checkpoints through the observer, judge and sinks of training, without its loop.

One model is one event, compared with an earlier model, with its own unconditional branch, or with its base (LoRA off).
A folder of ``checkpoint-N`` folders is a history, as if the callback had been there. Each observation is kept in
``observations/``, under a name that stands for everything it depends on: a scan that was cut off goes on, and one with
other settings measures anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from memwatch.config import MemWatchConfig
from memwatch.denoiser import Components, family_of
from memwatch.faults import Faults
from memwatch.judge.alerts import ProbeState
from memwatch.judge.findings import Finding, judge_event
from memwatch.judge.proof import due, prove
from memwatch.measure.baselines import Baselines, open_stores
from memwatch.measure.measurement import Observation
from memwatch.measure.observer import Observer
from memwatch.measure.prepare import PreparedProbe
from memwatch.ranks import Ranks
from memwatch.report.about import About
from memwatch.report.files import FileSink
from memwatch.report.report import Report
from memwatch.report.sinks import Sinks
from memwatch.scan.checkpoints import CheckpointError, copy_into, load_model, read_weights, text_encoders
from memwatch.scan.earlier import CheckpointWeights, EarlierModel, copy_text_encoders, text_parts
from memwatch.scan.kept import KeptObservations, stamp

logger = logging.getLogger("memwatch")


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step; ``source`` is anything that ``memwatch.scan.checkpoints`` knows."""

    step: int
    source: str


class Scan:
    """Looks at checkpoints one by one.

    Args:
        accelerator: gives device, ranks and trackers; nothing is prepared with it.
        checkpoints: by step, smallest first. Those that cannot be read are named and skipped.
        pretrained: the pipeline that text encoder, VAE and scheduler come from, and the base of a LoRA.
        config, probes, controls: as for ``MemWatch``; ``signals.baseline`` may be ``path:SOURCE`` with any source of
            ``memwatch.scan.checkpoints``.

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
    ) -> None:
        self.accelerator, self.config, self.pretrained = accelerator, config, pretrained
        self.failed: list[tuple[int, str, str]] = []
        folder = Path(config.output_dir)
        if (folder / "history.jsonl").exists() and not (folder / "observations").is_dir():
            raise ValueError(f"{folder} holds a history that no scan wrote; choose another output folder")
        self.checkpoints = list(checkpoints)
        stamps = {c.step: stamp(c.source) for c in checkpoints}
        self.model = self._first_readable().to(accelerator.device)
        self._loaded: int | None = None
        self.ranks = Ranks.of(accelerator)
        given = Components(None, text_encoders=self._own_text_encoders())
        self.observer = Observer(
            self.ranks, self.model, pretrained, given, config=config, probes=probes, controls=controls
        )
        kind, source = config.signals.baseline_parts
        earlier = EarlierModel(source, self.observer, pretrained) if kind == "path" else None
        fixed = earlier.weights if earlier is not None else self.observer.weights_without_lora
        ledger, _ = open_stores(folder, config.snapshots, self.ranks)
        self.baselines = Baselines(config.signals, ledger, CheckpointWeights(self._read), fixed)
        depends = [str(pretrained), None if earlier is None else earlier.stamp]
        self.kept = KeptObservations(folder / "observations", config, depends, stamps)
        self.faults, self.proof_faults = Faults(strict=True), Faults()
        self.sinks = Sinks(FileSink(folder), self.faults)
        self.sinks.files.rewind(-1)  # the history is written anew; what is expensive lies in observations/
        self.about = About.of(self.observer)
        self._states: dict[str, ProbeState] = {}

    def run(self) -> Report | None:
        """All events; the last one's report."""
        report = None
        for checkpoint in list(self.checkpoints):
            try:
                if self.observer.trains_text or not self._has_everything(checkpoint.step):
                    self._load(checkpoint.step)
            except CheckpointError as error:
                self._skip(checkpoint, error)
                self.checkpoints.remove(checkpoint)
                continue
            report = self._event(checkpoint.step)
        self.sinks.close()
        return report

    def _event(self, step: int) -> Report:
        """One checkpoint: the same line as in training, without the stop."""
        started = time.perf_counter()
        observations = self._observe(step)
        self.baselines.remember(step, observations, self.observer.trainable_weights, self.faults)
        judgement = judge_event(observations, self._states, step, self.config)
        if due(judgement.findings, self.config):
            self._load(step)
        findings = prove(judgement.findings, observations, self.observer, self.proof_faults)
        judgement = replace(judgement, findings=findings)
        self._states = dict(judgement.states)
        seconds, calibrated = time.perf_counter() - started, self.observer.has_controls
        report = Report(step, self.config, judgement, calibrated, seconds, self.faults.count, None, about=self.about)
        if self.accelerator.is_main_process:
            report = self.sinks.write(report, self.accelerator.trackers)
            write_deciding(Path(self.config.output_dir) / "decisive" / f"step_{step:07d}", judgement.findings)
        return report

    def _observe(self, step: int) -> list[Observation]:
        """Probe by probe: each is kept as soon as it is measured, and one that fails fails alone."""
        mine, failed = [], []
        hidden = not self.accelerator.is_main_process
        with self.observer.borrowed():
            share = self.ranks.share(self.observer.probes)  # as a trained text encoder understands them now
            for p in tqdm(share, desc=f"memwatch scan, step {step}", unit="probe", disable=hidden):
                try:
                    mine.append(self._kept_or_new(step, p))
                except Exception as error:  # named, counted, and the others go on
                    logger.error("memwatch: probe %s is skipped at step %d: %s", p.name, step, error)
                    failed.append((step, p.name, str(error)))
        self.failed += gather_object(failed) if self.accelerator.num_processes > 1 else failed
        return self.observer.in_order(self.ranks.gather(mine))

    def _kept_or_new(self, step: int, p: PreparedProbe) -> Observation:
        kept = self.kept.read(step, p, self._sources(step))
        if kept is not None:
            return kept
        self._load(step)
        last_clean = {name: state.last_clean for name, state in self._states.items()}
        (observation,) = self.observer.observe([p], self.baselines, last_clean)
        self.kept.write(step, p, self._sources(step), observation)
        return observation

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _first_readable(self) -> torch.nn.Module:
        """The first checkpoint's model; those before it that cannot be read are dropped."""
        while True:
            try:
                return load_model(self.checkpoints[0].source, self.pretrained)
            except CheckpointError as error:
                if len(self.checkpoints) == 1:
                    raise
                self._skip(self.checkpoints.pop(0), error)

    def _own_text_encoders(self) -> tuple[Any, ...]:
        """Text encoders that change between checkpoints, marked as trained so that they are asked at every event."""
        if not any(text_encoders(c.source) and c.source != str(self.pretrained) for c in self.checkpoints):
            return ()
        parts = text_parts(self.pretrained, family_of(self.model), self.accelerator.device)
        for encoder in parts.text_encoders:
            if encoder is not None:
                encoder.requires_grad_(True)
        return parts.text_encoders

    def _has_everything(self, step: int) -> bool:
        return all(self.kept.has(step, p, self._sources(step)) for p in self.observer.probes)

    def _sources(self, step: int) -> list[tuple[int, str]]:
        """What an observation at this step may depend on: its own checkpoint and all earlier ones."""
        return [(c.step, c.source) for c in self.checkpoints if c.step <= step]

    def _read(self, step: int) -> dict[str, torch.Tensor]:
        return read_weights(self._source(step), self.model)

    def _source(self, step: int) -> str:
        return next(c.source for c in self.checkpoints if c.step == step)

    def _load(self, step: int) -> None:
        if self._loaded != step:
            copy_into(self.model, self._read(step))
            copy_text_encoders(self._source(step), self.observer.denoiser, self.observer.text_encoders)
            self.observer.forget_generations()
            self._loaded = step

    def _skip(self, checkpoint: Checkpoint, error: Exception) -> None:
        logger.error("memwatch: checkpoint %d is skipped: %s", checkpoint.step, error)
        self.failed.append((checkpoint.step, checkpoint.source, str(error)))


def write_deciding(folder: Path, findings: Sequence[Finding]) -> None:
    """``PROBE.npy`` for each finding: the deciding map, natural log of a factor, as ``memwatch eval`` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for finding in findings:
        if finding.signals is not None and finding.signals.decisive is not None:
            np.save(folder / f"{finding.name}.npy", finding.signals.decisive.mean.numpy())
