"""How forecasts are scored, and the short runs that they are scored on."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from evidence.old import forecast_runs, forecasts
from evidence.old.forecast_runs import Course, forecast_run, forecast_set, home_of, probes_of
from evidence.old.forecasts import Asked, Watched, ask, page, row_of, watched_of, write_forecasts
from evidence.worlds.items import PLANTED, Kind
from support.runs import memorized, write_run

from memwatch.cli import bench as command
from memwatch.cli import main
from memwatch.config_file import load_config
from memwatch.judge.forecast import LEAST, Forecast
from memwatch.report.history import Run

TINY_SD = Path(__file__).parents[2] / "train_examples" / "assets" / "tiny-sd"
STEPS = [0.0, 20.0, 40.0, 60.0, 80.0, 100.0, 120.0]


def watched(values, crossing=None, kind=Kind.VERBATIM, memorized=None, name="a") -> Watched:
    return Watched("forecast-0", name, kind, STEPS[: len(values)], values, crossing, memorized)


def test_a_forecast_is_asked_for_before_the_crossing_alone():
    rising = [0.0, 0.1, 0.15, 0.22, 0.3, 0.45, 0.5]
    asked = list(ask(watched(rising, crossing=5), 1.5))
    assert [one.event for one in asked] == [3, 4]
    assert [one.ahead for one in asked] == [2, 1]
    assert len(list(ask(watched([0.1] * 7), 1.5))) == 7 - LEAST + 1
    assert list(ask(watched([0.0, 0.1, 0.5, 0.6], crossing=2), 1.5)) == []


@pytest.mark.parametrize(
    ("low", "high", "holds", "is_late"),
    [
        (90, 110, True, False),
        (100, 110, True, False),
        (101, 110, False, True),  # it was seen at 100
        (61, 81, True, False),  # it was between 80 and 100
        (61, 80, False, False),
        (61, None, True, False),
        (101, None, False, True),
    ],
)
def test_an_interval_holds_where_it_allows_for_the_event_that_shows_the_crossing(low, high, holds, is_late):
    asked = Asked(watched([0.0] * 5 + [0.5], crossing=5), 3, Forecast(95, low, high))
    assert (asked.holds, asked.is_late) == (holds, is_late)


def test_a_curve_that_never_crosses_makes_a_forecast_wrong_when_it_ended_within_the_run():
    quiet = watched([0.1] * 7)
    assert Asked(quiet, 3, Forecast(100, 80, 120)).is_wrong
    assert not Asked(quiet, 3, Forecast(100, 80, 121)).is_wrong
    assert not Asked(quiet, 3, Forecast(100, 80, None)).is_wrong
    assert not Asked(quiet, 3, None).is_wrong


def test_the_numbers_of_a_row():
    crossing = watched([0.0] * 5 + [0.5], crossing=5)
    said = [Forecast(90, 70, 110), Forecast(130, 105, 205), None]
    row = row_of([Asked(crossing, 3, one) for one in said])
    assert (row["asked"], row["made"], row["inside"], row["share inside"]) == (3, 2, "1/2", 0.5)
    assert (row["median error"], row["too late by"], row["median width"]) == (20, 10, 70)
    assert row_of([Asked(crossing, 3, None)])["share inside"] is None


def test_the_curves_of_a_run_with_the_kinds_of_its_set(tmp_path):
    planted = next(i.name for i in forecast_set(0) if i.kind is Kind.VERBATIM)
    factors = [1.1, 1.2, 1.4, 1.6]
    rows = [{planted: {"levels": [factor]}} for factor in factors]
    rows[3][planted] |= memorized()
    probes = [{"name": planted}, {"name": "ordinary-00"}]
    write_run(tmp_path / "run", probes, [{"step": 20 * i, "rows": r} for i, r in enumerate(rows)])
    first, second = watched_of(Run.read(tmp_path / "run"), 0, 1.5)
    assert (first.name, first.kind, first.crossing, first.memorized) == (planted, Kind.VERBATIM, 3, 60)
    assert first.values == pytest.approx([math.log(factor) for factor in factors])
    assert (second.kind, second.crossing, second.memorized) == (Kind.ORDINARY, None, None)


def test_the_page(monkeypatch):
    rising = watched([0.0, 0.1, 0.15, 0.22, 0.3, 0.45, 0.5], crossing=5, memorized=120)
    monkeypatch.setattr(forecasts, "SHAPES", ("straight",))
    text = page([rising, watched([0.1] * 7, kind=Kind.ORDINARY, name="b")], Course(), 1.5, "memwatch bench --forecast")
    assert "Written by `memwatch bench --forecast`." in text
    assert "Of 2 probes 1 crossed the\nlevel; 0 of those had no forecast before." in text
    assert "| straight | " in text
    assert "1 of them were called memorized, in the median 20 steps after the crossing." in text
    assert "| ordinary | 1 | 4 | 0 | 0 |" in text
    assert max(map(len, text.splitlines())) <= 220


# --- the runs --------------------------------------------------------------------------------------------------------


def test_the_set_has_what_is_stored_and_what_is_not():
    items = forecast_set(1)
    kinds = {kind: [i for i in items if i.kind is kind] for kind in Kind}
    assert all(kinds[kind] for kind in (*PLANTED, Kind.LEARNED, Kind.ORDINARY, Kind.HELD_OUT))
    assert len(kinds[Kind.CONTROL]) == 21  # a view of the learned subject among them
    assert len({i.name for i in items}) == len(items)
    probes, controls = probes_of(items, is_control=False), probes_of(items, is_control=True)
    assert {p.name for p in controls} == {i.name for i in kinds[Kind.CONTROL]}
    assert len(probes) < 32


@pytest.fixture
def small(monkeypatch):
    """Three items, two steps, one noise level."""
    full = forecast_set(0)
    kept = [full[0], next(i for i in full if i.kind is Kind.ORDINARY), next(i for i in full if i.kind is Kind.CONTROL)]
    monkeypatch.setattr(forecast_runs, "forecast_set", lambda seed: kept)
    coarse = {"levels": {"timesteps": [301], "draws": 2}, "signals": {"unconditional": False}, "strict": True}
    real = Course.config
    monkeypatch.setattr(Course, "config", lambda course, home: load_config(real(course, home), **coarse))
    return Course(steps=2, every_steps=1, batch_size=2, prepare_steps=1)


def test_a_run_is_trained_once(small, tmp_path, monkeypatch):
    run = forecast_run(0, TINY_SD, tmp_path, small)
    assert [event.step for event in run.events] == [0, 1, 2]
    assert [bool(event.rows[0].levels) for event in run.events] == [False, True, True]
    assert [row.name for row in run.last.rows] == ["template-x8-rectangle", "ordinary-00"]
    history = home_of(tmp_path, 0) / "history.jsonl"
    lines = history.read_text(encoding="utf-8").splitlines(keepends=True)
    history.write_text("".join(lines[:-1]), encoding="utf-8")  # cut off
    again = forecast_run(0, TINY_SD, tmp_path, small)
    assert [event.rows[0].levels for event in again.events] == [event.rows[0].levels for event in run.events]
    monkeypatch.delattr(forecast_runs, "read_base")
    assert forecast_run(0, TINY_SD, tmp_path, small).events == again.events


def test_the_command(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "write_forecasts", lambda *given: asked.append(given) or given[2] / "forecast.md")
    assert (
        main(["bench", "--output", str(tmp_path), "--base", str(TINY_SD), "--forecast", str(tmp_path / "results")]) == 0
    )
    said = f"memwatch bench --output {tmp_path} --forecast {tmp_path / 'results'}"
    assert asked == [(TINY_SD, tmp_path, tmp_path / "results", 1.5, said)]
    assert capsys.readouterr().out.strip() == str(tmp_path / "results" / "forecast.md")


def test_the_file(tmp_path, monkeypatch):
    probes = [{"name": i.name} for i in forecast_set(0) if i.kind is Kind.VERBATIM][:2]
    events = [{"step": 20 * i, "rows": {probes[0]["name"]: {"levels": [1.07**i]}}} for i in range(8)]
    for seed in forecasts.SEEDS:
        write_run(home_of(tmp_path, seed), probes, events)
    course = Course(steps=140)
    monkeypatch.delattr(forecast_runs, "read_base")
    monkeypatch.setattr(forecasts, "SHAPES", ())
    file = write_forecasts(TINY_SD, tmp_path, tmp_path / "results", 1.5, "memwatch bench", course)
    text = file.read_text(encoding="utf-8")
    assert f"{len(forecasts.SEEDS)} runs of 140 steps" in text
    assert f"Of {2 * len(forecasts.SEEDS)} probes {len(forecasts.SEEDS)} crossed the\nlevel" in text
    assert re.search(r"on the runs made after that, (\d+) of \1 intervals held", text)
