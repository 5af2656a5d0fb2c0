"""Arrivals: which checkpoint of a trainer's folder comes next, from what one poll after the other has shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memwatch.scan.checkpoint_store import Checkpoint


@dataclass(frozen=True)
class Poll:
    """What one look at the folder means.

    Attributes:
        next: of the checkpoints that are new the one of the smallest step, if its files have not changed since the poll
            before; ``None`` otherwise.
        gone: new ones of the poll before that are no longer there, or were written over with another step.
        late: new ones whose step is not greater than one that was looked at already.
        has_changed: whether the folder is another one than at the poll before.
    """

    next: Checkpoint | None
    gone: tuple[Checkpoint, ...]
    late: tuple[Checkpoint, ...]
    has_changed: bool


class Arrivals:
    """Keeps what earlier polls have shown.

    Attributes:
        last_step: the greatest that was looked at; ``None`` before the first.
    """

    def __init__(self) -> None:
        self._done: set[object] = set()
        self._waiting: list[Checkpoint] = []
        self._found: list[Checkpoint] = []
        self.last_step: int | None = None

    def poll(self, found: Sequence[Checkpoint]) -> Poll:
        """One more look at the folder.

        Args:
            found: every checkpoint that lies there, smallest step first.
        """
        before = self._waiting
        new = [c for c in found if not self._is_done(c)]
        late = [c for c in new if self.last_step is not None and c.step <= self.last_step]
        self._waiting = [c for c in new if c not in late]
        ahead = self._waiting[0] if self._waiting else None
        there = set[object]().union(*map(keys, found))
        gone = tuple(c for c in before if not self._is_done(c) and keys(c).isdisjoint(there))
        has_changed, self._found = list(found) != self._found, list(found)
        for c in (*late, *gone):
            self._done |= keys(c)
        return Poll(ahead if ahead in before else None, gone, tuple(late), has_changed)

    def done(self, checkpoint: Checkpoint) -> None:
        """It was looked at; only greater steps are new from now on."""
        self._done |= keys(checkpoint)
        self.last_step = checkpoint.step if self.last_step is None else max(self.last_step, checkpoint.step)

    def give_up(self, checkpoint: Checkpoint) -> None:
        """It is passed over, until its files change."""
        self._done.add((checkpoint.source, checkpoint.stamp))

    def _is_done(self, checkpoint: Checkpoint) -> bool:
        return not keys(checkpoint).isdisjoint(self._done)


def keys(checkpoint: Checkpoint) -> set[object]:
    """What tells a checkpoint from others: its files, and its step and place.

    A last file without a number moves to another step while the run goes on; a file that a trainer writes over and over
    has another step each time.
    """
    return {(checkpoint.source, checkpoint.stamp), (checkpoint.step, checkpoint.source)}
