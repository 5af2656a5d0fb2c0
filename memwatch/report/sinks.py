"""Sinks: where reports go. A sink is ``write(report)`` and ``close()``; a failing one is switched off by the callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from memwatch.report import Report


class Sink(Protocol):
    name: str

    def write(self, report: Report) -> None: ...

    def close(self) -> None: ...


def tracker_sinks(trackers: Sequence[Any]) -> list[Sink]:
    """One sink for every accelerate tracker: TensorBoard and W&B by their own adapters, any other by its scalars."""
    from memwatch.trackers.scalars import ScalarSink
    from memwatch.trackers.tensorboard import TensorBoardSink
    from memwatch.trackers.wandb import WandbSink

    known: dict[str, Callable[[Any], Sink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}
    return [known.get(tracker.name, ScalarSink)(tracker) for tracker in trackers if tracker.name != "memwatch"]
