"""Snapshots: named tensors of earlier steps, on disk and bounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from memwatch.measure.weights import read_safetensors, write_safetensors


class SnapshotStore:
    """Named tensors of earlier steps: the first ``pinned`` stay, and of the others the latest ``keep``.

    Each step has *marks*, texts by name, that tell later what its tensors may be compared with. In a file they are its
    metadata.

    Args:
        folder: where each step becomes ``step_NNNNNNN.safetensors``.
        keep: how many steps stay beside those that are pinned, at least 1.
        writes: whether this process writes (one per machine); the others only read.
        pinned: how many of the first steps stay for good. With 0 the latest are all that there is: they go only once
            newer ones are written, and what a full disk refuses is not kept.
    """

    def __init__(self, folder: Path, keep: int, *, writes: bool = True, pinned: int = 1) -> None:
        self.folder, self.keep, self.writes, self.pinned = folder, keep, writes, pinned
        self.steps: list[int] = []
        self._protected: set[int] = set()
        self._unwritten: dict[int, dict[str, Tensor]] = {}  # what the disk refused
        self._marks: dict[int, dict[str, str]] = {}

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.safetensors"

    def add(self, step: int, tensors: dict[str, Tensor], marks: Mapping[str, str] | None = None) -> None:
        """Keep ``tensors`` as those of ``step``.

        Raises:
            OSError: the disk refused; the tensors are held in memory instead, nothing is lost. Where no step is pinned,
                they are not kept, and what was kept before stays.
        """
        earlier = [s for s in self.steps if s < step]
        self.steps = [*earlier, step]
        self._marks[step] = dict(marks or {})
        if self.pinned:
            self._drop_oldest()
        try:
            self._write(step, tensors)
        except OSError:
            self._delete(step)  # what lay there before is of a past that was left
            if not self.pinned:
                self._unwritten.pop(step)
                self.steps = earlier
            raise
        if not self.pinned:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Forget what is neither pinned nor among the latest; a file that a checkpoint needs stays."""
        first, others = self.steps[: self.pinned], self.steps[self.pinned :]
        for old in others[: -self.keep]:
            self._unwritten.pop(old, None)
            if old not in self._protected:
                self._delete(old)
        self.steps = first + others[-self.keep :]

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        self._unwritten.pop(step, None)
        if self.writes:
            self._unwritten[step] = tensors
            write_safetensors(self._file(step), tensors, self._marks[step])
            del self._unwritten[step]

    def extend(self, step: int, tensors: Mapping[str, Tensor], marks: Mapping[str, str]) -> None:
        """More tensors for a kept step.

        Raises:
            OSError: as for ``add``.
        """
        self._marks[step] = {**self._marks[step], **marks}
        if self.writes:
            self._write(step, {**self.get(step), **tensors})

    def protect(self) -> list[int]:
        """The steps that a checkpoint taken now refers to. Their files stay at least until the next checkpoint."""
        for old in self._protected - set(self.steps):
            self._delete(old)
        self._protected = set(self.steps)
        return list(self.steps)

    def sweep(self) -> None:
        """Delete files that neither this store nor the last checkpoint knows: of a past that a resume has left."""
        if self.writes:
            known = {self._file(step) for step in {*self.steps, *self._protected}}
            for file in set(self.folder.glob("step_*.safetensors")) - known:
                with suppress(OSError):
                    file.unlink()

    def _delete(self, step: int) -> None:
        if self.writes:
            self._file(step).unlink(missing_ok=True)

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
