"""The simulated promise: its rule is the product's, its severities are what they say, and normal ones keep it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from memwatch.bench import promise
from memwatch.bench.promise import (
    STORED,
    TAILS,
    Cell,
    Outcome,
    calls,
    cells,
    excess_of,
    excess_over_others,
    severities,
    shaped,
    simulate,
)
from memwatch.bench.promise_page import KEPT, page, percent
from memwatch.config import AlertsConfig
from memwatch.judge.alerts import Evidence, ProbeState, Verdict, judge
from memwatch.judge.audit import audit_of
from memwatch.judge.calibration import NUM_SIZES, Null


@dataclass(frozen=True)
class Judged:
    """An object after an event, one at a time."""

    state: ProbeState
    p: float | None


def one_by_one(profile: np.ndarray, null: Null, state: ProbeState, cell: Cell, rule: AlertsConfig) -> Judged:
    """By ``alerts.judge``, at the size at which an object exceeds its null most; any effect is large enough."""
    evidence = Evidence(100.0, 100.0, num_controls=len(null), any_controls=True)
    if null.is_enough:
        excess = [null.excess(value, size) for size, value in enumerate(profile)]
        best = int(np.argmax(excess))
        p, rank_p = null.p_value(excess[best]), null.rank_p(profile[best], best)
        evidence = Evidence(100.0, 100.0, p, rank_p, num_controls=len(null), any_controls=True)
    return Judged(judge(state, evidence, 1, rule, cell.probes)[0], evidence.p)


def slow_calls(events: list[np.ndarray], cell: Cell, rule: AlertsConfig, run: int) -> list[tuple[list[bool], bool]]:
    """The same as ``promise.calls`` of one run, by the product's own functions."""
    watched = [ProbeState()] * (cell.probes + 1)
    controls = [ProbeState()] * cell.controls
    found = []
    for x in events:
        profiles = [x[:, i, run] for i in range(x.shape[1])]
        null = Null.of(profiles[cell.probes + 1 :])
        now = [one_by_one(p, null, s, cell, rule) for p, s in zip(profiles, watched, strict=False)]
        audited = [one_by_one(null.profiles[i], null.without(i), s, cell, rule) for i, s in enumerate(controls)]
        audit = audit_of([one for one in audited if one.p is not None])
        said = [o.state.verdict is Verdict.MEMORIZED and (not audit.called or o.p <= audit.largest_p) for o in now]
        watched, controls = [o.state for o in now], [o.state for o in audited]
        found.append((said, audit.called > 0))
    return found


SMALL = [
    Cell(11, 2, 6, 0.5),
    Cell(13, 1, 5, 1.0, "t5"),
    Cell(12, 3, 7, 0.8, "lognormal"),
    Cell(10, 2, 5, 0.5, "lognormal"),  # nine others are too few to audit by
]
RULES = [
    AlertsConfig(),
    AlertsConfig(false_alarms_per_run=0.9, max_p=1.0),
    AlertsConfig(false_alarms_per_run=0.9, max_p=0.05, patience=1),
    AlertsConfig(false_alarms_per_run=0.01, patience=3),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cell", SMALL)
def test_the_rule_is_the_products(cell, rule):
    """Some runs have controls far off, so that the audit has something to say."""
    runs, rng = 8, np.random.default_rng(0)
    events = list(severities(cell, runs, rng, stored=12.0))
    for x in events:
        x[:, -1, ::2] += 9.0
        x[:, -2, ::4] += 8.0
    found = list(calls(events, cell, rule))
    for run in range(runs):
        for (said, contradicts), (called, against) in zip(slow_calls(events, cell, rule, run), found, strict=True):
            assert called[:, run].tolist() == said
            assert against[run] == contradicts


def test_the_twins_see_every_case():
    """Found, silent and capped runs are all among them."""
    outcomes = set()
    for cell in SMALL:
        events = list(severities(cell, 8, np.random.default_rng(0), stored=12.0))
        for x in events:
            x[:, -1, ::2] += 9.0
            x[:, -2, ::4] += 8.0
        for rule in RULES:
            for called, against in calls(events, cell, rule):
                outcomes |= {("stored", bool(v)) for v in called[-1]} | {("against", bool(v)) for v in against}
                outcomes |= {("probe", bool(v)) for v in called[:-1].flat}
    assert outcomes == {(kind, value) for kind in ("stored", "against", "probe") for value in (True, False)}


@pytest.mark.parametrize("n", [3, 11, 40])
def test_leaving_one_out_in_closed_form_equals_leaving_one_out(n):
    controls = np.random.default_rng(n).normal(3.0, 2.0, size=(NUM_SIZES, n, 5))
    fast = excess_over_others(controls)
    for i in range(n):
        slow = excess_of(controls[:, i : i + 1], np.delete(controls, i, axis=1))
        np.testing.assert_allclose(fast[:, i : i + 1], slow, rtol=1e-9)


def test_controls_that_are_all_alike_exceed_each_other_by_nothing():
    assert not excess_over_others(np.full((NUM_SIZES, 12, 2), 0.5)).any()


# --- severities -------------------------------------------------------------------------------------------------------


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
    cell = Cell(30, 5, 4, rho)
    x = np.stack(list(severities(cell, 300, np.random.default_rng(0))))
    assert x.shape == (4, NUM_SIZES, 36, 300)
    null = np.delete(x, cell.probes, axis=2)  # (events, sizes, objects, runs)
    assert null.std() == pytest.approx(1, abs=0.02)
    assert np.corrcoef(null[0].ravel(), null[1].ravel())[0, 1] == pytest.approx(rho, abs=0.02)
    assert np.corrcoef(null[0].ravel(), null[3].ravel())[0, 1] == pytest.approx(rho**3, abs=0.02)
    assert np.corrcoef(null[0, 0].ravel(), null[0, 6].ravel())[0, 1] == pytest.approx(0.7, abs=0.03)
    assert np.corrcoef(null[0, 0, 0], null[0, 0, 1])[0, 1] == pytest.approx(0, abs=0.2)
    stored = x[:, :, cell.probes] - x[:, :, 0]
    assert not stored[:2].any()
    assert stored[2:] == pytest.approx(np.full(stored[2:].shape, STORED))


# --- the promise itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [Cell(10, 8, 20, 0.8), Cell(20, 1, 20, 0.8), Cell(20, 8, 20, 0.5), Cell(50, 8, 20, 1.0), Cell(20, 64, 5, 0.8)],
)
def test_normal_severities_keep_the_promise(cell):
    found = simulate(cell, 300, AlertsConfig())
    assert found.interval[1] < 0.05  # not merely plausible: kept
    assert found.keeps(0.05)
    assert found.power > 0.9
    assert found.contradicted < 0.25 * found.runs


