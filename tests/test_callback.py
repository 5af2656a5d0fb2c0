"""The loop's contract: when events are due, what a stop does, what the guard is, and what closing closes."""

from __future__ import annotations

import logging

import pytest
from support.builders import CONFIG, EAGER, Loop, assert_same, call_every_change, history, probes_of_both_kinds
from torch.utils.data import DataLoader

import memwatch.callback
from memwatch.judge.stop import StopState
from memwatch.judge.verdict import Verdict
from memwatch.measure.weights import trainable


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("decided", ["by-config", "by-patch"])
def test_a_stop_ends_training_without_another_optimizer_step(
    decided, accumulation, pretrained, pipeline, images, tmp_path, monkeypatch
):
    loop = Loop(pretrained, tmp_path, accumulation=accumulation, lr=3e-2)
    overrides = EAGER if decided == "by-config" else {}
    if decided == "by-config":
        call_every_change(monkeypatch)
    else:

        def stops_at_two(state, findings, step, rule):
            return StopState(1, "enough") if step >= 2 else state

        monkeypatch.setattr(memwatch.callback, "decide_stop", stops_at_two)
    watch = loop.watch(pipeline, controls=images, **overrides)
    optimizer_steps, at_event = [], []
    real_step = loop.optimizer.optimizer.step

    def counted_step(*args, **kwargs):
        optimizer_steps.append(loop.step)
        return real_step(*args, **kwargs)

    loop.optimizer.optimizer.step = counted_step
    reports = loop.run(watch, 20, each=lambda running: at_event.append(trainable(running.bare)))
    assert watch.should_stop
    assert reports[-1].stop_reason == watch.stop_reason
    assert reports[-1].stop_reason is not None
    assert [r.stop_reason for r in reports[:-1]] == [None] * (len(reports) - 1)
    assert loop.step == reports[-1].step == len(optimizer_steps) < 20
    if decided == "by-patch":
        assert loop.step == 2
        assert watch.stop_reason == "enough"
    assert_same(at_event[-1], trainable(loop.bare))
    assert list(watch.guard(loop.loader)) == []  # another epoch would have no batches
    assert history(tmp_path)[-1]["stop_reason"] == watch.stop_reason
    assert history(tmp_path)[-1]["scalars"]["memwatch/stop"] == 1


def test_a_stop_is_never_taken_back(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path, lr=0.0)
    watch = loop.watch(pipeline)
    watch.begin()
    assert (watch.should_stop, watch.stop_reason) == (False, None)
    with monkeypatch.context() as patch:
        patch.setattr(memwatch.callback, "decide_stop", lambda *args: StopState(1, "enough"))
        watch.on_step_end(2)
    report = watch.on_step_end(4)  # the real rule again, and nothing to see
    assert report.findings[0].verdict is Verdict.NO_EVIDENCE
    assert (watch.should_stop, watch.stop_reason, report.stop_reason) == (True, "enough", "enough")


@pytest.mark.usefixtures("eager")
def test_a_disabled_stop_never_stops(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    watch = loop.watch(pipeline, controls=images, **EAGER | {"stop": {"enabled": False}})
    reports = loop.run(watch, 4)
    assert any(f.verdict is Verdict.MEMORIZED for r in reports for f in r.findings)
    assert not watch.should_stop


def test_the_guard_is_the_dataloader_in_every_other_respect(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    guarded = watch.guard(loop.loader)
    assert len(guarded) == len(loop.loader) == 4
    assert isinstance(guarded, DataLoader)
    assert guarded.dataset is loop.loader.dataset
    assert guarded.batch_sampler is loop.loader.batch_sampler
    assert guarded.total_batch_size == loop.loader.total_batch_size
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = guarded.no_such_thing
    assert not (tmp_path / "memwatch" / "history.jsonl").exists()  # the baseline waits for the first batch
    assert len(list(guarded)) == 4
    assert [row["step"] for row in history(tmp_path)] == [0]
    assert len(list(guarded)) == 4
    assert len(history(tmp_path)) == 1


def test_begin_happens_once_and_events_are_due_every_so_many_steps(pretrained, pipeline, tmp_path, caplog):
    loop = Loop(pretrained, tmp_path, lr=0.0)
    watch = loop.watch(pipeline, every_steps=3)
    assert watch.begin().step == 0
    assert watch.begin() is None
    due = [step for step in (1, 2, 3, 3, 4, 6) if watch.on_step_end(step) is not None]
    assert due == [3, 6]
    assert [row["step"] for row in history(tmp_path)] == [0, 3, 6]  # at the first 3, not at both
    late = Loop(pretrained, tmp_path / "late").watch(pipeline)
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert late.on_step_end(1).step == 1
    assert any("first baseline only now" in message for message in caplog.messages)


def test_end_training_closes_and_closing_twice_is_fine(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    loop.run(watch, 2)
    closed = []
    watch.sinks.files.close = lambda: closed.append(True)
    loop.accelerator.end_training()
    watch.close()
    watch.close()
    assert closed == [True]
    assert watch.on_step_end(4) is None
    assert [row["step"] for row in history(tmp_path)] == [0, 2]


def test_end_training_closes_when_trackers_are_initialized_later(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    loop.accelerator.init_trackers("late")  # makes a new list of trackers
    loop.run(watch, 2)
    loop.accelerator.end_training()
    assert watch.on_step_end(4) is None
    assert [row["step"] for row in history(tmp_path)] == [0, 2]


def test_several_probes_of_both_kinds_keep_their_order(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path)
    probes = [probes_of_both_kinds()[1], "a blue sign", *probes_of_both_kinds()[:1]]
    report = loop.watch(pipeline, probes, controls=images, config=CONFIG).begin()
    found = [(f.name, f.observation.probe.is_reference) for f in report.findings]
    assert found == [("poster", False), ("a-blue-sign", False), ("cat", True)]
    assert all(f.observation.image.shape == (16, 16, 3) for f in report.findings)
    assert all(f.verdict is Verdict.INCONCLUSIVE for f in report.findings)


@pytest.mark.usefixtures("eager")
def test_an_alert_says_what_the_probe_was_compared_with(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    reports = loop.run(loop.watch(pipeline, controls=images, **EAGER | {"stop": {"enabled": False}}), 4)
    texts = [report.alert_text(finding) for report in reports for finding in report.alerts]
    assert texts
    for text in texts:
        baseline, prompt = text.splitlines()[-2:]
        assert baseline == "baseline: step 0 and the model's own unconditional branch."
        assert prompt.startswith("prompt: ")
