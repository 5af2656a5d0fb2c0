"""The simulated promise: what it draws is what it says, the product judges it, and normal severities keep it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evidence import promise, simulation
from evidence.simulation import SIDE, STORED, Cell, observation, probes_of, simulate
from scipy import stats

from memwatch.config import AlertsConfig
from memwatch.measure.signals import compute_signals

pytestmark = pytest.mark.usefixtures("screened")
LAWS = {"normal": stats.norm(), "t5": stats.t(5, scale=1 / math.sqrt(5 / 3)), "lognormal": stats.lognorm(0.5)}


@pytest.mark.parametrize("tail", simulation.TAILS)
def test_tails_have_unit_variance_and_the_quantiles_that_they_should(tail):
    levels, law = np.array([1e-6, 0.001, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6]), LAWS[tail]
    expected = (law.ppf(levels) - law.mean()) / law.std()
    np.testing.assert_allclose(simulation.shaped(stats.norm.ppf(levels), tail), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_severities_depend_as_they_should(rho):
    cell = Cell(controls=400, probes=99, events=4, autocorrelation=rho)
    x = np.stack(list(simulation.log_factors(cell, np.random.default_rng(0)))) / simulation.SPREAD
    assert x.shape == (4, 2, 500, SIDE, SIDE)
    assert x[:, :, 1:].std() == pytest.approx(1, abs=0.05)
    whole = x.mean((-1, -2))
    assert np.corrcoef(whole[0, :, 1:].ravel(), whole[1, :, 1:].ravel())[0, 1] == pytest.approx(rho, abs=0.1)
    assert np.corrcoef(x[0, 0, 1:, 0, 0], x[0, 0, 1:, 5, 5])[0, 1] == pytest.approx(0.7, abs=0.1)
    inside = x[:, :, 0, : SIDE // 2, : SIDE // 2].mean((-1, -2)) - x[:, :, 0, SIDE // 2 :].mean((-1, -2))
    assert inside[:2] == pytest.approx(np.zeros((2, 2)), abs=1)
    assert inside[2:] == pytest.approx(np.full((2, 2), STORED), abs=1)


def test_an_observation_says_what_was_drawn():
    variance, loss = np.random.default_rng(0).uniform(-0.5, 2.5, (2, SIDE, SIDE))
    seen = observation(probes_of(Cell())[0], variance, loss, curvature=True)
    found = compute_signals([seen], terms="both", against="both", smooth=1)["stored"].decisive
    assert found.mean.numpy() == pytest.approx((variance + loss) / 2, abs=0.003)
    screened = observation(probes_of(Cell())[0], variance, loss, curvature=False)
    assert (screened.has_curvature, screened.now.draws) == (False, 1)


@pytest.mark.parametrize("cell", [Cell(events=6), Cell(controls=11, probes=2, events=6, autocorrelation=1.0)])
def test_normal_severities_keep_the_promise_and_what_is_stored_is_found(cell):
    found = simulate(cell, 5, AlertsConfig())
    assert found == simulate(cell, 5, AlertsConfig())
    assert (found.alarmed, found.contradicted) == (0, 0)
    assert found.found >= 4
    assert 0 < found.measured < 1  # the screen is on, and does not choose always


def test_a_rule_that_promises_more_than_it_can_is_seen():
    rule = AlertsConfig(false_alarms_per_run=0.99, max_p=1.0, patience=1)
    assert simulate(Cell(controls=12, probes=16, events=4, tail="lognormal"), 5, rule).alarmed


def test_the_command_simulates_every_setting_by_the_rule_of_the_config(tmp_path, monkeypatch, capsys):
    assert len(set(simulation.cells())) == 15
    monkeypatch.setattr(promise, "cells", lambda: iter([Cell(11, 1, 2, 0.5), Cell(12, 1, 2, 0.5, "lognormal")]))
    config, file = tmp_path / "mine.yaml", tmp_path / "results" / "promise.md"
    config.write_text("alerts:\n  false_alarms_per_run: 0.2\n", encoding="utf-8")
    assert promise.main(["--runs", "2", "--seed", "3", "--config", str(config), "--output", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert "`promise.py --runs 2 --seed 3`: 2 settings, 2 runs each" in text
    assert "with a probability of 20 % at most" in text
    assert promise.main(["--runs", "1"]) == 0
    assert capsys.readouterr().out.startswith("# The promise, simulated\n")