def test_a_rule_that_promises_more_than_it_can_is_seen():
    """Eighteen times the budget breaks a promise of 5 %, though Bonferroni's bounds stay far below 90 %."""
    found = simulate(Cell(20, 8, 20, 0.0), 300, AlertsConfig(false_alarms_per_run=0.9, max_p=1.0))
    assert found.rate > 0.1
    assert not found.keeps(0.05)


def test_cells_are_all_combinations_and_their_numbers_their_own():
    every = list(cells())
    assert len(every) == len(set(every)) == 4 * 3 * 3 * 4 * 3
    rule = AlertsConfig()
    cell = Cell(10, 8, 20, 0.8, "lognormal")
    assert simulate(cell, 50, rule) == simulate(cell, 50, rule)
    assert len({simulate(cell, 50, rule, seed).alarmed for seed in range(6)}) > 1


def test_an_interval_is_clopper_and_pearsons():
    outcome = Outcome(Cell(10, 1, 5, 0.0), runs=400, alarmed=30, found=300, contradicted=0)
    exact = stats.binomtest(30, 400).proportion_ci(0.95, method="exact")
    assert outcome.interval == pytest.approx((exact.low, exact.high))
    assert (outcome.rate, outcome.power) == (0.075, 0.75)
    assert outcome.keeps(0.06)
    assert not outcome.keeps(0.05)
    assert Outcome(Cell(10, 1, 5, 0.0), 400, 0, 0, 0).interval[0] == 0


# --- the page ---------------------------------------------------------------------------------------------------------


def outcome(alarmed: int, tail: str = "normal", controls: int = 10, probes: int = 1) -> Outcome:
    return Outcome(Cell(controls, probes, 5, 0.5, tail), 400, alarmed, 392, 8)


def test_page_of_a_broken_promise():
    group = [outcome(2), outcome(6, controls=20), outcome(30, probes=8), outcome(4, "t5")]
    text = page(group, 0.05, "memwatch promise", 1.25)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "4 settings, 400 runs each, 1.2 minutes. memwatch " in text
    assert "| normal | 2 of 3 | 7.5 % (5.1 % to 11 %) | 10 controls, 8 probes, 5 events, autocorrelation 0.5 " in text
    assert "| 98 %, 98 % | in 2.0 % of runs |" in text
    assert "where severities are of this kind: normal.\n" in text
    assert "It takes 11 controls" in text
    assert rows[4:8] == [
        "| controls | autocorrelation | 1 x 5 | 8 x 5 |",
        "|---|---|---|---|",
        "| 10 | 0.5 | 0.5 / 98 | **7.5** / 98 |",
        "| 20 | 0.5 | 1.5 / 98 |  |",
    ]
    assert "## Heavy tails (t, 5 degrees of freedom)" in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith(("|", "`")))


def test_page_of_a_promise_that_is_kept():
    assert KEPT in page([outcome(2)], 0.05, "memwatch promise", 0.0)


@pytest.mark.parametrize(("share", "text"), [(0.0, "0.0 %"), (0.0049, "0.5 %"), (0.0996, "10 %"), (1.0, "100 %")])
def test_percent(share, text):
    assert percent(share) == text


def test_the_cells_of_the_command_are_those_of_the_issue():
    assert (promise.CONTROLS, promise.PROBES, promise.EVENTS) == ((10, 20, 50, 100), (1, 8, 64), (5, 20, 100))
    assert promise.AUTOCORRELATIONS == (0.0, 0.5, 0.8, 1.0)
