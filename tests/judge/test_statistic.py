"""The statistic: profiles, T, tails and the threshold of a run, by hand, by slow twins and under the null."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from support.observations import measured

from memwatch import Probe
from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.judge.screen import chosen, with_references
from memwatch.judge.statistic import (
    NUM_SIZES,
    PRIOR_DF,
    RESOLUTION,
    Screened,
    called_from,
    compare,
    leave_one_out,
    p_value,
    scores,
    sizes_of,
    spread_of,
    threshold,
    top_means,
)
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.regions import MIN_AREA
from memwatch.measure.signals import LOSS_FLOOR

RNG = np.random.default_rng(0)


# --- T ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (3, 5), (16, 12)])
def test_top_means_equal_a_slow_twin(shape):
    values = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    for found, one in zip(top_means(values), values, strict=True):
        pixels = sorted((float(v) for v in one.flatten()), reverse=True)
        assert found == pytest.approx([sum(pixels[:size]) / size for size in sizes_of(one.size)])
        assert (np.diff(found) >= 0).all()  # rising, as sizes fall


def test_no_connected_region_can_beat_the_profile():
    """Whatever is chosen, wherever it lies: the mean of k pixels is at most that of the k' <= k largest."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        values = ndimage.uniform_filter(rng.standard_normal((16, 16)), rng.integers(1, 5))
        labels, count = ndimage.label(values >= np.quantile(values, rng.uniform(0, 0.95)))
        inside = labels == rng.integers(1, count + 1)
        if inside.sum() >= sizes_of(256)[-1]:
            size = next(i for i, size in enumerate(sizes_of(256)) if size <= inside.sum())
            assert values[inside].mean() <= top_means(values)[size] + 1e-12


def test_no_region_is_smaller_than_the_smallest_size():
    """Fewer pixels than those at which controls are compared would have an advantage."""
    assert all(math.ceil(MIN_AREA * pixels) >= sizes_of(pixels)[-1] for pixels in range(1, 5000))


def test_scores_equal_a_slow_twin():
    probes, controls = RNG.lognormal(0, 1, (2, 3, NUM_SIZES)), RNG.lognormal(0, 1, (2, 15, NUM_SIZES))
    for run in range(2):
        variance = controls[run].var(0, ddof=1)
        moderated = (PRIOR_DF * variance.mean() + 14 * variance) / (PRIOR_DF + 14)
        spread = np.sqrt(moderated * (1 + 1 / 15))
        expected = [max((probe - controls[run].mean(0)) / spread) for probe in probes[run]]
        assert scores(probes, controls)[run] == pytest.approx(expected)


def test_a_control_scores_as_a_probe_among_the_others():
    controls = RNG.lognormal(0, 1, (2, 12, NUM_SIZES))
    for run in range(2):
        alone = [scores(controls[run][[i]], np.delete(controls[run], i, 0))[0] for i in range(12)]
        assert leave_one_out(controls)[run] == pytest.approx(alone)


def test_controls_that_are_all_alike_have_a_smallest_spread():
    alike = np.full((12, NUM_SIZES), 0.25)
    assert scores(alike[:1] + 3 * RESOLUTION, alike) == pytest.approx([3])
    assert leave_one_out(alike) == pytest.approx(np.zeros(12))
    assert spread_of(alike.var(0, ddof=1), 12) == pytest.approx(np.full(NUM_SIZES, RESOLUTION))


# --- p ---------------------------------------------------------------------------------------------------------------


def test_p_value_by_hand():
    assert p_value(np.array([4.0]), 12) == pytest.approx([7 * (1 - stats.t(11).cdf(4.0))])
    assert p_value(np.array([1.0]), 12) == 1.0  # seven sizes are paid for, and no chance is above 1
    assert p_value(np.array([60.0]), 12) < 1e-13  # falls below 1 / 13, the smallest rank p-value


def test_p_values_are_valid_under_a_gaussian_null():
    """One control more, compared at every size: P(p <= a) <= a, and not so cautious as to say nothing."""
    rng, runs, n = np.random.default_rng(3), 4000, 15
    x = math.sqrt(0.7) * rng.standard_normal((runs, n + 1, 1))
    x = x + math.sqrt(0.3) * rng.standard_normal((runs, n + 1, NUM_SIZES))
    found = p_value(scores(x[:, :1], x[:, 1:]), n)
    for level in (0.01, 0.05, 0.2):
        assert (found <= level).mean() <= level + 4 * math.sqrt(level * (1 - level) / runs)
    assert (found <= 0.2).mean() > 0.05


def test_the_score_from_which_a_probe_is_called_has_the_p_value_of_the_run():
    p = threshold(0.05, 8 * 20)
    assert p == 0.05 / 160
    assert p_value(np.array([called_from(p, 20)]), 20) == pytest.approx([p])


# --- who is compared with whom ---------------------------------------------------------------------------------------

CONFIG = load_config({"levels": {"timesteps": [301], "draws": 2}, "signals": {"smooth": 1}})
SECOND_DRAW = 1.3  # squared error times that of the first draw, which is all that the screen sees


