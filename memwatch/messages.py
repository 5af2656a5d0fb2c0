"""Messages: how what memwatch says reaches people who have not set up logging."""

from __future__ import annotations

import logging

logger = logging.getLogger("memwatch")


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
