"""Snapshots: named tensors of earlier steps, in memory or on disk, bounded."""

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
        folder: where each step becomes ``step_NNNNNNN.safetensors``; ``None`` keeps everything in memory.
        keep: bound of the ring, at least 1.
        writes: whether this process writes (one a machine); the others only read.
        waits: whether a process that does not write holds its tensors until ``settle`` finds them on disk (small
            things).
        pinned: how many of the first steps stay for good. With 0 the latest are all that there is: they go only once
            newer ones are written, and what a full disk refuses is not kept.
    """

    def __init__(
        self, folder: Path | None, keep: int, *, writes: bool = True, waits: bool = False, pinned: int = 1
    ) -> None:
        self.folder, self.keep, self.writes, self.waits, self.pinned = folder, keep, writes, waits, pinned
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
            OSError: the disk refused; the tensors are held in memory instead, nothing is lost. Where no step is pinned,
                they are not kept, and what was kept before stays.
        """
        earlier = [s for s in self.steps if s < step]
        self.steps = [*earlier, step]
        self._marks[step] = dict(marks or {})
        if self.pinned:
            self._turn()
        try:
            self._keep(step, tensors)
        except OSError:
            self._forget(step)  # what lay there before is of a past that was left
            if not self.pinned:
                self._held.pop(step)
                self.steps = earlier
            raise
        if not self.pinned:
            self._turn()

    def _turn(self) -> None:
        """Turn the ring: forget what is neither pinned nor among the latest, and whose file no checkpoint needs."""
        first, others = self.steps[: self.pinned], self.steps[self.pinned :]
        for old in others[: -self.keep]:
            self._held.pop(old, None)
            if old not in self._protected:
                self._forget(old)
        self.steps = first + others[-self.keep :]

    def _keep(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Hold the tensors, and write them if this process does."""
        self._held[step] = tensors
        if self.folder is None:
            return
        if self.writes:
            write_safetensors(self._file(step), tensors, self._marks[step])
        if self.writes or not self.waits:
            del self._held[step]

    def settle(self) -> None:
        """Let go of what lies on disk by now; for processes that wait. Call it when the writing process is done."""
        if self.folder is not None and not self.writes:
            for step in list(self._held):
                if self._held[step].keys() <= names_in(self._file(step)):
                    del self._held[step]

    def extend(self, step: int, tensors: Mapping[str, Tensor], marks: Mapping[str, str]) -> None:
        """More tensors for a kept step.

        Raises:
            OSError: as for ``add``.
        """
        merged = {**self.get(step), **tensors}
        self._marks[step] = {**self._marks[step], **marks}
        self._keep(step, merged)

    def protect(self) -> list[int]:
        """The steps that a checkpoint taken now refers to. Their files outlast the ring until the next checkpoint."""
        for old in self._protected - set(self.steps):
            self._forget(old)
        self._protected = set(self.steps)
        return list(self.steps)

    def sweep(self) -> None:
        """Delete files that neither this store nor the last checkpoint knows: of a past that a resume has left."""
        if self.folder is None or not self.writes:
            return
        known = {self._file(step) for step in {*self.steps, *self._protected}}
        for file in set(self.folder.glob("step_*.safetensors")) - known:
            with suppress(OSError):
                file.unlink()

    def _forget(self, step: int) -> None:
        if self.folder is not None and self.writes:
            self._file(step).unlink(missing_ok=True)

    def __contains__(self, step: object) -> bool:
        return step in self.steps

    def get(self, step: int) -> dict[str, Tensor]:
        """All tensors of a step."""
        return self._held[step] if step in self._held else read_safetensors(self._file(step))

    def read(self, step: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of these tensors that there are, and no others are read."""
        if step in self._held:
            return {name: self._held[step][name] for name in names if name in self._held[step]}
        with safe_open(self._file(step), framework="pt") as opened:
            there = set(opened.keys())
            return {name: opened.get_tensor(name).clone() for name in names if name in there}

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
        """The marks of what lies on disk."""
        self._marks.pop(step, None)
        with suppress(OSError, SafetensorError):
            self._marks[step] = read_marks(self._file(step))


def read_marks(file: Path) -> dict[str, str]:
    """The marks in a file, without its tensors.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def names_in(file: Path) -> set[str]:
    """The names of the tensors in a file; none where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError):
        return set()
