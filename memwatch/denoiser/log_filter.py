"""Log filter: what other libraries say while memwatch loads from them is said once per process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

LIBRARIES = ("diffusers", "transformers")

_said: set[tuple[str, str]] = set()  # sender and text


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, loading shows no progress bars, and every log message and warning only once per process.

    Errors are always shown, and so are the progress bars of downloads. Everything is given back as it was found.
    """
    show, once = warnings.showwarning, Once()

    def show_new(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if is_new(category.__name__, str(message)):
            show(message, category, *where, **more)

    with ExitStack() as back:
        for name in LIBRARIES:  # transformers' own function would switch off the bars of downloads as well
            swap(back, import_module(f"{name}.utils.logging"), "_tqdm_active", False)
        swap(back, warnings, "showwarning", show_new)
        for handler in {h for name in (None, *LIBRARIES) for h in logging.getLogger(name).handlers}:
            handler.addFilter(once)  # a logger's own filter does not see the messages of its children
            back.callback(handler.removeFilter, once)
        yield


class Once(logging.Filter):
    """Passes each message of these libraries once; a record goes through several handlers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: logging.LogRecord | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR or record.name.partition(".")[0] not in LIBRARIES:
            return True
        if record is not self._passed and not is_new(record.name, record.getMessage()):
            return False
        self._passed = record
        return True


def is_new(sender: str, text: str) -> bool:
    """Whether this is said for the first time."""
    known = len(_said)
    _said.add((sender, text))
    return len(_said) > known


def swap(back: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute, where there is one, until ``back`` ends."""
    if hasattr(owner, name):
        back.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
