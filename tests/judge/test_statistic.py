"""The statistic: profiles, p-values and the budget of a run, by hand, by slow twins and under the null."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from support.observations import measured

import memwatch.judge.findings
from memwatch import Probe
from memwatch.config_file import load_config
from memwatch.judge import statistic
from memwatch.judge.findings import judge_event
from memwatch.judge.regions import MIN_AREA
from memwatch.judge.screen import chosen, with_references
from memwatch.judge.statistic import NUM_SIZES, RESOLUTION, Null, Screened, sizes_of, top_means
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.signals import LOSS_FLOOR, RHO_FLOOR


def null_of(*rows: list[float] | float) -> Null:
    """One control per row; a single number stands for every size."""
    return Null.of([np.broadcast_to(np.asarray(row, dtype=float), NUM_SIZES) for row in rows])


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (3, 5), (16, 12)])
def test_top_means_equal_a_slow_twin(shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = top_means(values)
    pixels = sorted((float(v) for v in values.flatten()), reverse=True)
    assert found == pytest.approx([sum(pixels[:size]) / size for size in sizes_of(values.size)])
    assert (np.diff(found) >= 0).all()  # rising, as sizes fall


def test_no_connected_region_can_beat_the_profile():
    """Whatever is chosen, wherever it lies: the mean of k pixels is at most that of the k' <= k largest."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        values = ndimage.uniform_filter(rng.standard_normal((16, 16)), rng.integers(1, 5))
        labels, count = ndimage.label(values >= np.quantile(values, rng.uniform(0, 0.95)))
        inside = labels == rng.integers(1, count + 1)
        if inside.sum() >= sizes_of(256)[-1]:
            assert values[inside].mean() <= top_means(values)[statistic.size_index(int(inside.sum()), 256)] + 1e-12


def test_no_region_is_smaller_than_the_smallest_size():
    """Fewer pixels than those at which controls are compared would have an advantage."""
    assert all(math.ceil(MIN_AREA * pixels) >= sizes_of(pixels)[-1] for pixels in range(1, 5000))


def test_z_score_and_p_value_by_hand():
    """Twelve controls, half of them 1, half of them 3: mean 2, standard deviation sqrt(12/11)."""
    null = null_of(*[1.0, 3.0] * 6)
    predictive = math.sqrt(12 / 11) * math.sqrt(13 / 12)
    assert null.z_score(2.0, 3) == 0
    assert null.z_score(6.0, 3) == pytest.approx(4 / predictive)
    assert null.p_value(4 / predictive) == pytest.approx(7 * (1 - stats.t(11).cdf(4 / predictive)))
    assert null.p_value(1.0) == 1.0  # seven sizes are paid for, and no chance is above 1
    assert null.p_value(60.0) < 1e-13  # falls below 1 / 13, the smallest rank p-value


def test_p_values_are_valid_under_a_gaussian_null():
    """One control more, compared at every size: P(p <= a) <= a; at one single size P(7 p <= a) is a."""
    rng, runs, n = np.random.default_rng(3), 3000, 15
    best, single = np.empty(runs), np.empty(runs)
    for i in range(runs):
        x = math.sqrt(0.7) * rng.standard_normal((n + 1, 1)) + math.sqrt(0.3) * rng.standard_normal((n + 1, NUM_SIZES))
        null = Null.of(list(x[1:]))
        z_score = [null.z_score(value, size) for size, value in enumerate(x[0])]
        best[i], single[i] = null.p_value(max(z_score)), stats.t.sf(z_score[2], n - 1)
    for level in (0.01, 0.05, 0.2):
        error = 4 * math.sqrt(level * (1 - level) / runs)
        assert (best <= level).mean() <= level + error
        assert (single <= level).mean() == pytest.approx(level, abs=error)
    assert (best <= 0.2).mean() > 0.05  # and not so cautious as to say nothing


def test_rank_p_is_valid_under_any_null():
    """P(p <= a) is a where a is a multiple of 1 / (1 + N), also with a heavy tail."""
    rng, runs = np.random.default_rng(0), 4000
    found = np.array([null_of(*x[1:]).rank_p(x[0], 0) for x in rng.standard_cauchy((runs, 20))])
    for level in (0.05, 0.1, 0.25, 0.5):
        assert (found <= level).mean() == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / runs))


def test_controls_that_are_all_alike_have_a_smallest_spread():
    null = null_of(*[0.25] * 12)
    assert null.z_score(0.25, 0) == 0
    assert null.z_score(0.25 + 3 * RESOLUTION, 0) == pytest.approx(3)
    assert null.p_value(null.z_score(2.25, 0)) < 1e-6


@pytest.mark.parametrize("num_probes", [1, 8])
@pytest.mark.parametrize("planned", [None, 5, 300])
def test_the_p_values_that_a_run_allows_sum_to_its_budget(num_probes, planned):
    """However long it is; a run that lasts twice as long as planned has half of what is left, and so on."""
    budget = {"false_alarms_per_run": 0.05, "num_probes": num_probes, "planned": planned}
    allowed = [num_probes * statistic.largest_p(event, **budget) for event in range(1, 5001)]
    assert 0.05 * 0.9 < sum(allowed) <= 0.05
    assert all(a >= b for a, b in itertools.pairwise(allowed))
    if planned is not None:
        assert sum(allowed[:planned]) == pytest.approx(0.05 / 2)


