"""Kept observations: what a scan has measured, under a file name that changes with everything it depends on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
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

FORMAT = 2  # of a kept observation; another one is measured again

Stamp = list[tuple[str, int, int]]


def stamp(source: str) -> Stamp:
    """Names, sizes and times of a local source's weight files; empty for a hub id."""
    path = Path(source)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


class KeptObservations:
    """One file per step and probe.

    Args:
        folder: where they lie.
        config: settings of the scan.
        depends: whatever else every observation depends on, as JSON takes it.
        stamps: of each step's checkpoint.
    """

    def __init__(
        self, folder: Path, config: MemWatchConfig, depends: Sequence[Any], stamps: Mapping[int, Stamp]
    ) -> None:
        self.folder, self.config, self.stamps = folder, config, stamps
        signals = config.signals
        self._depends = [FORMAT, signals.baseline, *depends]

    def _file(self, step: int, p: PreparedProbe, sources: Sequence[tuple[int, str]]) -> Path:
        stamped = [(s, source, self.stamps[s]) for s, source in sources]
        short = digest(self._depends, stamped, p.name, measured_under(self.config, p))[:12]
        return self.folder / f"step_{step:07d}" / f"{p.name}-{short}.safetensors"

    def has(self, step: int, p: PreparedProbe, sources: Sequence[tuple[int, str]]) -> bool:
        return self._file(step, p, sources).is_file()

    def read(self, step: int, p: PreparedProbe, sources: Sequence[tuple[int, str]]) -> Observation | None:
        """The observation of a probe, or ``None`` when it has to be made (anew).

        Args:
            sources: (step, source) of every checkpoint that it may depend on.
        """
        file = self._file(step, p, sources)
        if not file.is_file():
            return None
        try:
            return observation_from_tensors(read_safetensors(file), p.probe)
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("memwatch: %s is measured again: %s", file, error)
            return None

    def thin(self, newest: int) -> None:
        """Delete all but those of the newest steps, as many as that."""
        for folder in sorted(self.folder.glob("step_*"))[:-newest]:
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, step: int, p: PreparedProbe, sources: Sequence[tuple[int, str]], observation: Observation) -> None:
        write_safetensors(self._file(step, p, sources), observation_to_tensors(observation))
