"""The checkpoints of a scan: their weights, in the model and as baselines, and what was measured of each."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from memwatch.config import MemWatchConfig
from memwatch.measure.fingerprint import digest, measured_under
from memwatch.measure.lora_off import lora_off
from memwatch.measure.measurement import Observation, observation_from_tensors, observation_to_tensors
from memwatch.measure.observer import Observer
from memwatch.measure.prepare import PreparedProbe
from memwatch.measure.snapshots import SnapshotStore
from memwatch.measure.weights import (
    read_safetensors,
    with_conditioning,
    without_conditioning,
    write_safetensors,
)
from memwatch.scan.checkpoints import CheckpointError, copy_into, read_weights
from memwatch.scan.text_encoders import copy_text_encoders
from memwatch.scan.trainer_folder import Checkpoint

logger = logging.getLogger("memwatch")

FORMAT = 2  # of a cached observation; another one is measured again


class CheckpointStore:
    """The scanned checkpoints in order of step, of which the observer's model holds one at a time.

    Args:
        observer: its model and its trained text encoders are overwritten.
        base: the pipeline. As a checkpoint it is the model before training: of a LoRA, the LoRA off.
    """

    def __init__(self, observer: Observer, base: str) -> None:
        self.observer, self.base = observer, base
        self._checkpoints: dict[int, Checkpoint] = {}
        self._loaded: int | None = None

    def add(self, checkpoint: Checkpoint) -> None:
        """One more, of a greater step than all others."""
        assert checkpoint.step > max(self._checkpoints, default=-1)
        self._checkpoints[checkpoint.step] = checkpoint

    def remove(self, checkpoint: Checkpoint) -> None:
        """Forget it: its event failed. The model may hold a part of it."""
        del self._checkpoints[checkpoint.step]
        self._loaded = None

    def is_there(self, step: int) -> bool:
        """Whether the weights of that step can still be read."""
        return step in self._checkpoints and self._checkpoints[step].is_there

    def load(self, step: int) -> None:
        """Give the model the weights of that step, and trained text encoders theirs. Raises a ``CheckpointError``."""
        if self._loaded == step:
            return
        self._loaded = None
        copy_into(self.observer.model, self.read(step))
        copy_text_encoders(self._checkpoints[step].source, self.observer.denoiser, self.observer.text_encoders)
        self.observer.forget_generations()
        self._loaded = step

    def read(self, step: int) -> dict[str, Tensor]:
        """The network's weights of that step, by parameter name. Raises a ``CheckpointError``."""
        checkpoint = self._checkpoints[step]
        if checkpoint.source == self.base and (off := lora_off(self.observer.model)):
            return off
        if not checkpoint.is_there:
            raise CheckpointError(f"{checkpoint.source}: was deleted or overwritten after memwatch had found it")
        return read_weights(checkpoint.source, self.observer.model)

    def to_list(self) -> list[list[Any]]:
        """Plain values."""
        return [[c.step, c.source, c.stamp] for c in self._checkpoints.values()]

    def restore(self, saved: Sequence[Sequence[Any]]) -> None:
        """The inverse of ``to_list``."""
        self._checkpoints, self._loaded = {c[0]: Checkpoint(*c) for c in saved}, None


class CheckpointWeights(SnapshotStore):
    """Baseline weights that are read from the checkpoints; only what a trained text encoder encoded is written."""

    def __init__(self, store: CheckpointStore, folder: Path, *, writes: bool) -> None:
        super().__init__(folder, keep=1_000_000, writes=writes)
        self._store = store

    def add(self, step: int, tensors: dict[str, Tensor], marks: Mapping[str, str] | None = None) -> None:
        super().add(step, with_conditioning({}, without_conditioning(tensors)[1]), marks)

    def get(self, step: int) -> dict[str, Tensor]:
        return self._store.read(step) | super().get(step)

    def has(self, step: int) -> bool:
        return super().has(step) and self._store.is_there(step)


class ObservationCache:
    """What was measured: one file per step and probe, under a name that changes with everything it depends on.

    Args:
        folder: of the files.
        config: settings of the scan.
        depends: what every observation depends on besides, as JSON takes it.
        history: gives the checkpoints so far, which an observation may depend on; likewise.
    """

    def __init__(
        self, folder: Path, config: MemWatchConfig, depends: Sequence[Any], history: Callable[[], list[Any]]
    ) -> None:
        self.folder, self.config, self._history = folder, config, history
        self._depends = [FORMAT, config.signals.baseline, *depends]

    def file(self, step: int, p: PreparedProbe) -> Path:
        """Where the observation of a probe is, or will be."""
        short = digest(self._depends, self._history(), p.name, measured_under(self.config, p))[:12]
        return self.folder / f"step_{step:07d}" / f"{p.name}-{short}.safetensors"

    def read(self, step: int, p: PreparedProbe) -> Observation | None:
        """The observation of a probe, or ``None`` when it has to be measured (again)."""
        file = self.file(step, p)
        try:
            return observation_from_tensors(read_safetensors(file), p.probe) if file.is_file() else None
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("memwatch: %s cannot be read (%s); the probe is measured again", file, error)
            return None

    def write(self, step: int, p: PreparedProbe, observation: Observation) -> None:
        write_safetensors(self.file(step, p), observation_to_tensors(observation))

    def thin(self, newest: int) -> None:
        """Delete all but the newest steps."""
        for folder in sorted(self.folder.glob("step_*"))[:-newest]:
            shutil.rmtree(folder, ignore_errors=True)
