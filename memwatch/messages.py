"""Messages: numbers and names in sentences, and how they reach people who have not set up logging."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from accelerate.state import PartialState, is_initialized

logger = logging.getLogger("memwatch")

NAMED = 5  # names in a sentence


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 row``, ``20 rows``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """The first few names: ``a, b, c, d, e and 3 more``."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"memwatch: {'warning: ' if record.levelno >= logging.WARNING else ''}{super().format(record)}"


def show_messages() -> None:
    """Show information as well as warnings, on stderr, in a script that has not set up logging.

    A script that has set it up, before or after this, decides itself, and nothing appears twice.
    """
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_Format())
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def warn(text: str) -> None:
    """Warn in the main process alone, of what every process has read."""
    if not is_initialized() or PartialState().is_main_process:
        logger.warning("%s", text)