CONFIG = load_config({"levels": {"timesteps": [301], "draws": 2}, "signals": {"smooth": 1}})
SECOND_DRAW = 1.3  # squared error times that of the first draw, which is all that the screen sees


def observed(probe: Probe, fall: tuple[float, float], *, curvature: bool) -> Observation:
    """A picture whose retained variance and loss were 1 everywhere and have fallen by these log factors."""
    variance, loss = fall
    error = (1 + LOSS_FLOOR) * math.exp(-loss) - LOSS_FLOOR
    draws = torch.tensor([error, SECOND_DRAW * error] if curvature else [error]).sqrt()
    epsilon = draws.reshape(1, -1, 1, 1, 1).expand(1, len(draws), 1, 4, 4)
    now, then = ((1 + RHO_FLOOR) * math.exp(-variance) - RHO_FLOOR, 1.0)
    now, then = (measured(rho).rho if curvature else None for rho in (now, then))
    baseline = Measurement(then, torch.ones_like(epsilon))
    return Observation(probe, (301.0,), Measurement(now, epsilon), baseline=baseline, eps=torch.zeros_like(epsilon))


def mean_of(fall: tuple[float, float], *, curvature: bool) -> float:
    """What such a picture shows all over: of the screen its loss, else both terms over both draws."""
    variance, loss = fall
    error = (1 + SECOND_DRAW) / 2 * ((1 + LOSS_FLOOR) * math.exp(-loss) - LOSS_FLOOR)
    return (variance + math.log((1 + LOSS_FLOOR) / (error + LOSS_FLOOR))) / 2 if curvature else loss


def event(falls, names=None):
    """Everything as it is observed where ``names``, or what the screen chooses, is judged with curvature."""
    screened = {p.name: observed(p, fall, curvature=False) for p, fall in falls.items()}
    names = frozenset(chosen(list(screened.values()), CONFIG) if names is None else names)
    with_curvature = with_references(names, list(falls))
    full = [observed(p, f, curvature=True) if p.name in with_curvature else screened[p.name] for p, f in falls.items()]
    return full, Screened(list(screened.values()), names)


def group(number: int, kind: str, rng) -> dict[Probe, tuple[float, float]]:
    probes = [Probe("", "drawn", name=f"{kind}/{i}", is_control=kind == "control") for i in range(number)]
    return {probe: tuple(rng.normal((1.0, 0.3), 0.1)) for probe in probes}


RNG = np.random.default_rng(0)
FALLS = group(3, "probe", RNG) | group(12, "control", RNG)


def test_both_sides_are_made_of_the_same_terms(monkeypatch):
    """Chosen: both terms, all draws, of everybody. Not chosen: the loss at the screen's draw, of everybody."""
    seen, real = {}, memwatch.judge.findings.judge_probe

    def judge_probe(o, signals, references, *args):
        seen[o.name, o.has_curvature] = signals, references
        return real(o, signals, references, *args)

    monkeypatch.setattr(memwatch.judge.findings, "judge_probe", judge_probe)
    picked = {"probe/1", "control/4"}
    observations, screened = event(FALLS, picked)
    judgement = judge_event(observations, {}, 1, CONFIG, screened=screened)
    assert {f.name for f in judgement.everything if f.observation.has_curvature} == picked
    assert judgement.num_measured == 1 + 12
    for probe, fall in FALLS.items():
        curvature = probe.name in picked
        signals, references = seen[probe.name, curvature]
        assert signals.decisive.mean.numpy() == pytest.approx(mean_of(fall, curvature=curvature), abs=1e-5)
        others = [mean_of(f, curvature=curvature) for p, f in FALLS.items() if p.is_control and p is not probe]
        assert references.controls.profiles[:, 0] == pytest.approx(others, abs=1e-5)


@pytest.mark.parametrize("fall", [(1.0, 0.3), (1.0, 1.2), (2.6, 0.9), (0.0, 0.72)])
def test_a_control_that_is_called_a_probe_gets_the_same_verdict(fall):
    """The same picture among the same others, once as a probe and once as one of the controls."""
    others, verdicts = group(11, "control", np.random.default_rng(1)), []
    for is_control in (False, True):
        picture = Probe("", "drawn", name="it", is_control=is_control)
        another = {Probe("", "drawn", name="another"): (1.0, 0.3)} if is_control else {}
        states = {}
        for step in (1, 2, 3):
            observations, screened = event({picture: fall} | another | others)
            judgement = judge_event(observations, states, step, CONFIG, screened=screened)
            states = judgement.states
        (finding,) = [f for f in judgement.everything if f.name == "it"]
        verdicts.append((finding.evidence, finding.state, finding.observation.has_curvature))
    assert verdicts[0] == verdicts[1]
    assert verdicts[0][0].num_controls == 11
    assert verdicts[0][2] == (fall[1] > 0.7)  # the screen sees the loss alone


def test_what_was_not_chosen_keeps_its_history():
    """It is compared, on the loss; a streak ends, and nothing of it is evidence."""
    states = {}
    for step, names in ((1, ["probe/1"]), (2, []), (3, [])):
        observations, screened = event(FALLS, names)
        judgement = judge_event(observations, states, step, CONFIG, screened=screened)
        states = judgement.states
    state = states["probe/1"]
    assert (state.events, state.last_clean, state.streak) == (3, 3, 0)
    assert [f.evidence.compared for f in judgement.everything] == [True] * 15
    assert not any(f.verdict.is_evidence for f in judgement.everything)
