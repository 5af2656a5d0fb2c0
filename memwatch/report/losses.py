"""Losses: the validation losses that the loop logs, kept beside memwatch's own numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memwatch.report.history import LOSSES
from memwatch.report.jsonl import append, read_lines, rewrite
from memwatch.report.report import Report

HELD_OUT = {"val", "valid", "validation", "eval", "evaluation", "test"}  # how loops name what is not trained on
OTHERWISE = {"divergence"}  # of the training loss, as some loops log it beside


class LossSink:
    """Writes ``losses.jsonl``: ``step``, ``key`` and ``value`` of one loss per line.

    Nothing is written before the first report: until then the folder may hold the files of another run.

    Attributes:
        count: how many losses the run has noted so far. A checkpoint keeps it.
    """

    name = "losses"

    def __init__(self, folder: Path) -> None:
        self.file, self.count = folder / LOSSES, 0
        self._unwritten: list[dict[str, Any]] = []
        self._is_ours = False

    def note(self, values: Mapping[str, Any], step: int) -> None:
        """Keep the validation losses among what the loop logs.

        Raises:
            OSError: the disk refused; they are written with those that follow.
        """
        found = {key: as_number(value) for key, value in values.items() if is_validation_loss(key)}
        rows = [{"step": int(step), "key": key, "value": value} for key, value in found.items() if value is not None]
        self._unwritten += rows
        self.count += len(rows)
        self._flush()

    def write(self, report: Report) -> None:
        """The folder is this run's from now on."""
        self._is_ours = True
        self._flush()

    def rewind(self, count: int) -> None:
        """Forget all losses but the first ``count`` of the run: training goes on from an earlier checkpoint."""
        self._is_ours, self._unwritten = True, []
        rows = read_lines(self.file)
        if len(rows) > count:
            rewrite(self.file, rows[:count])
        self.count = min(count, len(rows))

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._is_ours and self._unwritten:
            append(self.file, self._unwritten)
            self._unwritten = []


def is_validation_loss(key: str) -> bool:
    """Whether a logged key names a loss on data that is not trained on.

    >>> [is_validation_loss(key) for key in ("val_loss", "loss/validation/step_average", "train_loss", "latest_loss")]
    [True, True, False, False]
    """
    words = set(re.split(r"[^a-z]+", key.lower()))
    return "loss" in words and bool(words & HELD_OUT) and not words & OTHERWISE


def as_number(value: Any) -> float | None:
    """A number, also of a tensor that holds one; ``None`` for anything else, and where it is not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
