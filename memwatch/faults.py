"""Faults: a monitor never kills a run. A failing part is counted, reported once and tried again.

Three failures in a row switch a part off. A part that writes to a disk or a server is then tried now and then instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("memwatch")

LIMIT = 3  # failures in a row
REST = 10  # events between two tries of a part that rests


class StrictError(RuntimeError):
    """A failure that was counted, and is raised because of ``strict``."""


class PartError(Exception):
    """This event has no result: a part failed, which is counted and reported, or nothing can be judged yet."""


class Faults:
    """Counts the failures of memwatch's parts, which are named as messages name them.

    Args:
        strict: raise every failure as a ``StrictError``.

    Attributes:
        count: failures so far.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict, self.count = strict, 0
        self._in_a_row: dict[str, int] = {}
        self._asked: dict[str, int] = {}  # by part that rests, events since it was tried

    def failed(
        self, part: str, what: str, error: BaseException | None, instead: str | None = None, *, rests: bool = False
    ) -> None:
        """Count a failure, and report the first and the ``LIMIT``-th in a row.

        Args:
            what: the error, for people.
            instead: what memwatch does now. Default: the part is tried again at the next event, until ``LIMIT``
                failures in a row switch it off or let it rest. Callers ask ``is_off`` or ``is_resting``.
            rests: whether the part rests instead of being switched off.

        Raises:
            StrictError: when ``strict``.
        """
        self.count += 1
        self._in_a_row[part] = in_a_row = self._in_a_row.get(part, 0) + 1
        self._asked[part] = 0
        if self.strict:
            raise StrictError(f"memwatch: {part} failed: {what}") from error
        if instead is None:
            then = f"tried at every {REST}th event from now on" if rests else "switched off"
            again = "memwatch will try again at the next event"
            instead = again if in_a_row < LIMIT else f"that was {LIMIT} times in a row, so it is {then}"
        if in_a_row in (1, LIMIT):
            logger.warning("%s failed (%s); %s. Training goes on.", part, what, instead)

    def is_off(self, part: str) -> bool:
        """Whether a part has failed ``LIMIT`` times in a row."""
        return self._in_a_row.get(part, 0) >= LIMIT

    def is_resting(self, part: str) -> bool:
        """Whether to leave a resting part alone now; ask once per event. After a resume it is tried at once."""
        self._asked[part] = asked = self._asked.get(part, REST - 1) + 1
        return self.is_off(part) and asked % REST != 0

    def worked(self, part: str, missing: str | None = None) -> None:
        """A part did its work, which ends its failures in a row.

        Args:
            missing: what a part that rested has lost of the events in between, for people.
        """
        in_a_row = self._in_a_row.pop(part, 0)
        if in_a_row >= LIMIT and missing is not None:
            logger.warning("%s works again, after %d failures in a row; %s.", part, in_a_row, missing)

    @contextmanager
    def surviving(self, part: str, instead: str | None = None, *, missing: str | None = None) -> Iterator[None]:
        """What the block raises is counted as a failure of ``part`` and goes no further; see ``failed``, ``worked``.

        Args:
            missing: makes it a part that rests.
        """
        try:
            yield
        except StrictError:
            raise  # counted where it was raised
        except Exception as error:
            self.failed(part, repr(error), error, instead, rests=missing is not None)
        else:
            self.worked(part, missing)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"count": self.count, "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from ``state``; what was switched off stays off."""
        self.count, self._in_a_row = int(state["count"]), dict(state["in_a_row"])
