"""What follows from a training set and from alerts: controls held out, rows dropped, hooks, weights to go back to."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.builders import CONFIG, EAGER, assert_same, call_every_change, choose, history, without_time
from support.rows import REPEATED, RowsLoop, make_rows
from torch.utils.data import Subset

import memwatch.judge.findings
from memwatch import ConfigError, ProbeError
from memwatch.act.flagged import read_flagged
from memwatch.left_out import LeftOut, holder_of_sampler, leave_out

PICKING = CONFIG | {"probes": 4, "pick": {"hold_out": 10, "peers": 0, "places": 0, "workers": 1}, "strict": True}
SELDOM = PICKING | {"every_steps": 30}  # where what is trained on counts
GOING_ON = PICKING | EAGER | {"on_memorized": "drop"}


def call_repeated(monkeypatch) -> None:
    """Let the probe that stands for the repeated picture be strong and rare, and no other."""
    call_every_change(monkeypatch)
    strong = memwatch.judge.findings.evidence_of

    def evidence_of(observation, *args):
        evidence, row = strong(observation, *args), observation.probe.row
        called = row is not None and row < REPEATED and not observation.probe.is_control
        return evidence if called else replace(evidence, severity_low=1.0)

    monkeypatch.setattr(memwatch.judge.findings, "evidence_of", evidence_of)


def test_controls_are_held_out_and_the_guarded_loader_never_gives_them(pretrained, pipeline, tmp_path):
    loop = RowsLoop(pretrained, tmp_path)
    watch = loop.watch(pipeline, dataset=loop.rows, config=SELDOM)
    reports = loop.run(watch, 30)
    held_out = set(watch.choice.held_out)
    assert len(held_out) == 10
    assert not held_out & set(loop.seen)
    assert set(loop.seen) | held_out == set(range(60))
    assert watch.training_indices == sorted(set(range(60)) - held_out)
    assert len(reports[0].controls) == 10
    assert [f.observation.probe.row for f in reports[0].findings] == [p.row for p in watch.choice.picked]
    assert min(p.row for p in watch.choice.picked) < REPEATED  # the picture that repeats is watched


def test_without_a_dataset_it_is_that_of_the_prepared_loader(pretrained, pipeline, tmp_path):
    loop = RowsLoop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=PICKING)
    assert watch.choice.rows.source is loop.rows
    loop.run(watch, 4)
    assert not set(watch.choice.held_out) & set(loop.seen)


def test_training_is_that_on_the_rows_that_are_left(pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch)
    loop = RowsLoop(pretrained, tmp_path)
    screened = PICKING | {"every_steps": 10, "screen": True, "pick": PICKING["pick"] | {"places": 2, "peers": 2}}
    watch = loop.watch(pipeline, dataset=loop.rows, config=screened)
    loop.run(watch, 30)
    alone = RowsLoop(pretrained)
    leave_out(alone.loader, LeftOut(watch.choice.held_out), alone.rows)
    alone.run(None, 30)
    assert alone.seen == loop.seen
    assert_same(alone.state(), loop.state())


def test_rows_behind_what_is_memorized_are_dropped_and_training_goes_on(pretrained, pipeline, tmp_path, monkeypatch):
    call_repeated(monkeypatch)
    loop = RowsLoop(pretrained, tmp_path)
    watch = loop.watch(pipeline, dataset=loop.rows, config=GOING_ON, every_steps=10)
    seen = {}
    loop.run(watch, 50, each=lambda loop: seen.setdefault(loop.step, len(loop.seen)))
    lines = history(tmp_path)
    assert [line["scalars"].get("memwatch/dropped") for line in lines[:3]] == [None, REPEATED, REPEATED]
    assert (watch.should_stop, watch.exit_code, loop.step) == (False, 0, 50)
    later = loop.seen[seen[10] + 2 :]  # one batch was fetched ahead
    assert set(later) == set(range(REPEATED, 60)) - set(watch.choice.held_out)
    (flagged,) = watch.flagged()
    assert flagged.rows == tuple(range(REPEATED))
    watch.close()
    (written,) = read_flagged(tmp_path / "memwatch" / "flagged.jsonl")
    assert (written.verdict, written.rows) == ("memorized", tuple(range(REPEATED)))


@pytest.mark.parametrize("place", [(0, 6), (1, 0)])
def test_a_resumed_run_drops_the_same_rows_at_the_same_place(place, pretrained, pipeline, tmp_path, monkeypatch):
    from accelerate import skip_first_batches

    call_repeated(monkeypatch)

    def start():
        loop = RowsLoop(pretrained, tmp_path)
        return loop, loop.watch(pipeline, dataset=loop.rows, config=GOING_ON, every_steps=4)

    steps = []

    def save(loop):
        if watch.place == place:
            steps.append(loop.step)
            loop.accelerator.save_state(str(tmp_path / "checkpoint"))

    loop, watch = start()
    loop.run(watch, 32, each=save)
    watch.close()
    unbroken, weights, rows = without_time(history(tmp_path)), loop.state()["weights"], list(loop.seen)
    loop, watch = start()
    loop.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert watch.place == place
    number, given = place
    whole = loop.loader
    loop.step, loop.loader = steps[0], skip_first_batches(whole, given)
    loop.loader.set_epoch(number)
    holder_of_sampler(whole).sampler.set_epoch(number)  # accelerate 1.3 does not reach it below skipped batches
    loop.run(watch, 32, epochs=1)
    if loop.step < 32:
        loop.loader = whole
        whole.set_epoch(number + 1)
        loop.run(watch, 32)
    assert rows[-len(loop.seen) :] == loop.seen
    assert_same(loop.state()["weights"], weights)
    assert_same(without_time(history(tmp_path)), unbroken)


def test_where_the_loader_has_other_rows_it_says_so_and_the_stop_rule_applies(
    pretrained, pipeline, tmp_path, monkeypatch, caplog
):
    call_repeated(monkeypatch)
    loop = RowsLoop(pretrained, tmp_path)
    with caplog.at_level(logging.WARNING, "memwatch"):
        watch = loop.watch(pipeline, dataset=list(loop.rows), config=GOING_ON)
        loop.run(watch, 20)
    said = [message for message in caplog.messages if "not the dataset that memwatch picked from" in message]
    assert len(said) == 2
    assert "10 controls may be trained on" in said[0]
    assert "the rule of stop applies instead" in said[1]
    assert (watch.should_stop, watch.exit_code, loop.step) == (True, 3, 2)


def test_a_subset_by_training_indices_is_fine(pretrained, pipeline, tmp_path, caplog):
    rows = make_rows()
    first = RowsLoop(pretrained, tmp_path / "first", rows)
    indices = first.watch(pipeline, dataset=rows, config=SELDOM).training_indices
    loop = RowsLoop(pretrained, tmp_path / "second", Subset(rows, indices))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "memwatch"):
        watch = loop.watch(pipeline, dataset=rows, config=SELDOM)
        loop.run(watch, 30)
    assert watch.training_indices == indices
    assert set(loop.seen) == set(indices)
    assert not [message for message in caplog.messages if "may be trained on" in message]


def test_a_stop_leaves_clean_weights_and_a_checkpoint(pretrained, pipeline, tmp_path, monkeypatch):
    call_repeated(monkeypatch)
    config = PICKING | {"regions": {"min_factor": 1.000001}, "alerts": {"patience": 2}, "stop": {"checkpoint": True}}
    loop = RowsLoop(pretrained, tmp_path)
    at_start = {name: p.detach().clone() for name, p in loop.bare.named_parameters()}
    watch = loop.watch(pipeline, dataset=loop.rows, config=config)
    loop.run(watch, 20)
    assert (loop.step, watch.exit_code) == (4, 3)
    folder = tmp_path / "memwatch"
    clean = UNet2DConditionModel.from_pretrained(folder / "last_clean" / "unet")
    assert all(torch.equal(p, at_start[name]) for name, p in clean.named_parameters())  # step 2 counted already
    state = json.loads((folder / "stopped" / "memwatch.json").read_text(encoding="utf-8"))
    assert state["stop"]["reason"] == watch.stop_reason
    loop.accelerator.end_training()
    assert (folder / "last_clean").is_dir()


def test_hooks_hear_every_alert_and_one_that_fails_is_counted(pretrained, pipeline, tmp_path, monkeypatch, caplog):
    call_repeated(monkeypatch)
    heard = []

    def broken(alert):
        raise OSError("no route")

    loop = RowsLoop(pretrained, tmp_path)
    config = PICKING | EAGER | {"strict": False, "stop": {"enabled": False}}
    watch = loop.watch(pipeline, dataset=loop.rows, config=config, on_alert=[broken, heard.append])
    loop.run(watch, 6)
    assert [(alert.step, alert.verdict, alert.row in range(REPEATED)) for alert in heard] == [(2, "memorized", True)]
    assert watch.faults.count == 1
    assert any("no route" in message for message in caplog.messages)


def test_a_dataset_that_changes_under_a_resume_is_named_and_training_goes_on(
    pretrained, pipeline, tmp_path, monkeypatch, caplog
):
    call_repeated(monkeypatch)
    loop = RowsLoop(pretrained, tmp_path)
    watch = loop.watch(pipeline, dataset=loop.rows, config=GOING_ON)
    loop.run(watch, 4)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    watch.close()
    loop = RowsLoop(pretrained, tmp_path, make_rows(70))
    watch = loop.watch(pipeline, dataset=loop.rows, config=GOING_ON | {"strict": False})
    with caplog.at_level(logging.WARNING, "memwatch"):
        loop.accelerator.load_state(str(tmp_path / "checkpoint"))
    (said,) = [message for message in caplog.messages if "not the one of the checkpoint" in message]
    assert "10 rows were held out then" in said
    loop.step = 4
    assert [report.step for report in loop.run(watch, 8)] == [6, 8]


@pytest.mark.parametrize("given", [{}, {"dataset": None}])
def test_what_cannot_be_picked_from_is_refused_at_construction(given, pretrained, pipeline, tmp_path):
    loop = RowsLoop(pretrained, tmp_path)
    loop.accelerator._dataloaders.clear()
    with pytest.raises(ConfigError, match="'probes': got 4, allowed: .*there is no dataset to pick them from|dataset"):
        loop.watch(pipeline, config=PICKING, **given)
    with pytest.raises(ProbeError):
        loop.watch(pipeline, config=PICKING, dataset=[{"text": "no image"}])


def test_training_indices_need_a_dataset(pretrained, pipeline, tmp_path):
    loop = RowsLoop(pretrained, tmp_path)
    watch = loop.watch(pipeline, ["a prompt"], config=CONFIG)
    with pytest.raises(ValueError, match="pass dataset= to MemWatch"):
        watch.training_indices  # noqa: B018
