"""What follows from a training set and from alerts: controls never trained on, hooks, weights to go back to."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.builders import SMALL, assert_same, call_every_change, history, without_time
from support.rows import REPEATED, RowsLoop, make_rows
from torch.utils.data import Subset

import memwatch
import memwatch.judge.findings
from memwatch import ConfigError
from memwatch.act.actions import refuse_other_controls
from memwatch.act.flagged import read_flagged

ROWS = make_rows()  # 60
PICKING = SMALL | {"rotation": {"rows": 0}, "proof": {"enabled": False}}
SELDOM = PICKING | {"every_steps": 24}  # where what is trained on counts
GOING_ON = PICKING | {"stop": {"enabled": False}}


@pytest.fixture(scope="module")
def picked():
    return memwatch.pick(ROWS, probes=2)


def call_repeated(monkeypatch) -> None:
    """Let the probe that stands for the repeated picture be strong and rare, and no other."""
    call_every_change(monkeypatch)
    strong = memwatch.judge.findings.evidence_of

    def evidence_of(compared, *args):
        evidence, probe = strong(compared, *args), compared.observation.probe
        called = probe.row is not None and probe.row < REPEATED and not probe.is_control
        return evidence if called else replace(evidence, p=1.0, any_controls=True)

    monkeypatch.setattr(memwatch.judge.findings, "evidence_of", evidence_of)


# --- what is trained on ----------------------------------------------------------------------------------------------


def test_controls_are_held_out_and_the_guarded_loader_never_gives_them(picked, pretrained, pipeline, tmp_path, caplog):
    loop = RowsLoop(pretrained, tmp_path, picked.train)
    with caplog.at_level(logging.WARNING, "memwatch"):
        watch = loop.watch(pipeline, picked=picked, config=SELDOM)
        reports = loop.run(watch, 24)
    held_out = set(picked.held_out)
    assert len(held_out) == 12
    assert sorted(loop.seen) == sorted(set(range(60)) - held_out)  # one pass
    assert len(reports[0].controls) == 12
    assert [f.observation.probe.row for f in reports[0].findings] == [w.row for w in picked.watched]
    assert min(w.row for w in picked.watched) < REPEATED  # the picture that repeats is watched
    assert not [message for message in caplog.messages if "cannot see" in message]


def test_a_loader_with_held_out_rows_is_refused_before_the_first_step(picked, pretrained, pipeline, tmp_path):
    loop = RowsLoop(pretrained, tmp_path, ROWS)
    watch = loop.watch(pipeline, picked=picked, config=PICKING)
    with pytest.raises(
        ConfigError, match=r"dataloader: it gives 12 rows that are held out .* make it from picked.train"
    ):
        watch.guard(loop.loader)
    loop = RowsLoop(pretrained, tmp_path, Subset(ROWS, [picked.held_out[3], *picked.train_rows]))
    with pytest.raises(ConfigError, match="it gives 1 row that"):
        loop.watch(pipeline, picked=picked, config=PICKING).guard(loop.loader)


# --- alerts ----------------------------------------------------------------------------------------------------------


def test_a_stop_leaves_clean_weights(picked, pretrained, pipeline, tmp_path, monkeypatch):
    call_repeated(monkeypatch)
    loop = RowsLoop(pretrained, tmp_path, picked.train)
    at_start = {name: p.detach().clone() for name, p in loop.bare.named_parameters()}
    watch = loop.watch(pipeline, picked=picked, config=PICKING)
    loop.run(watch, 20)
    assert (loop.step, watch.exit_code) == (2, 3)
    folder = tmp_path / "memwatch"
    clean = UNet2DConditionModel.from_pretrained(folder / "last_clean" / "step_0000000" / "unet")
    assert all(torch.equal(p, at_start[name]) for name, p in clean.named_parameters())
    loop.accelerator.end_training()
    assert (folder / "last_clean").is_dir()


def test_hooks_hear_every_alert_and_one_that_fails_is_counted(
    picked, pretrained, pipeline, tmp_path, monkeypatch, caplog
):
    call_repeated(monkeypatch)
    heard = []

    def broken(alert):
        raise OSError("no route")

    loop = RowsLoop(pretrained, tmp_path, picked.train)
    watch = loop.watch(pipeline, picked=picked, config=GOING_ON, strict=False, on_alert=[broken, heard.append])
    loop.run(watch, 6)
    assert [(alert.step, alert.verdict, alert.row in range(REPEATED)) for alert in heard] == [(2, "memorized", True)]
    assert watch.faults.count == 1
    assert any("no route" in message and "on_alert" in message for message in caplog.messages)
    (flagged,) = read_flagged(tmp_path / "memwatch" / "flagged.jsonl")
    assert [flagged] == watch.flagged()
    assert (flagged.verdict, flagged.rows) == ("memorized", tuple(range(REPEATED)))
    assert flagged.exposures == pytest.approx(12 * REPEATED / 48)


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(picked, pretrained, pipeline, tmp_path, monkeypatch):
    """A new process that trains on what was picked."""
    call_repeated(monkeypatch)

    def begin(picked=picked, **options):
        loop = RowsLoop(pretrained, tmp_path, picked.train)
        return loop, loop.watch(pipeline, picked=picked, config=GOING_ON, **options)

    return begin


def test_a_run_that_is_resumed_on_the_same_pick_goes_on(picked, start, tmp_path):
    def save(loop):
        if loop.step == 24:  # between two passes
            loop.accelerator.save_state(str(tmp_path / "checkpoint"))

    loop, watch = start(every_steps=8)
    loop.run(watch, 40, each=save)
    watch.close()
    unbroken, weights, rows = without_time(history(tmp_path)), loop.state()["weights"], list(loop.seen)
    state = json.loads((tmp_path / "checkpoint" / "memwatch.json").read_text(encoding="utf-8"))
    assert state["actions"]["controls"] == picked.control_keys
    again = memwatch.pick(ROWS, probes=2)  # as the next process does
    loop, watch = start(again, every_steps=8)
    loop.accelerator.load_state(str(tmp_path / "checkpoint"))
    loop.step = 24
    loop.loader.set_epoch(1)
    loop.run(watch, 40, epochs=1)
    assert rows[-len(loop.seen) :] == loop.seen
    assert_same(loop.state()["weights"], weights)
    assert_same(without_time(history(tmp_path)), unbroken)


def test_which_controls_are_other_ones():
    then = {"a": "1", "b": "2"}
    refuse_other_controls({"a": "1"}, then)
    refuse_other_controls({"renamed": "2"}, then)  # by what it shows
    refuse_other_controls({}, then)
    refuse_other_controls({"a": "1"}, None)  # an older version's checkpoint does not say
    with pytest.raises(ConfigError, match=r"controls: 1 of 2 controls \(b\) were not held out"):
        refuse_other_controls({"a": "1", "b": "3"}, then)
