"""How often memwatch looks: within its share of training time, chosen once, from the first steps."""

from __future__ import annotations

import itertools
import logging

import pytest
from support.builders import CONFIG, SMALL, Loop, history
from torch.utils.data import DataLoader

import memwatch.callback
import memwatch.pace
from memwatch.config import MemWatchConfig
from memwatch.measure.measure import Passes
from memwatch.pace import CHOSEN, NEVER_RARER, OFTENEST, TIMED, WARM_UP, Clock, Prices, choose_pace


@pytest.mark.parametrize(
    ("step", "first", "event", "config", "every", "within"),
    [
        (1.0, 0.0, 4.0, {}, 200, True),  # 4 s are 2 % of 200 s
        (1.0, 20.0, 4.0, {}, 400, True),  # half of the budget pays off the first event over 2,000 steps
        (1.0, 400.0, 4.0, {}, 400, False),  # and never more than half
        (1.0, 0.0, 0.1, {}, OFTENEST, True),
        (1.0, 0.0, 100.0, {}, NEVER_RARER, False),
        (1.0, 0.0, 4.0, {"overhead": 0.2}, OFTENEST, True),
        (1.0, 0.0, 4.0, {"max_train_steps": 600}, 150, False),  # four events must fit
        (1.0, 0.0, 4.0, {"max_train_steps": 3}, 1, False),
        (1.0, 0.0, 4.0, {"max_train_steps": 20_000}, 200, True),
    ],
)
def test_the_choice(step, first, event, config, every, within):
    pace = choose_pace(Prices(step, first, event), MemWatchConfig(**config))
    assert (pace.every_steps, pace.within) == (every, within)
    horizon = config.get("max_train_steps", 2000)
    assert pace.overhead == pytest.approx((first / horizon + event / every) / step)


def test_a_later_event_is_priced_by_its_passes():
    prices = Prices.of(1.0, 2.0, Passes(screen=150, full=1600, sampling=50))
    assert prices.event == pytest.approx(0.01 * (200 + CHOSEN * 1600))
    assert prices.full == pytest.approx(0.01 * 1600)
    assert Prices.of(1.0, 2.0, Passes(screen=0, full=1600, sampling=0)) == Prices(1.0, 2.0, 2.0)


def test_a_step_is_all_of_the_loops_time_between_two_new_numbers():
    seconds = 0, 9, 0, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9, 0  # 9 s are memwatch's
    clock = Clock(now=iter(itertools.accumulate(seconds)).__next__)
    for step in (4, 5, 5, 5, 7):
        clock.arrive(step)
        clock.leave()
    assert (clock.steps, clock.trained, clock.spent) == ([(2 + 3 + 4) / 2], 10, 45)
    assert clock.overhead == 4.5


BATCH, EVENT = 0.25, 0.9  # seconds


class Seconds(list):
    """What a clock reads, as long as nobody adds any."""

    def __call__(self) -> float:
        return sum(self)


def free_event(watch, step):
    """An event that does nothing but take ``EVENT`` seconds."""
    watch.progress.last_step, watch.progress.events = step, watch.progress.events + 1
    watch.progress.clock.now.append(EVENT)
    watch.progress.clock.first = watch.progress.clock.first or EVENT


@pytest.mark.parametrize("every_batch", [False, True], ids=["at_steps", "at_every_batch"])
@pytest.mark.parametrize(("accumulation", "every_steps"), [(1, 200), (4, 50)])  # 0.9 s are 2 % of 45 s
@pytest.mark.parametrize("batches", [1, 2, 50])
def test_measured_steps_are_the_loops_own(
    batches, accumulation, every_steps, every_batch, pretrained, pipeline, tmp_path, monkeypatch
):
    """The guard begins at every pass, however few batches it has, and a resumed run never reads across the gap."""
    monkeypatch.setattr(memwatch.callback.MemWatch, "_event", free_event)
    loop, state, done = Loop(pretrained, tmp_path), None, 0
    for steps in (6, 30):  # a run, and the one that resumes it
        watch = loop.watch(pipeline, config=SMALL | {"every_steps": None})
        if state is not None:
            watch.load_state_dict(state)
        watch.progress.clock.now = Seconds()
        loader = watch.guard(DataLoader(range(batches)))
        while done < steps * accumulation:
            for _ in itertools.islice(loader, steps * accumulation - done):
                done += 1
                watch.progress.clock.now.append(BATCH)
                if every_batch or done % accumulation == 0:
                    watch.on_step_end(done // accumulation)
        state = watch.state_dict()
        watch.close()
    assert watch.progress.clock.steps == pytest.approx([BATCH * accumulation] * (WARM_UP + TIMED))
    assert watch.every_steps == every_steps


def timed(monkeypatch, event: float, step: float) -> None:
    """Let every event seem to take ``event`` seconds and every step ``step``; the first event is free."""
    monkeypatch.setattr(memwatch.pace.Clock, "step_seconds", property(lambda c: step if len(c.steps) >= 3 else None))
    monkeypatch.setattr(memwatch.callback.Prices, "of", lambda *a: Prices(step, 0.0, event))


def test_the_interval_is_chosen_once_and_kept_in_checkpoints(pretrained, pipeline, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "memwatch")
    timed(monkeypatch, 0.5, 1.0)
    settings = CONFIG | {"every_steps": None, "max_train_steps": 28}
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=settings)
    assert watch.every_steps is None
    first, second = loop.run(watch, 15)
    assert (first.step, second.step) == (7, 14)  # 28 / 4
    assert second.scalars()["memwatch/overhead"] == second.overhead > 0
    (said,) = [message for message in caplog.messages if "an event every" in message]
    assert "an event every 7 steps, about 7.1 % of training time, more than overhead: 0.02 allows" in said
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))

    timed(monkeypatch, 0.5, 1000.0)
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline, config=settings)
    again.accelerator.load_state(str(tmp_path / "checkpoint"))
    again.step = 15
    assert watch.every_steps == 7
    assert [report.step for report in again.run(watch, 22)] == [21]
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 7, 14, 21]
    assert [row["overhead"] for row in rows[:3]] == [None, first.overhead, second.overhead]
