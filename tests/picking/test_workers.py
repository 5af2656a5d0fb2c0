"""Worker processes: values in order, none started in vain, none left behind."""

from __future__ import annotations

import sys

import pytest

from memwatch.picking import workers
from memwatch.picking.workers import Worker, WorkerError, in_workers


@pytest.fixture
def started(monkeypatch):
    """All workers that a test starts."""
    every = []

    class Counted(Worker):
        def __init__(self, function):
            super().__init__(function)
            every.append(self)

    monkeypatch.setattr(workers, "Worker", Counted)
    yield every
    assert all(worker._process.poll() is not None for worker in every)


def test_values_come_in_the_order_of_their_tasks(started):
    assert list(in_workers("builtins:abs", range(-9, 9), 2)) == [abs(i) for i in range(-9, 9)]
    assert len(started) <= 2


def test_without_a_task_no_process_is_started(started):
    assert list(in_workers("builtins:abs", [], 2)) == []
    assert started == []


def test_the_user_s_script_is_not_run_again(started, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/nowhere/train.py", raising=False)
    assert list(in_workers("builtins:abs", [-1], 1)) == [1]


def test_what_is_printed_is_no_value(started, capfd):
    assert list(in_workers("builtins:print", ["hello", "again"], 1)) == [None, None]
    assert capfd.readouterr().err.split() == ["hello", "again"]


def test_a_function_that_fails_ends_its_worker(started, capfd):
    with pytest.raises(WorkerError, match="worker process is gone"):
        list(in_workers("builtins:abs", ["not a number"], 1))
    assert "TypeError" in capfd.readouterr().err


def test_whoever_stops_early_leaves_none_behind(started):
    values = in_workers("builtins:abs", range(100), 1)
    assert next(values) == 0
    values.close()
