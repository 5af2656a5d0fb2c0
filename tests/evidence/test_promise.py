"""The simulated promise: it draws what it says, judges as the product does, and normal severities keep it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from evidence import promise, simulation
from evidence.simulation import OTHERS, SIDE, SPREAD, STORED, Cell, grid, judged, lasting, maps_of, simulate
from scipy import stats
from support.observations import GREY

from memwatch import Probe
from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.judge.statistic import p_value, threshold
from memwatch.judge.verdict import MIN_SEVERITY, Verdict
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.signals import RHO_FLOOR

LAWS = {"normal": stats.norm(), "t5": stats.t(5, scale=1 / math.sqrt(5 / 3)), "lognormal": stats.lognorm(0.5)}
SMALL = Cell(controls=14, probes=3, events=6)


@pytest.mark.parametrize("tail", simulation.TAILS)
def test_tails_have_unit_variance_and_the_quantiles_that_they_should(tail):
    levels, law = np.array([1e-6, 0.001, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6]), LAWS[tail]
    expected = (law.ppf(levels) - law.mean()) / law.std()
    np.testing.assert_allclose(simulation.shaped(stats.norm.ppf(levels), tail), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_severities_depend_as_they_should(rho):
    cell = Cell(controls=40, probes=8, events=4, autocorrelation=rho)
    x = np.stack(list(maps_of(cell, 100, np.random.default_rng(0)))) / SPREAD
    assert x.shape == (4, 100, 50, SIDE, SIDE)
    assert x[:, :, 10:].std() == pytest.approx(1, abs=0.02)
    assert np.corrcoef(x[0, :, 10:].mean((-1, -2)).ravel(), x[1, :, 10:].mean((-1, -2)).ravel())[0, 1] == pytest.approx(
        rho, abs=0.1
    )
    near, far = (np.corrcoef(x[0, :, 10:, 0, 0].ravel(), x[0, :, 10:, *at].ravel())[0, 1] for at in ((0, 1), (4, 4)))
    assert (near > 0.85, far) == (True, pytest.approx(0.7, abs=0.05))  # smooth
    stored = x[:, :, 8:10, : SIDE // 2, : SIDE // 2].mean((1, -1, -2)) - x[:, :, 8:10, SIDE // 2 :].mean((1, -1, -2))
    assert stored == pytest.approx(np.array([(0, 0), (0, 0), STORED, STORED]), abs=0.3)


@pytest.mark.parametrize("other", OTHERS)
def test_other_severities_differ(other):
    usual, changed = (
        np.stack(list(maps_of(cell, 20, np.random.default_rng(0)))) for cell in (SMALL, replace(SMALL, other=other))
    )
    inside = np.isclose(usual, changed).mean((0, 1, 2))
    assert (inside == 1).mean() == (1 - 4 / SIDE**2 if other == "spot" else 0)


def seen(probe: Probe, log_factors: np.ndarray) -> Observation:
    """A picture whose retained variance was 1 everywhere and has fallen by this map."""
    rho = (1 + RHO_FLOOR) * torch.from_numpy(np.exp(-log_factors.astype(np.float64))) - RHO_FLOOR
    now, then = (CurvatureMap(r.expand(1, 2, SIDE, SIDE).clone()) for r in (rho, torch.ones(SIDE, SIDE).double()))
    noise = torch.zeros(1, 2, 1, SIDE, SIDE)
    return Observation(probe, (301.0,), Measurement(now, noise), baseline=Measurement(then, noise), eps=noise)


def test_the_simulation_judges_as_the_product_does():
    """The same maps, event by event: T, and what is called."""
    config = load_config({"signals": {"terms": "variance", "smooth": 1}, "levels": {"timesteps": [301], "draws": 2}})
    names = [f"probe/{i}" for i in range(SMALL.probes + len(STORED))]
    probes = [Probe("", GREY, name=name) for name in names]
    probes += [Probe("", GREY, name=f"control/{i}", is_control=True) for i in range(SMALL.controls)]
    events, looks = list(maps_of(SMALL, 2, np.random.default_rng(1))), SMALL.probes * SMALL.events
    score, judgement, verdicts = np.stack(list(judged(iter(events), SMALL))), judge_event([], {}, 0, config), set()
    p = p_value(lasting(score), SMALL.controls)
    for step, maps in enumerate(events):
        observations = [seen(probe, picture) for probe, picture in zip(probes, maps[1], strict=True)]
        judgement = judge_event(observations, judgement.states, step, config, looks)
        found = [f.evidence for f in judgement.findings]
        assert [e.z_score for e in found] == pytest.approx(list(score[step, 1]), rel=1e-3, abs=1e-3)
        assert [e.lasting_p for e in found] == pytest.approx(list(p[step, 1]), rel=0.02)
        is_called = [f.verdict is Verdict.MEMORIZED for f in judgement.findings]
        is_large = np.array([e.severity >= MIN_SEVERITY for e in found])
        assert is_called == list((p[step, 1] <= threshold(0.05, looks)) & is_large)
        verdicts |= set(is_called)
    assert verdicts == {True, False}


@pytest.mark.parametrize("cell", [Cell(events=6), Cell(controls=11, probes=2, events=6, autocorrelation=1.0)])
def test_normal_severities_keep_the_promise_and_what_is_stored_is_found(cell):
    found = simulate(cell, 40, 0.05)
    assert found == simulate(cell, 40, 0.05)
    assert found.keeps(0.05)
    assert found.rule.found[0] >= 30
    assert found.rule.found[0] >= found.rule.found[1]
    assert 0 <= found.rule.delay < 3


def test_the_mean_of_three_events_halves_the_false_alarms_of_skewed_severities():
    found = simulate(Cell(tail="lognormal", autocorrelation=0.5), 60, 0.05)
    assert 0 < found.rule.alarmed <= found.at_once.alarmed / 2


def test_the_command_simulates_every_setting_by_the_rule_of_the_config(tmp_path, monkeypatch, capsys):
    assert len(set(grid())) == 144
    assert len(set(promise.cells())) == 3 * 144 + 2
    few = [Cell(11, 1, 2, 0.5), Cell(12, 1, 2, 0.5, "lognormal"), Cell(tail="t5", events=2, other="spot")]
    monkeypatch.setattr(promise, "cells", lambda: few)
    config, file = tmp_path / "mine.yaml", tmp_path / "results" / "promise.md"
    config.write_text("alerts:\n  false_alarms_per_run: 0.2\n", encoding="utf-8")
    assert promise.main(["--runs", "2", "--seed", "3", "--config", str(config), "--output", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert "`promise.py --runs 2 --seed 3`: 3 settings, 2 runs each" in text
    assert "with a probability of 20 % at most" in text
    assert promise.main(["--runs", "1"]) == 0
    assert capsys.readouterr().out.startswith("# The promise, simulated\n")
