"""Hooks: the user's own functions, told of every alert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from memwatch.act.alert import Alert
from memwatch.config import require
from memwatch.report.report import Report

Hook = Callable[[Alert], object]


class HookSink:
    """Calls a function once per alert of a report, on the main process. What it returns is not looked at.

    Args:
        hook: takes an ``Alert``. It runs in the training loop: what takes long belongs in a thread of its own.

    Attributes:
        name: says the function, for messages.
    """

    def __init__(self, hook: Hook) -> None:
        self.hook, self.name = hook, f"on_alert {_name_of(hook)}"

    def write(self, report: Report) -> None:
        """Tell the hook of every alert, also of those after one at which it failed.

        Raises:
            Exception: the first that the hook raised.
        """
        errors: list[Exception] = []
        for finding in report.alerts:
            try:
                self.hook(Alert.of(report, finding))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Nothing is kept open."""


def as_hooks(on_alert: Any) -> list[HookSink]:
    """One sink per function, each with a name of its own, so that one that fails does not switch off another.

    Args:
        on_alert: a function of one ``Alert``, a list or tuple of them, or ``None``.

    Raises:
        ConfigError: anything else.
    """
    given = [] if on_alert is None else list(on_alert) if isinstance(on_alert, list | tuple) else [on_alert]
    allowed = "a function that takes an Alert, a list of them, or None"
    for hook in given:
        require(callable(hook), "on_alert", hook, allowed)
        require(not isinstance(hook, type), "on_alert", hook, f"{allowed}; this is a class, pass an instance")
    sinks, seen = [HookSink(hook) for hook in given], Counter[str]()
    for sink in sinks:
        seen[sink.name] += 1
        if seen[sink.name] > 1:
            sink.name += f" ({seen[sink.name]})"
    return sinks


def _name_of(hook: Any) -> str:
    """``notify``; ``Notifier`` of an object that can be called."""
    if isinstance(hook, partial):
        return _name_of(hook.func)
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
