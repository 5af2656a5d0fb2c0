"""The simulated promise: what it draws is what it says, the product judges it, and normal severities keep it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from evidence import promise
from evidence.old.promise_page import KEPT, page, percent
from evidence.promise import (
    FALLS,
    SIDE,
    SPREAD,
    STORED,
    TAILS,
    Cell,
    Outcome,
    cells,
    config_of,
    log_factors,
    observation,
    probes_of,
    shaped,
    simulate,
)
from scipy import stats

from memwatch.config import AlertsConfig
from memwatch.measure.signals import compute_signals

# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
def test_shapes_have_unit_variance_and_the_quantiles_that_they_should(tail):
    levels = np.array([1e-6, 0.001, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6])
    law = {
        "normal": stats.norm(),
        "t5": stats.t(5, scale=1 / math.sqrt(5 / 3)),
        "lognormal": stats.lognorm(0.5),
    }[tail]
    expected = law.ppf(levels)
    if tail == "lognormal":
        expected = (expected - law.mean()) / law.std()
    np.testing.assert_allclose(shaped(stats.norm.ppf(levels), tail), expected, rtol=1e-3, atol=1e-9)
    drawn = shaped(np.random.default_rng(0).standard_normal(400_000), tail)
    assert (drawn.mean(), drawn.std()) == pytest.approx((0, 1), abs=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_severities_depend_as_they_should(rho):
    cell = Cell(controls=400, probes=99, events=4, autocorrelation=rho)
    x = np.stack(list(log_factors(cell, np.random.default_rng(0)))) / SPREAD
    assert x.shape == (4, 2, 500, SIDE, SIDE)
    assert x[:, :, 1:].std() == pytest.approx(1, abs=0.05)
    whole = x.mean((-1, -2))
    assert np.corrcoef(whole[0, :, 1:].ravel(), whole[1, :, 1:].ravel())[0, 1] == pytest.approx(rho, abs=0.1)
    assert np.corrcoef(whole[0, :, 1:].ravel(), whole[3, :, 1:].ravel())[0, 1] == pytest.approx(rho**3, abs=0.1)
    assert np.corrcoef(x[0, 0, 1:, 0, 0], x[0, 0, 1:, 5, 5])[0, 1] == pytest.approx(0.7, abs=0.1)
    assert np.corrcoef(whole[0, 0], whole[0, 1])[0, 1] == pytest.approx(0, abs=0.15)  # variance and loss
    inside = x[:, :, 0, : SIDE // 2, : SIDE // 2].mean((-1, -2)) - x[:, :, 0, SIDE // 2 :].mean((-1, -2))
    assert inside[:2] == pytest.approx(np.zeros((2, 2)), abs=1)
    assert inside[2:] == pytest.approx(np.full((2, 2), STORED), abs=1)


def test_falls_are_common_and_end_with_the_run():
    cell = Cell(controls=400, probes=99, events=4, fall="variance")
    means = np.stack([x[:, 1:].mean((1, 2, 3)) for x in log_factors(cell, np.random.default_rng(0))])
    shares = np.arange(1, 5)[:, None] / 4
    assert means == pytest.approx(shares * FALLS["variance"], abs=0.03)


@pytest.mark.parametrize("curvature", [True, False])
def test_an_observation_says_what_was_drawn(curvature):
    variance, loss = np.random.default_rng(0).uniform(-0.5, 2.5, (2, SIDE, SIDE))
    seen = observation(probes_of(Cell())[0], variance, loss, curvature=curvature)
    assert (seen.has_curvature, seen.now.draws) == (curvature, 2 if curvature else 1)
    options = {"against": "both", "combine": "adjacent_min", "smooth": 1}
    terms = {t: compute_signals([seen], terms=t, **options)["stored"].decisive for t in ("variance", "loss", "both")}
    expected = {"variance": variance, "loss": loss, "both": (variance + loss) / 2}
    if not curvature:
        assert (terms.pop("variance"), terms.pop("both")) == (None, None)  # nothing stands in for what is not there
    for name, found in terms.items():
        assert found.mean.numpy() == pytest.approx(expected[name], abs=0.003)


def test_the_shipped_settings_but_for_the_smallest_effect():
    config = config_of(AlertsConfig(false_alarms_per_run=0.2))
    assert config.screens
    assert config.alerts.false_alarms_per_run == 0.2
    assert replace(config.alerts, false_alarms_per_run=0.05, min_severity=1.5) == AlertsConfig()


# --- the promise itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [Cell(events=6), Cell(controls=11, probes=2, events=6, autocorrelation=1.0)])
def test_normal_severities_keep_the_promise_and_what_is_stored_is_found(cell):
    found = simulate(cell, 5, AlertsConfig())
    assert (found.alarmed, found.contradicted) == (0, 0)
    assert found.power >= 0.8
    assert 0 < found.measured < 1  # the screen is on, and does not choose always


def test_nothing_is_called_where_variance_falls_everywhere_and_loss_hardly(monkeypatch):
    """Where what was not measured counted as unchanged, a probe was called in 1 of these 12 runs, a control in 4."""
    monkeypatch.setattr(promise, "SPREAD", 0.06)
    found = simulate(Cell(events=6, fall="variance"), 12, AlertsConfig())
    assert (found.alarmed, found.contradicted) == (0, 0)


def test_a_rule_that_promises_more_than_it_can_is_seen():
    rule = AlertsConfig(false_alarms_per_run=0.99, max_p=1.0, patience=1)
    assert simulate(Cell(controls=12, probes=16, events=4, tail="lognormal"), 5, rule).alarmed


def test_cells_differ_and_their_numbers_are_their_own():
    every = list(cells())
    assert len(every) == len(set(every)) == 15
    assert {c.tail for c in every} == set(TAILS)
    assert {c.fall for c in every} == set(FALLS)
    assert min(c.controls for c in every) == 11
    cell = Cell(controls=11, probes=2, events=2)
    assert simulate(cell, 2, AlertsConfig()) == simulate(cell, 2, AlertsConfig())
    drawn = {float(next(log_factors(c, np.random.default_rng(0))).sum()) for c in (cell, replace(cell, tail="t5"))}
    assert len(drawn) == 2


def test_an_interval_is_clopper_and_pearsons():
    outcome = Outcome(Cell(10, 1, 5, 0.0), runs=400, alarmed=30, found=300, contradicted=0)
    exact = stats.binomtest(30, 400).proportion_ci(0.95, method="exact")
    assert outcome.interval == pytest.approx((exact.low, exact.high))
    assert (outcome.rate, outcome.power) == (0.075, 0.75)
    assert outcome.keeps(0.06)
    assert not outcome.keeps(0.05)
    assert Outcome(Cell(10, 1, 5, 0.0), 400, 0, 0, 0).interval[0] == 0


# --- the page ---------------------------------------------------------------------------------------------------------


def outcome(alarmed: int, **cell) -> Outcome:
    return Outcome(Cell(**cell), 400, alarmed, 392, 8, 0.2)


def test_page_of_a_broken_promise():
    text = page(
        [outcome(2), outcome(30, probes=1), outcome(4, tail="t5", fall="variance")], 0.05, "memwatch promise", 1.25
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "`memwatch promise`: 3 settings, 400 runs each, 1.2 minutes. memwatch " in text
    assert "where severities are of this kind: normal.\n" in text
    assert "It takes 11 controls" in text
    assert rows[2:] == [
        "| normal | - | 20 | 8 | 20 | 0.8 | 0.5 % (0.1 % to 1.8 %) | 98 % | 2.0 % | 20 % |",
        "| normal | - | 20 | 1 | 20 | 0.8 | **7.5 %** (5.1 % to 11 %) | 98 % | 2.0 % | 20 % |",
        "| heavy tails (t, 5 degrees of freedom) | 1 and 0.1 | 20 | 8 | 20 | 0.8 "
        "| 1.0 % (0.3 % to 2.5 %) | 98 % | 2.0 % | 20 % |",
    ]
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith(("|", "`")))


def test_page_of_a_promise_that_is_kept():
    assert KEPT in page([outcome(2)], 0.05, "memwatch promise", 0.0)


@pytest.mark.parametrize(("share", "text"), [(0.0, "0.0 %"), (0.0049, "0.5 %"), (0.0996, "10 %"), (1.0, "100 %")])
def test_percent(share, text):
    assert percent(share) == text
