"""Baselines: which earlier event is chosen, what is kept of each, and what a resume finds again."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.builders import assert_same, picture

from memwatch import Probe
from memwatch.config import SignalsConfig
from memwatch.faults import Faults
from memwatch.measure.baselines import Baselines, choose_baseline
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.snapshots import SnapshotStore

SHOWN, DRAWN = Probe("a cat", picture(0), name="shown"), Probe("a cat", name="drawn")


@pytest.mark.parametrize(
    ("baseline", "steps", "last_clean", "expected"),
    [
        ("first", [], None, None),
        ("last_clean", [], 10, None),
        ("first", [5, 10, 20], None, 5),
        ("previous", [0, 10, 20], None, 20),
        ("lag:2", [0, 10, 20], None, 10),
        ("lag:4", [0, 10, 20], None, 0),  # beyond the start: the first one stands in
        ("last_clean", [0, 10, 20], 10, 10),
        ("last_clean", [0, 10, 20], None, 0),  # there was none
        ("last_clean", [0, 20, 30], 10, 0),  # it is no longer kept
        ("base", [0, 10], 10, None),
        ("path:a.safetensors", [0, 10], 10, None),
    ],
)
def test_choose_baseline(baseline, steps, last_clean, expected):
    assert choose_baseline(SignalsConfig(baseline=baseline), steps, last_clean) == expected


def measured(value: float) -> Measurement:
    return Measurement(CurvatureMap(torch.full((1, 2, 2, 2), value)), torch.full((1, 1, 4, 2, 2), value))


def observed(probe: Probe, value: float) -> Observation:
    return Observation(probe, (61.0,), measured(value))


@pytest.fixture
def baselines_of(tmp_path):
    """Makes baselines whose files lie in the test's folder."""

    def make(baseline: str = "first", run: str = "r", fixed=dict, **fingerprints: str) -> Baselines:
        stores = SnapshotStore(tmp_path / "ledger", 4), SnapshotStore(tmp_path / "snapshots", 4)
        baselines = Baselines(SignalsConfig(baseline=baseline), *stores, fixed, fingerprints)
        baselines.run = run
        return baselines

    return make


def weights(value: float):
    return lambda: {"w": torch.tensor([value])}


def test_reference_probes_come_from_the_ledger_and_prompt_probes_from_weights(baselines_of):
    baselines = baselines_of("previous")
    assert baselines.step_of(SHOWN, None) is baselines.step_of(DRAWN, None) is None
    assert baselines.recall(SHOWN, None) == [None, None]
    faults = Faults(strict=True)
    baselines.remember(0, [observed(SHOWN, 0.0), observed(DRAWN, 0.5)], weights(7.0), faults)
    baselines.remember(10, [observed(SHOWN, 1.0)], weights(8.0), faults)
    assert (baselines.step_of(SHOWN, None), baselines.step_of(DRAWN, None)) == (10, 0)
    assert_same(baselines.recall(SHOWN, 0)[0].epsilon, measured(0.0).epsilon)
    assert_same(baselines.recall(SHOWN, 10)[0].rho.samples, measured(1.0).rho.samples)
    assert baselines.recall(DRAWN, 0) == [None, None]  # its noisy latents have moved: the model must be looked at again
    assert float(baselines.weights_at(0)["w"]) == 7
    assert baselines.weights.steps == [0]  # no prompt probe, no weights


def test_what_is_not_finite_becomes_no_baseline(baselines_of):
    baselines, faults = baselines_of(), Faults(strict=True)
    baselines.remember(0, [observed(SHOWN, math.nan), observed(DRAWN, math.inf)], weights(7.0), faults)
    assert baselines.ledger.steps == baselines.weights.steps == []
    both = replace(observed(SHOWN, 2.0), unconditional=measured(0.5))
    bad = replace(observed(replace(SHOWN, name="bad"), 1.0), unconditional=measured(math.nan))
    baselines.remember(2, [both, bad], weights(7.0), faults)
    assert baselines.step_of(SHOWN, None) == 2  # its first finite measurement is its baseline
    assert_same(baselines.recall(SHOWN, 2)[1].epsilon, measured(0.5).epsilon)
    assert baselines.recall(bad.probe, 2)[0] is not None
    assert baselines.recall(bad.probe, 2)[1] is None  # the unconditional branch alone was not finite


def test_a_resumed_run_finds_its_baselines_or_says_that_some_are_gone(baselines_of, tmp_path):
    baselines = baselines_of("previous")
    for step in (0, 10):
        both = [observed(SHOWN, step / 10), observed(DRAWN, 0.5)]
        baselines.remember(step, both, weights(step), Faults(strict=True))
    state = baselines.state_dict()
    assert state == {"ledger": [0, 10], "weights": [0, 10]}
    again = baselines_of("previous")
    assert again.load_state_dict(state)
    assert_same(again.recall(SHOWN, again.step_of(SHOWN, None))[0].epsilon, measured(1.0).epsilon)
    assert float(again.weights_at(again.step_of(DRAWN, None))["w"]) == 10
    (tmp_path / "snapshots" / "step_0000010.safetensors").unlink()
    third = baselines_of("previous")
    assert not third.load_state_dict(state)
    assert (third.step_of(SHOWN, None), third.step_of(DRAWN, None)) == (10, 0)


@pytest.mark.parametrize(
    ("run", "shown", "drawn", "expected"),
    [
        ("r", "a", "b", (0, 0)),
        ("r", "other settings", "b", (None, 0)),
        ("r", "a", "another prompt", (0, None)),
        ("another run", "a", "b", (None, None)),
    ],
)
def test_only_what_was_kept_under_the_same_fingerprint_is_compared(run, shown, drawn, expected, baselines_of):
    before, faults = baselines_of(shown="a", drawn="b"), Faults(strict=True)
    before.remember(0, [observed(SHOWN, 0.25), observed(DRAWN, 0.5)], weights(7.0), faults)
    after = baselines_of(run=run, shown=shown, drawn=drawn)
    assert after.load_state_dict(before.state_dict())  # everything is there; whether it fits is another question
    assert (after.step_of(SHOWN, None), after.step_of(DRAWN, None)) == expected
    strangers = [probe.name for probe, step in zip((SHOWN, DRAWN), expected, strict=True) if step is None]
    assert after.without_earlier([SHOWN, DRAWN]) == strangers
    after.remember(10, [observed(SHOWN, 1.0), observed(DRAWN, 1.0)], weights(8.0), faults)
    fresh = tuple(10 if step is None else step for step in expected)
    assert (after.step_of(SHOWN, None), after.step_of(DRAWN, None)) == fresh
    assert set(after.weights_at(0)) == {"w"}  # no mark among the weights
