"""Snapshots: named tensors of earlier steps, in memory or on disk, bounded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from memwatch.measure.weights import write_safetensors


class SnapshotStore:
    """Named tensors of earlier steps: the first is pinned, of the others the latest ``keep`` stay.

    Each step has *marks*, texts by name, that tell later what its tensors may be compared with. In a file they are its
    metadata.

    Args:
        folder: where each step becomes ``step_NNNNNNN.safetensors``; ``None`` keeps everything in memory.
        keep: bound of the ring, at least 1.
        in_memory: hold what is on disk in memory as well (small things that are read often).
        writes: whether this process writes (one a machine); the others only read.
    """

    def __init__(self, folder: Path | None, keep: int, *, in_memory: bool = False, writes: bool = True) -> None:
        self.folder, self.keep, self.in_memory, self.writes = folder, keep, in_memory, writes
        self.steps: list[int] = []
        self._protected: set[int] = set()
        self._held: dict[int, dict[str, Tensor]] = {}
        self._marks: dict[int, dict[str, str]] = {}

    def _file(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step_{step:07d}.safetensors"

    def add(self, step: int, tensors: dict[str, Tensor], marks: Mapping[str, str] | None = None) -> None:
        """Keep ``tensors`` as those of ``step``.

        Raises:
            OSError: the disk refused; the tensors are held in memory instead, nothing is lost.
        """
        self.steps = [s for s in self.steps if s < step] + [step]
        self._held[step], self._marks[step] = tensors, dict(marks or {})
        for old in self.steps[1 : -self.keep]:
            self._held.pop(old, None)
            if old not in self._protected:
                self._forget(old)
        self.steps = self.steps[:1] + self.steps[1:][-self.keep :]
        if self.folder is None:
            return
        if self.writes:
            write_safetensors(self._file(step), tensors, self._marks[step])
        if not self.in_memory:
            del self._held[step]

    def protect(self) -> list[int]:
        """The steps that a checkpoint taken now refers to. Their files outlast the ring until the next checkpoint."""
        for old in self._protected - set(self.steps):
            self._forget(old)
        self._protected = set(self.steps)
        return list(self.steps)

    def _forget(self, step: int) -> None:
        if self.folder is not None and self.writes:
            self._file(step).unlink(missing_ok=True)

    def __contains__(self, step: object) -> bool:
        return step in self.steps

    def get(self, step: int) -> dict[str, Tensor]:
        return self._held[step] if step in self._held else load_file(self._file(step))

    def has(self, step: int) -> bool:
        """Whether the tensors can be read: what a full disk refused is in the memory of the writing process alone."""
        return step in self._held or (self.folder is not None and self._file(step).is_file())

    def mark(self, step: int, name: str) -> str | None:
        """The mark of that name, as it was when the tensors were kept; ``None`` where there is none."""
        return self._marks.get(step, {}).get(name)

    def resume(self, steps: list[int]) -> None:
        """Go on with what was kept at these steps; entries whose file is gone or unreadable are forgotten."""
        self._protected = set(steps)
        held, self._held = self._held, {}
        for step in steps:
            if step in held:
                self._held[step] = held[step]
            elif self.folder is not None:
                self._load(step)
        self._marks = {s: marks for s, marks in self._marks.items() if s in steps}
        self.steps = [s for s in steps if s in self._marks]

    def _load(self, step: int) -> None:
        """What lies on disk: the marks and, where they are held in memory, the tensors."""
        self._marks.pop(step, None)
        try:
            marks = read_marks(self._file(step))
            if self.in_memory:
                self._held[step] = self.get(step)
            self._marks[step] = marks
        except (OSError, SafetensorError):
            self._held.pop(step, None)


def read_marks(file: Path) -> dict[str, str]:
    """The marks in a file, without its tensors.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})
