"""The guard after a stop: a loop over epochs ends quietly, and one that can never end is told how to."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

from memwatch.guard import MANY, TOO_MANY, GuardedLoader, rows_per_device

FIX = "write 'while global_step < max_steps and not watch.should_stop:'"


def test_a_loop_over_epochs_ends_quietly(caplog):
    loader = GuardedLoader([1, 2, 3], lambda: None, lambda: True)
    with caplog.at_level(logging.INFO, "memwatch"):
        for _ in range(10_000):
            assert list(loader) == []
    assert caplog.messages == []


def test_a_loop_over_steps_is_told_once_and_then_ended(caplog):
    """``while step < 10: for batch in loader`` went round for ever."""
    assert (MANY, TOO_MANY) == (10_000, 100_000)
    steps, passes = [], []
    loader = GuardedLoader([1, 2, 3], lambda: passes.append(True), lambda: len(passes) > 1)

    def train():
        while len(steps) < 10:
            steps.extend(loader)

    with caplog.at_level(logging.WARNING, "memwatch"), pytest.raises(RuntimeError) as caught:
        train()
    assert steps == [1, 2, 3]
    assert len(passes) == 1 + TOO_MANY
    (said,) = caplog.messages
    assert said == str(caught.value)
    assert said == f"memwatch has stopped training, but the loop goes on without batches; {FIX}"


def test_passes_without_a_stop_are_not_counted(caplog):
    loader = GuardedLoader([], lambda: None, lambda: False)
    with caplog.at_level(logging.WARNING, "memwatch"):
        for _ in range(TOO_MANY + 1):
            assert list(loader) == []
    assert caplog.messages == []


def test_rows_per_device():
    rows = list(range(8))
    assert rows_per_device(DataLoader(rows, batch_size=3), 1) == 3
    assert rows_per_device(DataLoader(rows, batch_size=None), 1) is None
    assert rows_per_device(iter(rows), 1) is None
    assert rows_per_device(SimpleNamespace(total_batch_size=8), 4) == 2  # accelerate's, over all processes
    assert rows_per_device(SimpleNamespace(total_batch_size=2), 4) == 1
