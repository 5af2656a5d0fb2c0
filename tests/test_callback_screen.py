"""Screened events: forward passes on everything, curvature where they say so, the baseline's curvature afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.builders import (
    CONFIG,
    Loop,
    assert_same,
    choose,
    history,
    maps,
    picture,
    probes_of_both_kinds,
    without_time,
)

import memwatch.measure.observer
import memwatch.measure.views
from memwatch import Probe
from memwatch.measure.signals import decide

SCREENED = CONFIG | {"screen": True, "strict": True}
NAMES = ["cat", "poster"]


def measured(report) -> list[str]:
    """Whose curvature was measured."""
    return [f.name for f in report.judgement.everything if f.observation.now.rho is not None]


def test_an_event_measures_curvature_of_what_the_screen_chooses(pretrained, pipeline, images, tmp_path, monkeypatch):
    choose(monkeypatch, "cat", "control/control0")
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, controls=images, config=SCREENED)
    first = watch.begin()
    later = loop.run(watch, 4)
    assert measured(first) == []
    assert [measured(report) for report in later] == [["cat", "control/control0"]] * 2
    assert [r.scalars()["memwatch/measured"] for r in (first, *later)] == [0, 4, 4]  # all controls that are images
    cat, poster = later[0].findings
    assert cat.signals.snapshot.variance is not None
    assert poster.signals.snapshot.variance is None
    assert_same(poster.signals.deciding.samples, decide(poster.signals, "loss", "both").samples)
    chosen, *others = later[0].judgement.controls
    assert chosen.signals.snapshot.variance is not None
    assert [f.signals.snapshot.variance for f in others] == [None, None]  # measured, but judged as the screen saw them
    keys = later[0].scalars().keys()
    assert "memwatch/collapse/cat" in keys
    assert "memwatch/collapse/poster" not in keys
    assert {"memwatch/loss_log_ratio/poster", "memwatch/severity/poster"} <= keys


@pytest.mark.parametrize("kind", [{}, {"lora": True, "precision": "bf16", "checkpointing": True}, {"ema": True}])
def test_the_baseline_measured_afterwards_is_that_measured_at_once(kind, pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch, *NAMES)
    for name, settings in (("screened", SCREENED), ("full", CONFIG | {"strict": True})):
        loop = Loop(pretrained, tmp_path / name, **kind)
        loop.run(loop.watch(pipeline, config=settings), 4)
    for step in (2, 4):
        assert_same(maps(tmp_path / "screened", step), maps(tmp_path / "full", step))
    rows = [without_time(history(tmp_path / name))[1:] for name in ("screened", "full")]
    assert_same([row["findings"] for row in rows[0]], [row["findings"] for row in rows[1]])


def test_the_baseline_is_measured_once(pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch, "cat")
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SCREENED, probes=probes_of_both_kinds()[:1])
    swaps = []
    real = memwatch.measure.observer.swapped
    monkeypatch.setattr(memwatch.measure.observer, "swapped", lambda *a: swaps.append(loop.step) or real(*a))
    loop.run(watch, 8)
    assert swaps == [2]
    assert watch.baselines.ledger.steps == watch.baselines.weights.steps == [0]


def test_a_frozen_model_reads_exactly_zero(pretrained, pipeline, images, tmp_path, monkeypatch):
    choose(monkeypatch, "cat")
    loop = Loop(pretrained, tmp_path, lr=0.0)
    for report in loop.run(loop.watch(pipeline, controls=images, config=SCREENED), 4):
        for finding in report.judgement.everything:
            assert finding.signals.decisive.mean.max() <= 0, finding.name  # the prompt itself may raise the loss
            assert not finding.signals.snapshot.loss.samples.any()
            assert finding.severity == 1.0


def test_what_is_not_chosen_has_stored_nothing_that_shows(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=0.0)
    reports = loop.run(loop.watch(pipeline, controls=images, config=SCREENED), 4)
    assert [measured(report) for report in reports] == [[], []]


def test_every_so_often_everything_is_measured(pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch)
    loop = Loop(pretrained, tmp_path)
    reports = loop.run(loop.watch(pipeline, config=SCREENED, full_every=2), 8)
    assert [measured(report) for report in reports] == [[], NAMES, [], NAMES]


@pytest.mark.parametrize(
    "settings",
    [
        {"screen": False},
        {"signals": {"terms": "variance"}},
        {"signals": {"baseline": "previous"}},
        {"sampling": {"look": "last_step", "seeds": 1}},
    ],
)
def test_where_there_is_nothing_to_screen_by_everything_is_measured(settings, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SCREENED, **settings)
    reports = [watch.begin(), *loop.run(watch, 4)]
    assert [measured(report) for report in reports] == [NAMES] * 3


def test_training_is_bit_identical(pretrained, pipeline, images, tmp_path, monkeypatch):
    choose(monkeypatch, *NAMES)
    plain = Loop(pretrained, tmp_path / "plain")
    plain.run(None, 5)
    watched = Loop(pretrained, tmp_path / "watched")
    assert len(watched.run(watched.watch(pipeline, controls=images, config=SCREENED), 5)) == 2
    assert_same(plain.state(), watched.state())


def test_prompts_generate_once_per_event(pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch, "poster")
    calls, loop = [], Loop(pretrained, tmp_path)
    real = memwatch.measure.observer.generate
    monkeypatch.setattr(memwatch.measure.observer, "generate", lambda *a, **k: calls.append(loop.step) or real(*a, **k))
    loop.run(loop.watch(pipeline, config=SCREENED, proof={"enabled": False}), 4)
    assert calls == [0, 2, 4]


def test_where_weights_cannot_be_exchanged_the_baseline_is_measured_at_once(
    pretrained, pipeline, tmp_path, monkeypatch
):
    choose(monkeypatch, "cat")
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SCREENED, probes=probes_of_both_kinds()[:1])
    watch.observer.ranks = replace(watch.observer.ranks, swappable=False)
    reports = [watch.begin(), *loop.run(watch, 4)]
    assert [measured(report) for report in reports] == [["cat"]] * 3
    assert reports[-1].findings[0].signals.snapshot.variance is not None
    assert watch.baselines.weights.steps == []


def test_a_probe_that_comes_later_gets_a_baseline_of_its_own(pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch, "cat", "new")
    cat = probes_of_both_kinds()[:1]
    loop = Loop(pretrained, tmp_path)
    first = loop.watch(pipeline, config=SCREENED, probes=cat)
    loop.run(first, 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline, config=SCREENED, probes=[*cat, Probe("new", picture(7), name="new")])
    again.accelerator.load_state(str(tmp_path / "checkpoint"))
    again.step = 2
    reports = again.run(watch, 6)
    assert [[f.observation.baseline_step for f in report.findings] for report in reports] == [[0, None], [0, 4]]
    assert [measured(report) for report in reports] == [["cat"], ["cat", "new"]]


def test_without_the_weights_of_the_baseline_a_new_one_is_taken(pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch, "cat")
    cat = probes_of_both_kinds()[:1]
    loop = Loop(pretrained, tmp_path)
    first = loop.watch(pipeline, config=SCREENED, probes=cat)
    loop.run(first, 1)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    (tmp_path / "memwatch" / "snapshots" / "step_0000000.safetensors").unlink()
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline, config=SCREENED, probes=cat)
    again.accelerator.load_state(str(tmp_path / "checkpoint"))
    again.step = 1
    reports = again.run(watch, 4)
    assert [report.findings[0].observation.baseline_step for report in reports] == [None, 2]


def test_resume_equals_never_stopped(pretrained, pipeline, images, tmp_path, monkeypatch):
    choose(monkeypatch, "cat", "poster", "control/control1")
    options = {"config": SCREENED, "controls": images}
    whole = Loop(pretrained, tmp_path / "whole")
    whole.run(whole.watch(pipeline, **options), 6)
    killed = Loop(pretrained, tmp_path / "broken")
    watch = killed.watch(pipeline, **options)
    killed.run(watch, 4, epochs=2)
    killed.accelerator.save_state(str(tmp_path / "checkpoint"))
    resumed = Loop(pretrained, tmp_path / "broken")
    watch = resumed.watch(pipeline, **options)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    resumed.step = 4
    resumed.run(watch, 6)
    assert_same(whole.state(), resumed.state())
    assert_same(without_time(history(tmp_path / "whole")), without_time(history(tmp_path / "broken")))
    for step in (2, 4, 6):
        assert_same(maps(tmp_path / "whole", step), maps(tmp_path / "broken", step))
