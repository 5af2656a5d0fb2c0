"""The loop's contract: when events are due, what a stop does, what is compared with what, and what closing closes."""

from __future__ import annotations

import logging

import pytest
from support import builders
from support.builders import Loop, assert_same, history, maps

from memwatch.measure.weights import trainable


@pytest.fixture
def loop(pretrained, tmp_path) -> Loop:
    return Loop(pretrained, tmp_path)


@pytest.mark.parametrize(("accumulation", "decided"), [(1, "by the rule"), (1, "at once"), (2, "at once")])
def test_a_stop_ends_training_without_another_optimizer_step(
    decided, accumulation, pretrained, pipeline, images, tmp_path, monkeypatch
):
    loop = Loop(pretrained, tmp_path, accumulation=accumulation, lr=3e-2)
    if decided == "by the rule":
        builders.call_every_change(monkeypatch)
    else:
        builders.stop_at(2, monkeypatch)
    watch = loop.watch(pipeline, controls=images)
    assert (watch.should_stop, watch.stop_reason, watch.exit_code) == (False, None, 0)
    optimizer_steps, at_event = [], []
    real_step = loop.optimizer.optimizer.step
    loop.optimizer.optimizer.step = lambda *args: optimizer_steps.append(loop.step) or real_step(*args)
    reports = loop.run(watch, 20, each=lambda running: at_event.append(trainable(running.bare)))
    assert (watch.should_stop, watch.exit_code) == (True, 3)
    assert [r.stop_reason for r in reports] == [None] * (len(reports) - 1) + [watch.stop_reason]
    assert (watch.stop_reason == "enough") == (decided == "at once")
    assert loop.step == reports[-1].step == len(optimizer_steps) == 2
    assert_same(at_event[-1], trainable(loop.bare))
    assert list(watch.guard(loop.loader)) == []  # another epoch would have no batches
    assert history(tmp_path)[-1]["stop_reason"] == watch.stop_reason
    assert history(tmp_path)[-1]["scalars"]["memwatch/stop"] == 1

    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    monkeypatch.undo()  # the real rule again, which never takes a stop back, nor does a resume
    assert watch.on_step_end(4).stop_reason == watch.stop_reason
    again = Loop(pretrained, tmp_path)
    resumed = again.watch(pipeline, controls=images)
    again.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert resumed.stop_reason == watch.stop_reason
    assert list(resumed.guard(again.loader)) == []


def test_the_baseline_waits_for_the_first_batch_and_events_come_every_so_many_steps(
    pretrained, pipeline, tmp_path, caplog
):
    loop = Loop(pretrained, tmp_path, lr=0.0)
    watch = loop.watch(pipeline, every_steps=3)
    guarded = watch.guard(loop.loader)
    assert guarded.total_batch_size == loop.loader.total_batch_size
    assert not (tmp_path / "memwatch" / "history.jsonl").exists()
    assert [len(list(guarded)) for _ in range(2)] == [4, 4]
    assert watch.begin() is None
    due = [step for step in (1, 2, 3, 3, 4, 6) if watch.on_step_end(step) is not None]
    assert due == [3, 6]
    assert [row["step"] for row in history(tmp_path)] == [0, 3, 6]  # at the first 3, not at both
    late = Loop(pretrained, tmp_path / "late").watch(pipeline)
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert late.on_step_end(1).step == 1
    assert any("baseline taken only now, after step 1" in message for message in caplog.messages)


@pytest.mark.parametrize("trackers", ["before", "later"])
def test_end_training_closes_and_closing_twice_is_fine(trackers, loop, pipeline, tmp_path):
    watch = loop.watch(pipeline)
    if trackers == "later":
        loop.accelerator.init_trackers("late")  # makes a new list of trackers
    loop.run(watch, 2)
    closed = []
    watch.sinks.files.close = lambda: closed.append(True)
    loop.accelerator.end_training()
    watch.close()
    assert closed == [True]
    assert watch.on_step_end(4) is None
    assert [row["step"] for row in history(tmp_path)] == [0, 2]


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("first", [None, 0, 0, 0, 0]),
        ("previous", [None, 0, 2, 4, 6]),
        ("lag:2", [None, 0, 0, 2, 4]),
        ("last_clean", [None, 0, 2, 4, 6]),
    ],
)
def test_baseline_steps(baseline, expected, loop, pipeline, tmp_path):
    loop.run(loop.watch(pipeline, signals={"baseline": baseline}), 8)
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    for index, name in enumerate(("cat", "poster")):
        assert [row["findings"][index]["baseline_step"] for row in rows] == expected
        for row in rows[1:]:
            value = maps(tmp_path, row["step"])[f"{name}/log_ratio"]
            assert value.isfinite().all()
            assert value.any()


def test_last_clean_stays_where_suspicion_began(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    watch = loop.watch(pipeline, signals={"baseline": "last_clean"})
    loop.run(watch, 4)
    state = watch.state_dict()
    for probe in state["states"].values():  # as if suspicion had begun at step 4
        probe.update(since=4, last_clean=2, verdict="suspicious")
    watch.load_state_dict(state)
    (report,) = loop.run(watch, 6)
    assert {finding.observation.baseline_step for finding in report.findings} == {2}