def observed(probe: Probe, fall: float, *, curvature: bool) -> Observation:
    """A picture whose loss was 1 everywhere and has fallen by this log factor at the first draw."""
    error = (1 + LOSS_FLOOR) * math.exp(-fall) - LOSS_FLOOR
    draws = torch.tensor([error, SECOND_DRAW * error] if curvature else [error]).sqrt()
    epsilon = draws.reshape(1, -1, 1, 1, 1).expand(1, len(draws), 1, 4, 4)
    now, then = (measured(rho).rho if curvature else None for rho in (0.5, 1.0))
    baseline = Measurement(then, torch.ones_like(epsilon))
    return Observation(probe, (301.0,), Measurement(now, epsilon), baseline=baseline, eps=torch.zeros_like(epsilon))


def mean_of(fall: float, *, curvature: bool) -> float:
    """What such a picture shows all over: the loss of one draw or, measured with curvature, of both."""
    error = (1 + SECOND_DRAW) / 2 * ((1 + LOSS_FLOOR) * math.exp(-fall) - LOSS_FLOOR)
    return math.log((1 + LOSS_FLOOR) / (error + LOSS_FLOOR)) if curvature else fall


def event(falls, names=None):
    """Everything as it is observed where ``names``, or what the screen chooses, is judged with curvature."""
    screened = {p.name: observed(p, fall, curvature=False) for p, fall in falls.items()}
    names = frozenset(chosen(list(screened.values()), CONFIG) if names is None else names)
    with_curvature = with_references(names, list(falls))
    full = [observed(p, f, curvature=True) if p.name in with_curvature else screened[p.name] for p, f in falls.items()]
    return full, Screened(list(screened.values()), names)


def group(number: int, kind: str, rng) -> dict[Probe, float]:
    probes = [Probe("", "drawn", name=f"{kind}/{i}", is_control=kind == "control") for i in range(number)]
    return {probe: float(rng.normal(0.3, 0.1)) for probe in probes}


FALLS = group(3, "probe", np.random.default_rng(0)) | group(12, "control", np.random.default_rng(1))


def test_both_sides_are_made_of_the_same_draws():
    """Chosen: all draws, of everybody. Not chosen: the screen's draw, of everybody."""
    picked = {"probe/1", "control/4"}
    observations, screened = event(FALLS, picked)
    judgement = judge_event(observations, {}, 1, CONFIG, screened=screened)
    assert {f.name for f in judgement.everything if f.observation.has_curvature} == picked
    assert judgement.num_measured == 1 + 12
    for f in judgement.everything:
        curvature, probe = f.name in picked, f.observation.probe
        own, decisive = mean_of(FALLS[probe], curvature=curvature), f.signals.decisive.mean.numpy()
        assert decisive == pytest.approx(own, abs=1e-5)
        others = [mean_of(x, curvature=curvature) for p, x in FALLS.items() if p.is_control and p is not probe]
        assert f.evidence.num_controls == len(others) == 12 - probe.is_control
        expected = scores(np.full((1, NUM_SIZES), own), np.repeat(np.array(others)[:, None], NUM_SIZES, 1))
        assert f.evidence.z_score == pytest.approx(expected[0], abs=1e-3)
    # each control by all draws, which were measured of all of them, and not by the screen's
    full = compare([o for o in observations if o.has_curvature], CONFIG.signals)
    by_all_draws = {o.name: full[o.name].score for o in observations if o.probe.is_control}
    assert {name: judgement.states[name].highest for name in by_all_draws} == pytest.approx(by_all_draws, abs=1e-3)
    observations, screened = event(FALLS, set())
    by_one_draw = judge_event(observations, {}, 1, CONFIG, screened=screened).states
    assert all(by_one_draw[name].highest != score for name, score in by_all_draws.items())


@pytest.mark.parametrize("fall", [0.3, 0.6, 0.64, 0.68])
def test_a_control_that_is_called_a_probe_gets_the_same_verdict(fall):
    """The same picture among the same others, once as a probe and once as one of the controls."""
    others, seen = group(11, "control", np.random.default_rng(1)), []
    for is_control in (False, True):
        picture = Probe("", "drawn", name="it", is_control=is_control)
        another = {Probe("", "drawn", name="another"): 0.3} if is_control else {}
        states = {}
        for step in (1, 2, 3):
            observations, screened = event({picture: fall} | another | others)
            judgement = judge_event(observations, states, step, CONFIG, screened=screened)
            states = judgement.states
        (finding,) = [f for f in judgement.everything if f.name == "it"]
        seen.append((finding.evidence, replace(finding.state, highest=None), finding.observation.has_curvature))
    (probe, *as_probe), (control, *as_control) = seen
    assert as_control == [replace(as_probe[0], scores=pytest.approx(as_probe[0].scores)), as_probe[1]]
    numbers = {key: pytest.approx(getattr(probe, key), rel=1e-4) for key in ("z_score", "p", "lasting_p", "severity")}
    assert control == replace(probe, **numbers)
    assert probe.num_controls == 11
    assert as_probe[1] == (probe.z_score > 2.5)  # what the screen sees stands out


def test_what_was_not_chosen_is_judged_by_its_loss():
    """It is compared, and nothing of it is evidence."""
    judgement = judge_event([], {}, 0, CONFIG)
    for step, names in ((1, ["probe/1"]), (2, []), (3, [])):
        observations, screened = event(FALLS, names)
        judgement = judge_event(observations, judgement.states, step, CONFIG, screened=screened)
    assert (judgement.states["probe/1"].last_clean, judgement.states["probe/1"].since) == (3, None)
    assert sum(state.highest is not None for state in judgement.states.values()) == 12
    assert [f.evidence.compared for f in judgement.everything] == [True] * 15
    assert not any(f.verdict.is_evidence for f in judgement.everything)
