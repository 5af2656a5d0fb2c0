"""Pictures, maps and generations of a run take ``BUDGET`` bytes at most, however many events it has.

Those of quiet events go first, then of events with news, then of the newest ones. Of each kind every second event goes,
the oldest at the front; then every second one of those that are left, and so on: what stays is spread over the run. The
order follows from the events alone, so that a run that was resumed keeps the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from memwatch.report.history import Event

BUDGET = 500_000_000  # bytes; the newest event stays whatever it takes
NEWEST = 8  # events
SHOWN = 16  # see ``is_shown``
OF_EVENTS = ("overview", "maps", "heatmaps/*", "images/*", "generations/*")  # where their files lie


@dataclass
class Kept:
    """What is kept of one event: bytes by file; ``rank`` is how many of its kind, news or quiet, were before it."""

    step: int
    is_news: bool
    rank: int
    files: dict[Path, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(self.files.values())


class Retention:
    """The files of a run's events, below ``folder``; ``events`` are those that have files, and the newest."""

    def __init__(self, folder: Path, budget: int = BUDGET) -> None:
        self.folder, self.budget = folder, budget
        self.events: list[Kept] = []
        self._counts = [0, 0]  # quiet events, and those with news

    def begin(self, step: int, is_news: bool) -> Kept:
        """A new event."""
        self.events.append(Kept(step, is_news, self._counts[is_news]))
        self._counts[is_news] += 1
        return self.events[-1]

    def thin(self) -> None:
        """Delete what goes beyond the budget; a file that cannot be deleted is forgotten."""
        kept = [event for event in self.events if event.files]
        total, newest = sum(event.size for event in kept), kept[-NEWEST:]

        def worth(event: Kept) -> tuple[bool, bool, float, int]:  # the run's first event counts as news
            return event in newest, event.is_news or event.rank == 0, worth_of(event.rank), event.rank

        for event in sorted(kept[:-1], key=worth):
            if total > self.budget:
                total -= event.size
                for file in event.files:
                    with suppress(OSError):
                        file.unlink()
                event.files = {}
        self.events = [event for event in self.events if event.files or event is self.events[-1]]

    def rewind(self, step: int, events: Iterable[Event]) -> None:
        """Go on after these events; files of events after ``step`` are deleted."""
        self.events, self._counts = [], [0, 0]
        by_step = {event.step: self.begin(event.step, event.has_news) for event in events}
        for file in (file for place in OF_EVENTS for file in self.folder.glob(f"{place}/step_*")):
            _, _, number = file.stem.partition("_")
            if not number.isdecimal():  # nobody's
                continue
            with suppress(OSError):
                if (kept := by_step.get(int(number))) is not None:
                    kept.files[file] = file.stat().st_size
                elif int(number) > step:
                    file.unlink()


def worth_of(rank: int) -> float:
    """The largest power of two that divides a rank: of many ranks the highest ones are spread over all of them."""
    return (rank & -rank) or float("inf")


def is_shown(rank: int) -> bool:
    """Whether trackers, which keep what they are given, get the pictures of an event.

    They get those of the first ``SHOWN`` events of each kind, of as many again every second one, and half as many
    whenever a run is twice as long.

    >>> [rank for rank in range(64) if is_shown(rank)][14:]
    [14, 15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60]
    """
    return rank < SHOWN * worth_of(rank)
