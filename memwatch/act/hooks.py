"""Hooks: the user's own functions, called with every alert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memwatch.act.alert import Alert
from memwatch.config import require
from memwatch.report.report import Report


class HookSink:
    """Calls a function once per alert of a report, on the main process.

    Args:
        hook: takes an ``Alert``. It runs in the training loop: slow work belongs in a thread of its own.
        name: of the sink, for messages.
    """

    def __init__(self, hook: Callable[[Alert], object], name: str = "on_alert") -> None:
        self.hook, self.name = hook, name

    def write(self, report: Report) -> None:
        """Call the hook with every alert, also with those after one at which it failed.

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
    """One sink per function. Each has its own name, so that one that fails does not switch off another.

    Args:
        on_alert: a function that takes an ``Alert``, a list or tuple of them, or ``None``.

    Raises:
        ConfigError: anything else.
    """
    hooks = [] if on_alert is None else on_alert if isinstance(on_alert, list | tuple) else [on_alert]
    for hook in hooks:
        require(callable(hook), "on_alert", hook, "a function that takes an Alert, a list of them, or None")
    return [HookSink(hook, f"on_alert[{i}]" if len(hooks) > 1 else "on_alert") for i, hook in enumerate(hooks)]
