"""The guard after a stop: a loop over epochs ends quietly, and one that can never end is told how to.

What the accelerator is asked to do is heard first, and done as ever.
"""

from __future__ import annotations

import gc
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from memwatch.guard import MANY, TOO_MANY, GuardedLoader, hook_end_training, hook_log, rows_in, rows_per_device

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


def test_empty_passes_are_counted_where_nothing_was_stopped_as_well(caplog):
    """Eight of ten rows dropped with ``drop_last`` were 150,000 silent passes."""
    loader = GuardedLoader(DataLoader([1, 2], batch_size=4, drop_last=True), lambda: None, lambda: False)
    with caplog.at_level(logging.WARNING, "memwatch"), pytest.raises(RuntimeError) as caught:
        list(itertools.takewhile(lambda batches: not batches, (list(loader) for _ in itertools.count())))
    (said,) = caplog.messages
    assert said.startswith(f"the dataloader has given no batch in {MANY + 1} passes, and the loop goes on")
    assert str(caught.value).startswith(f"the dataloader has given no batch in {TOO_MANY} passes")
    assert "see its data set, batch size and drop_last" in said


def test_a_pass_with_a_batch_begins_the_count_anew(caplog):
    batches = []
    loader = GuardedLoader(batches, lambda: None, lambda: False)
    for _ in range(3):
        assert [list(loader) for _ in range(MANY)] == [[]] * MANY
        batches.append(1)
        assert list(loader) == [1]
        batches.clear()
    assert caplog.messages == []


# --- it changes no batch, length or sampler --------------------------------------------------------------------------


ROWS = list(range(10))
LOADERS = {
    "shuffle": lambda: {"batch_size": 2, "shuffle": True, "generator": torch.Generator().manual_seed(3)},
    "more draws than rows": lambda: {"batch_size": 2, "sampler": RandomSampler(Subset(ROWS, [1, 2]), num_samples=17)},
    "replacement": lambda: {"batch_size": 2, "sampler": RandomSampler(ROWS, replacement=True, num_samples=3)},
    "some indices": lambda: {"batch_size": 2, "sampler": SubsetRandomSampler([4, 5, 6])},
    "weights": lambda: {"batch_size": 2, "sampler": WeightedRandomSampler([1.0] * 10, 7), "drop_last": True},
    "batches": lambda: {"batch_sampler": BatchSampler(RandomSampler(ROWS), 3, drop_last=True)},
    "no batches": lambda: {"batch_size": None},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_sampler_and_length_are_the_dataloaders_own(kind):
    """With rows held out inside of it, some of these had another length, raised, or gave none."""

    def batches(loader):
        torch.manual_seed(7)
        return [[torch.as_tensor(batch).tolist() for batch in loader] for _ in range(2)]

    alone, wrapped = (DataLoader(ROWS, **LOADERS[kind]()) for _ in range(2))
    guarded, expected = GuardedLoader(wrapped, lambda: None, lambda: False), batches(alone)
    assert len(guarded) == len(alone) == len(expected[0])
    assert guarded.sampler is wrapped.sampler
    assert guarded.batch_sampler is wrapped.batch_sampler
    assert batches(guarded) == expected
    assert isinstance(guarded, DataLoader)


def test_the_baseline_comes_first_and_every_batch_is_counted():
    said = []
    loader = GuardedLoader([1, 2], lambda: said.append("begin"), lambda: False, lambda: said.append("batch"))
    for batch in loader:
        said.append(batch)
    assert said == ["begin", "batch", 1, "batch", 2]


def test_rows_per_device():
    rows = list(range(8))
    assert rows_per_device(DataLoader(rows, batch_size=3), 1) == 3
    assert rows_per_device(DataLoader(rows, batch_size=None), 1) is None
    assert rows_per_device(iter(rows), 1) is None
    assert rows_per_device(SimpleNamespace(total_batch_size=8), 4) == 2  # accelerate's, over all processes
    assert rows_per_device(SimpleNamespace(total_batch_size=2), 4) == 1


def test_rows_in_a_data_set():
    assert rows_in(DataLoader(list(range(8)), batch_size=3)) == 8
    assert rows_in([1, 2]) is None
    assert rows_in(SimpleNamespace(dataset=iter([1]))) is None  # a stream has no length


# --- hearing the accelerator -----------------------------------------------------------------------------------------


class Accelerator:
    """Notes what it is asked to do."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def log(self, values, step=None, log_kwargs=None):
        """Logs."""
        self.asked.append((values, step, log_kwargs))
        return "logged"

    def end_training(self):
        self.asked.append("end")
        return "ended"


class Hearer:
    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.heard = accelerator, []

    def note(self, values, step):
        self.heard.append((values, step, len(self.accelerator.asked)))

    def close(self):
        self.heard.append(("close", len(self.accelerator.asked)))


def test_a_log_is_heard_first_and_logged_unchanged():
    accelerator = Accelerator()
    hearer, values = Hearer(accelerator), {"val_loss": 0.5}
    hook_log(accelerator, hearer.note)
    assert accelerator.log(values, 3, {"wandb": 1}) == "logged"
    assert accelerator.log(step=4, values=values) == "logged"
    assert accelerator.log(values) == "logged"  # without a step nobody knows where it belongs
    assert accelerator.asked == [(values, 3, {"wandb": 1}), (values, 4, None), (values, None, None)]
    assert all(asked[0] is values for asked in accelerator.asked)
    assert hearer.heard == [(values, 3, 0), (values, 4, 1)]
    assert accelerator.log.__doc__ == "Logs."


def test_several_hear_the_same_accelerator_and_none_is_kept_alive():
    accelerator = Accelerator()
    hearers = [Hearer(accelerator) for _ in range(2)]
    for hearer in hearers:
        hook_log(accelerator, hearer.note)
    accelerator.log({}, 1)
    first = hearers.pop(0)
    heard = first.heard
    del first, hearer
    gc.collect()
    accelerator.log({}, 2)
    assert [step for _, step, _ in heard] == [1]
    assert [step for _, step, _ in hearers[0].heard] == [1, 2]
    assert [step for _, step, _ in accelerator.asked] == [1, 2]


def test_what_the_accelerator_raises_comes_out():
    accelerator = Accelerator()
    hearer = Hearer(accelerator)
    hook_log(accelerator, hearer.note)
    with pytest.raises(TypeError, match="values"):
        accelerator.log(step=1)
    accelerator.asked = None
    with pytest.raises(AttributeError):
        accelerator.log({})


def test_the_end_of_training_is_heard_first():
    accelerator = Accelerator()
    hearer = Hearer(accelerator)
    hook_end_training(accelerator, hearer.close)
    assert accelerator.end_training() == "ended"
    assert (hearer.heard, accelerator.asked) == ([("close", 0)], ["end"])
