"""Words: numbers and names in sentences for people."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 5  # names in a sentence


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 row``, ``20 rows``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """The first few names: ``a, b, c, d, e and 3 more``."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
