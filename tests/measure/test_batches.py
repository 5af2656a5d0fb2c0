"""Batches: the size that fits is found once, nothing of a failed batch is left, and a last resort comes last."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import pytest
import torch

import memwatch.measure.measure
from memwatch.measure.measure import Batches

FULL = torch.OutOfMemoryError("CUDA out of memory")


class Work:
    """Twice every row; memory runs out above ``limit`` rows. ``calls`` are the batches that it was asked for."""

    def __init__(self, limit: int) -> None:
        self.limit, self.calls = limit, []

    def __call__(self, rows):
        self.calls.append(len(rows))
        if len(rows) > self.limit:
            raise FULL
        return [2 * row for row in rows]


def test_the_size_that_fits_is_found_once():
    batches, work = Batches(8), Work(limit=3)
    assert batches.run(range(10), work) == [2 * row for row in range(10)]
    assert work.calls == [8, 4, 2, 2, 2, 2, 2]
    work.calls.clear()
    assert batches.run(range(10), work) == [2 * row for row in range(10)]
    assert work.calls == [2] * 5
    assert batches.size == 2
    work.limit = 8  # it never grows again: rounding would change once more
    work.calls.clear()
    batches.run(range(10), work)
    assert work.calls == [2] * 5


def test_a_remainder_does_not_shrink_the_batch():
    batches, work = Batches(4), Work(limit=4)
    batches.run(range(6), work)
    batches.run(range(3), work)
    assert (batches.size, work.calls) == (4, [4, 2, 3])


def test_what_the_failed_batch_computed_is_gone_before_the_cache_is_emptied(monkeypatch):
    graphs, alive = [], []

    def empty_cache():
        alive.append([graph() is not None for graph in graphs])

    def work(rows):
        x = torch.ones(len(rows), requires_grad=True)
        y = x * 2  # holds the graph, as the network's frames do
        graphs.append(weakref.ref(y))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return y.tolist()

    monkeypatch.setattr(memwatch.measure.measure.torch.cuda, "empty_cache", empty_cache)
    assert Batches(4).run(range(4), work) == [2.0] * 4
    assert alive == [[False], [False, False]]


def test_a_single_row_is_tried_again_sparingly_and_all_after_it():
    inside, seen = [], []

    @contextmanager
    def sparing():
        inside.append(True)
        try:
            yield
        finally:
            inside.pop()

    def work(rows):
        seen.append((len(rows), bool(inside)))
        if not inside:
            raise FULL
        return rows

    batches = Batches(2, sparing)
    for _ in range(2):
        assert batches.run([7, 8], work) == [7, 8]
    assert seen == [(2, False), (1, False), (1, True), (1, True), (1, True), (1, True)]
    assert not inside


@pytest.mark.parametrize("sparing", [None, torch.no_grad], ids=["no last resort", "last resort"])
def test_what_never_fits_is_raised(sparing):
    work = Work(limit=0)
    with pytest.raises(torch.OutOfMemoryError):
        Batches(2, sparing).run(range(3), work)
    assert work.calls == ([2, 1] if sparing is None else [2, 1, 1])
    assert torch.is_grad_enabled()


def test_other_errors_are_raised_at_once():
    def work(rows):
        raise RuntimeError("broken")

    batches = Batches(4)
    with pytest.raises(RuntimeError, match="broken"):
        batches.run(range(4), work)
    assert batches.size == 4


@pytest.mark.parametrize(("rows", "size", "spares"), [(99, 8, False), (3, 3, False), (1, 1, False), (0, 1, True)])
def test_a_limit(rows, size, spares):
    batches = Batches(8)
    batches.limit(rows)
    assert (batches.size, batches.spares) == (size, spares)
