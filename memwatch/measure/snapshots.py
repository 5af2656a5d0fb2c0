"""Snapshots: named tensors of earlier steps, on disk and bounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from memwatch.measure.weights import read_safetensors, write_safetensors
from memwatch.run_folder import stem_of


class SnapshotStore:
    """Named tensors of earlier steps: the first one stays, and of the others the latest ``keep``, at least 1.

    Each step is a file in ``folder``. Its *marks*, texts by name in the metadata, tell later what its tensors may be
    compared with. One process per machine ``writes``; the others only read.
    """

    def __init__(self, folder: Path, keep: int, *, writes: bool = True) -> None:
        self.folder, self.keep, self.writes = folder, keep, writes
        self.steps: list[int] = []
        self._protected: set[int] = set()
        self._unwritten: dict[int, dict[str, Tensor]] = {}  # what the disk refused
        self._marks: dict[int, dict[str, str]] = {}

    def _file(self, step: int) -> Path:
        return self.folder / f"{stem_of(step)}.safetensors"

    def add(self, step: int, tensors: dict[str, Tensor], marks: Mapping[str, str] | None = None) -> None:
        """Keep ``tensors`` as those of ``step``. Where the disk refuses (``OSError``) they are held in memory."""
        self.steps = [*(s for s in self.steps if s < step), step]
        self._marks[step] = dict(marks or {})
        for old in self.steps[1 : -self.keep]:
            self._unwritten.pop(old, None)
            if old not in self._protected:
                self._delete(old)
        self.steps = [*self.steps[:1], *self.steps[1:][-self.keep :]]
        try:
            self._write(step, tensors)
        except OSError:
            self._delete(step)  # what lay there before is of a past that was left
            raise

    def extend(self, step: int, tensors: Mapping[str, Tensor], marks: Mapping[str, str]) -> None:
        """Add what was measured of that step only now; an ``OSError`` as for ``add``."""
        self._marks[step] = {**self._marks[step], **marks}
        if self.writes:
            self._write(step, {**self.get(step), **tensors})

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        if not self.writes:
            return
        self._unwritten[step] = tensors
        write_safetensors(self._file(step), tensors, self._marks[step])
        del self._unwritten[step]

    def _delete(self, step: int) -> None:
        if self.writes:
            self._file(step).unlink(missing_ok=True)

    def protect(self) -> list[int]:
        """The steps that a checkpoint taken now refers to. Their files stay at least until the next checkpoint."""
        for old in self._protected - set(self.steps):
            self._delete(old)
        self._protected = set(self.steps)
        return list(self.steps)

    def get(self, step: int) -> dict[str, Tensor]:
        """All tensors of a step."""
        return self._unwritten[step] if step in self._unwritten else read_safetensors(self._file(step))

    def read(self, step: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of these tensors that there are, and no others are read."""
        if step in self._unwritten:
            return {name: self._unwritten[step][name] for name in names if name in self._unwritten[step]}
        with safe_open(self._file(step), framework="pt") as opened:
            there = set(opened.keys())
            return {name: opened.get_tensor(name).clone() for name in names if name in there}

    def has(self, step: int) -> bool:
        """Whether the tensors can be read: what a full disk refused is in the memory of the writing process alone."""
        return step in self._unwritten or self._file(step).is_file()

    def mark(self, step: int, name: str) -> str | None:
        """The mark of that name, as it was when the tensors were kept; ``None`` where there is none."""
        return self._marks.get(step, {}).get(name)

    def resume(self, steps: list[int]) -> None:
        """Go on with what was kept at these steps; entries whose file is gone or unreadable are forgotten."""
        self._protected = set(steps)
        self._unwritten = {step: tensors for step, tensors in self._unwritten.items() if step in steps}
        self._marks = {step: self._marks[step] for step in self._unwritten}
        for step in steps:
            if step not in self._unwritten:
                with suppress(OSError, SafetensorError), safe_open(self._file(step), framework="pt") as opened:
                    self._marks[step] = dict(opened.metadata() or {})
        self.steps = [step for step in steps if step in self._marks]
