"""What a scan has measured, on disk, so that an interrupted scan goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from memwatch.config import MemWatchConfig
from memwatch.measure.measurement import (
    Observation,
    digest,
    measured_under,
    observation_from_tensors,
    observation_to_tensors,
)
from memwatch.measure.prepare import PreparedProbe
from memwatch.measure.weights import read_safetensors, write_safetensors

logger = logging.getLogger("memwatch")

FORMAT = 2  # of a cached observation; another one is measured again


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
            logger.warning("%s cannot be read (%s); the probe is measured again", file, error)
            return None

    def write(self, step: int, p: PreparedProbe, observation: Observation) -> None:
        write_safetensors(self.file(step, p), observation_to_tensors(observation))

    def thin(self, newest: int) -> None:
        """Delete all but the newest steps."""
        for folder in sorted(self.folder.glob("step_*"))[:-newest]:
            shutil.rmtree(folder, ignore_errors=True)
