"""Rows that the guarded dataloader leaves out: held out from the start, or dropped while training runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from support.processes import new_process
from torch.utils.data import DataLoader, IterableDataset, Subset

from memwatch.guard import GuardedLoader, Place
from memwatch.left_out import LeavingOut, LeftOut, holder_of_sampler, is_same, leave_out, rows_by_index

ROWS = list(range(12))


def batches(loader):
    return [batch.tolist() for batch in loader]


def shuffled(seed: int = 0, size: int = 2, rows=ROWS, **options) -> DataLoader:
    return DataLoader(rows, size, shuffle=True, generator=torch.Generator().manual_seed(seed), **options)


def test_rows_that_are_held_out_never_come_and_the_others_keep_their_order():
    plain = [row for batch in batches(shuffled()) for row in batch]
    loader = shuffled()
    assert leave_out(loader, LeftOut([3, 7]), ROWS)
    found = batches(loader)
    assert [row for batch in found for row in batch] == [row for row in plain if row not in (3, 7)]
    assert len(loader) == len(found) == 5


def test_dropped_rows_are_gone_from_that_position_on_and_from_all_later_passes():
    left_out, loader, first, dropped = LeftOut(), shuffled(size=1), [], []
    leave_out(loader, left_out, ROWS)
    for batch in loader:
        first.append(batch.item())
        if len(first) == 4:
            dropped = left_out.drop([first[1], 0, 1, 2, 3], left_out.position)
    assert dropped == list(dict.fromkeys([first[1], 0, 1, 2, 3]))
    assert not set(first[4:]) & set(dropped)
    assert first[1] in first
    later = [row for batch in batches(loader) for row in batch]
    assert sorted(later) == sorted(set(ROWS) - set(dropped))
    assert left_out.drop(dropped, 0) == []


@pytest.mark.parametrize("seen", [2, 5])
def test_a_resumed_pass_is_the_one_that_was_broken_off(seen):
    def run(stop_at: int | None) -> tuple[list, dict]:
        left_out, loader, found = LeftOut([0]), shuffled(size=2), []
        leave_out(loader, left_out, ROWS)
        for number, batch in enumerate(loader, start=1):
            found.append(batch.tolist())
            if number == 2:
                left_out.drop([4, 5, 6], left_out.position)
            if number == stop_at:
                break
        return found, left_out.state_dict(at_end=False)

    unbroken, _ = run(None)
    begun, state = run(seen) if seen < len(unbroken) else (unbroken, run(None)[1])
    left_out, loader = LeftOut([0]), shuffled(size=2)
    left_out.load_state_dict(state)
    leave_out(loader, left_out, ROWS)
    assert begun + batches(loader)[len(begun) :] == unbroken
    assert not {4, 5, 6} & {row for batch in batches(loader) for row in batch}  # the next pass is without them


def test_at_the_end_of_a_pass_a_resumed_run_begins_the_next_one():
    left_out = LeftOut()
    left_out.drop([1], 5)
    resumed = LeftOut()
    resumed.load_state_dict(left_out.state_dict(at_end=True))
    resumed.begin_pass()
    assert resumed.skips(1, 0)
    resumed.load_state_dict(left_out.state_dict(at_end=False))
    resumed.begin_pass()
    assert [resumed.skips(1, position) for position in (4, 5)] == [False, True]


@pytest.mark.parametrize("skip", [0, 2])
def test_a_prepared_dataloader_leaves_out_as_well_and_so_does_one_that_skips_batches(skip):
    new_process()
    prepared = Accelerator(cpu=True).prepare(shuffled())
    left_out = LeftOut([1])
    assert leave_out(prepared, left_out, ROWS)
    sampler = holder_of_sampler(prepared).sampler
    rest = skip_first_batches(prepared, skip)
    assert leave_out(rest, left_out, ROWS)
    assert holder_of_sampler(rest).sampler is sampler  # once is enough
    assert isinstance(sampler, LeavingOut)
    found = batches(rest)
    assert len(found) == 6 - skip
    assert 1 not in {row for batch in found for row in batch}


@pytest.mark.parametrize("prepares", [False, True])
def test_the_place_is_that_of_the_next_batch(prepares):
    new_process()
    loader = Accelerator(cpu=True).prepare(shuffled(size=5)) if prepares else shuffled(size=5)
    place = Place()
    guarded = GuardedLoader(loader, lambda: None, lambda: False, place)
    assert place.next == (0, 0)
    assert [(place.next, place.is_at_end) for _ in guarded] == [((0, 1), False), ((0, 2), False), ((1, 0), True)]
    assert [place.next for _ in guarded] == [(1, 1), (1, 2), (2, 0)]
    assert place.batches == 6


def test_a_place_between_two_passes_is_the_beginning_of_the_next_one():
    place = Place()
    for _ in GuardedLoader(shuffled(size=5), lambda: None, lambda: False, place):
        state = place.state_dict()
    assert state == {"batches": 3, "pass": 1, "in_pass": 0}
    resumed = Place()
    resumed.load_state_dict(state)
    assert resumed.next == (1, 0)
    for _ in GuardedLoader(shuffled(size=5), lambda: None, lambda: False, resumed):
        assert resumed.next[0] == (1 if resumed.batches < 6 else 2)


def test_a_resumed_place_goes_on_where_it_was():
    def run(loader, place, saved=None):
        for _ in GuardedLoader(loader, lambda: None, lambda: False, place):
            if place.batches == saved:
                return place.state_dict()
        return {}

    place = Place()
    run(shuffled(size=5), place)
    state = run(shuffled(size=5), place, saved=5)
    assert state == {"batches": 5, "pass": 1, "in_pass": 2}
    resumed = Place()
    resumed.load_state_dict(state)
    assert resumed.next == (1, 2)
    run(skip_first_batches(shuffled(size=1), 2), resumed, saved=8)
    assert (resumed.batches, resumed.next, resumed.passes) == (8, (1, 5), 2)
    run(shuffled(size=5), resumed)
    assert (resumed.batches, resumed.next) == (11, (3, 0))


def test_which_row_an_index_stands_for():
    subset = Subset(ROWS, [5, 2, 9])
    assert [rows_by_index(subset, ROWS)(i) for i in range(3)] == [5, 2, 9]
    assert [rows_by_index(Subset(subset, [2, 0]), ROWS)(i) for i in range(2)] == [9, 5]
    assert [rows_by_index(subset, subset)(i) for i in range(3)] == [0, 1, 2]
    assert [rows_by_index(ROWS, ROWS, lambda index: index % 4)(i) for i in (3, 4, 9)] == [3, 0, 1]  # three times over
    assert rows_by_index(SimpleNamespace(rows=ROWS), ROWS)(4) == 4
    assert rows_by_index(list(ROWS), ROWS) is None
    assert rows_by_index(Subset([1, 2], [0]), ROWS) is None


def test_two_views_of_one_dataset_are_the_same_rows():
    Dataset = pytest.importorskip("datasets").Dataset  # the lowest versions are tested without it
    dataset = Dataset.from_dict({"text": ["a", "b", "c"]})
    assert is_same(dataset.with_transform(lambda row: row), dataset)
    assert not is_same(dataset.select([2, 0]), dataset)
    assert not is_same(Dataset.from_dict({"text": ["a", "b", "c"]}), dataset)
    assert not is_same(None, None)


def test_what_has_no_sampler_of_rows_cannot_leave_out():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    assert not leave_out(DataLoader(Stream(), 2), LeftOut([1]), ROWS)
    assert not leave_out(DataLoader(ROWS, None), LeftOut([1]), ROWS)
    assert not leave_out(ROWS, LeftOut([1]), ROWS)
    assert not leave_out(DataLoader(list(ROWS), 2), LeftOut([1]), ROWS)
