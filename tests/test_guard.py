"""The guard: it changes no batch, ends quietly after a stop, and hears what the accelerator is asked to do."""

from __future__ import annotations

import gc
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from memwatch.guard import MANY, TOO_MANY, GuardedLoader, hook_end_training, hook_log

FIX = "write 'while global_step < max_steps and not watch.should_stop:'"


def test_a_loop_over_epochs_ends_quietly_and_a_batch_begins_the_count_anew(caplog):
    assert (MANY, TOO_MANY) == (10_000, 100_000)
    stopped, batches = GuardedLoader([1, 2, 3], lambda: None, lambda: True), []
    open_ = GuardedLoader(batches, lambda: None, lambda: False)
    with caplog.at_level(logging.INFO, "memwatch"):
        assert [list(stopped) for _ in range(MANY)] == [[]] * MANY
        for _ in range(3):
            assert [list(open_) for _ in range(MANY)] == [[]] * MANY
            batches.append(1)
            assert list(open_) == [1]
            batches.clear()
    assert caplog.messages == []


def test_a_loop_over_steps_is_told_once_and_then_ended(caplog):
    """``while step < 10: for batch in loader`` never ends."""
    steps, passes = [], []
    loader = GuardedLoader([1, 2, 3], lambda: passes.append(True), lambda: len(passes) > 1)

    def train():
        while len(steps) < 10:
            steps.extend(loader)

    with caplog.at_level(logging.WARNING, "memwatch"), pytest.raises(RuntimeError) as caught:
        train()
    assert (steps, len(passes)) == ([1, 2, 3], 1 + TOO_MANY)
    assert caplog.messages == [f"training was stopped, but the loop goes on without batches; {FIX}"]
    assert str(caught.value) == f"memwatch: {caplog.messages[0]}"


def test_empty_passes_are_counted_where_nothing_was_stopped_as_well(caplog):
    loader = GuardedLoader(DataLoader([1, 2], batch_size=4, drop_last=True), lambda: None, lambda: False)
    said = "the dataloader has given no batch in {} passes; see its batch size and drop_last"
    with caplog.at_level(logging.WARNING, "memwatch"), pytest.raises(RuntimeError, match=said.format(TOO_MANY)):
        list(itertools.takewhile(lambda batches: not batches, (list(loader) for _ in itertools.count())))
    assert caplog.messages == [said.format(MANY + 1)]


ROWS = list(range(10))


@pytest.mark.parametrize("kind", ["weighted", "batch_size=None"])
def test_batches_sampler_and_length_are_the_dataloaders_own(kind):
    """``test_neutrality.py`` trains over all kinds."""

    def made():
        sampler = WeightedRandomSampler([1.0] * 10, 7)
        return DataLoader(ROWS, 2, sampler=sampler, drop_last=True) if kind == "weighted" else DataLoader(ROWS, None)

    def batches(loader):
        torch.manual_seed(7)
        return [[torch.as_tensor(batch).tolist() for batch in loader] for _ in range(2)]

    wrapped, expected = made(), batches(made())
    guarded = GuardedLoader(wrapped, lambda: None, lambda: False)
    assert len(guarded) == len(expected[0])
    assert guarded.sampler is wrapped.sampler
    assert guarded.batch_sampler is wrapped.batch_sampler
    assert batches(guarded) == expected
    assert isinstance(guarded, DataLoader)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = guarded.no_such_thing


class Hearer:
    def __init__(self, accelerator, asked: list) -> None:
        self.asked, self.heard = asked, []
        hook_log(accelerator, self.note)
        hook_end_training(accelerator, self.note)

    def note(self, *heard):
        self.heard.append((*heard, len(self.asked)))


def test_calls_are_heard_first_and_done_unchanged_and_no_hearer_is_kept_alive():
    asked, values = [], {"val_loss": 0.5}

    def log(values, step=None, log_kwargs=None):
        """Logs."""
        asked.append((values, step, log_kwargs))
        return "logged"

    accelerator = SimpleNamespace(log=log, end_training=lambda: asked.append("end") or "ended")
    first, second = Hearer(accelerator, asked), Hearer(accelerator, asked)
    assert accelerator.log(values, 3, {"wandb": 1}) == "logged"
    assert accelerator.log(step=4, values=values) == "logged"
    heard = first.heard
    del first
    gc.collect()
    assert accelerator.log(values) == "logged"  # without a step nobody knows where it belongs
    assert accelerator.end_training() == "ended"
    assert asked == [(values, 3, {"wandb": 1}), (values, 4, None), (values, None, None), "end"]
    assert all(call[0] is values for call in asked[:3])
    assert heard == [(values, 3, 0), (values, 4, 1)]
    assert second.heard == [*heard, (3,)]
    assert accelerator.log.__doc__ == "Logs."
    with pytest.raises(TypeError, match="values"):
        accelerator.log(step=1)
