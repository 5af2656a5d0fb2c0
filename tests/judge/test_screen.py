"""Whose curvature is measured: one rule for probes and controls."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.observations import GREY

from memwatch import Probe
from memwatch.config import MemWatchConfig
from memwatch.judge.screen import MIN_FACTOR, MIN_Z_SCORE, chosen, with_references
from memwatch.judge.statistic import p_value
from memwatch.measure.measurement import Measurement, Observation

SIDE = 8


def screened(name: str, loss: float = 1.0, *, corner: int = 4, earlier: bool = True, **kind: bool) -> Observation:
    """A probe whose squared error was 1 everywhere, and is now ``loss`` in one corner."""
    errors = torch.ones(1, 2, 4, SIDE, SIDE)
    errors[..., :corner, :corner] = math.sqrt(loss)
    baseline = Measurement(None, torch.ones_like(errors)) if earlier else None
    probe, noise = Probe("a photo", GREY, name=name, **kind), torch.zeros_like(errors)
    return Observation(probe, (301.0,), now=Measurement(None, errors), baseline=baseline, baseline_step=0, eps=noise)


def controls(num: int, seed: int = 0, spread: float = 0.3) -> list[Observation]:
    factors = np.exp(spread * np.random.default_rng(seed).standard_normal(num))
    return [screened(f"control/{i}", 1 / f, is_control=True) for i, f in enumerate(factors)]


def test_probes_and_controls_that_exceed_the_controls_are_chosen():
    probes = [screened("stored", 1 / 3), screened("same"), screened("broken", math.nan), screened("new", earlier=False)]
    odd = screened("control/odd", 1 / 3, is_control=True)
    names = {o.name for o in (*probes, odd)}
    assert chosen([*probes, odd, *controls(40)], MemWatchConfig()) & names == {"stored", "control/odd"}


@pytest.mark.parametrize(("number", "loss", "found"), [(10, 1 / 2, 26), (10, 1 / 1.1, 0), (11, 1 / 2, 0)])
def test_a_common_fall_chooses_all_or_none(number, loss, found):
    """Ten controls are too few for probes and for each other, and a factor decides; eleven are enough for both."""
    probes = [screened(f"probe/{i}", loss, corner=SIDE) for i in range(16)]
    alike = [screened(f"control/{i}", loss, corner=SIDE, is_control=True) for i in range(number)]
    assert ((2 / (1 + loss)) > MIN_FACTOR) is (loss < 1 / 1.1)  # the floor is the controls' own loss before training, 1
    assert len(chosen([*probes, *alike], MemWatchConfig())) == found


def test_what_is_chosen_is_measured_with_what_it_is_judged_by():
    image, prompt = Probe("a", GREY, name="image"), Probe("a", name="prompt")
    held_out = [replace(p, name=f"control/{p.name}", is_control=True) for p in (image, prompt)]
    probes = [image, prompt, *held_out]
    assert with_references({"image"}, probes) == {"image", "control/image"}
    assert with_references({"prompt"}, probes) == {"prompt", "control/prompt"}
    assert with_references({"control/image"}, probes) == {"control/image"}  # and all others of its kind
    assert with_references(set(), probes) == set()


def test_controls_are_chosen_as_often_as_probes_of_which_nothing_is_stored():
    counts = {"probe": 0, "control": 0}
    for seed in range(60):
        first, *others = controls(22, seed)
        probe = screened("probe", float(first.now.epsilon[0, 0, 0, 0, 0]) ** 2)
        found = chosen([probe, *others], MemWatchConfig())
        counts["probe"] += "probe" in found
        counts["control"] += sum(name.startswith("control/") for name in found)
    share = counts["control"] / (60 * 21)
    assert 0.002 < share < 0.04  # a predictive t beyond MIN_Z_SCORE, at one of a few sizes that move together
    assert abs(counts["probe"] / 60 - share) < 3 * math.sqrt(share * (1 - share) / 60)


def test_whatever_could_be_called_by_its_loss_is_chosen():
    """An alert takes more than the screen does, with any number of controls."""
    for number in (11, 20, 100, 10_000):
        assert p_value(np.array(MIN_Z_SCORE), number) > MemWatchConfig().alerts.max_p
