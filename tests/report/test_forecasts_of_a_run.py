"""Forecasts of a run that is read back from its folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from support.runs import memorized, write_run

from memwatch.cli import main
from memwatch.judge.forecast import Forecast, forecast
from memwatch.report.about import About
from memwatch.report.forecasts import ahead, curves, forecast_text, forecasts, strength
from memwatch.report.history import Event, Row, Run
from memwatch.report.page import write_page
from memwatch.report.text import as_json, as_markdown

FACTORS = [1.03, 1.09, 1.11, 1.2, 1.26]


def run_of(folder, rows_by_event):
    probes = [{"name": "cat"}, {"name": "dog"}]
    events = [{"step": 20 * i, "rows": rows} for i, rows in enumerate(rows_by_event)]
    return Run.read(write_run(folder, probes, events)).events


def test_a_rising_probe_has_a_forecast_and_a_quiet_one_has_none(tmp_path):
    rows = [{"cat": {"levels": []}, "dog": {"levels": []}}]  # nothing to compare with yet
    rows += [{"cat": {"levels": [factor, factor**2]}, "dog": {"levels": [1.1, 1.1]}} for factor in FACTORS]
    events = run_of(tmp_path, rows)
    found = forecasts(events, 1.5)
    steps, values = [20, 40, 60, 80, 100], [1.5 * math.log(factor) for factor in FACTORS]
    assert list(found) == ["cat"]
    assert found["cat"].step == pytest.approx(forecast(steps, values, math.log(1.5)).step)
    assert curves(events)["cat"] == (steps, pytest.approx(values))
    assert forecasts(events[:4], 1.5) == forecasts([], 1.5) == {}


def test_what_is_memorized_already_has_none(tmp_path):
    rows = [{"cat": {"levels": [factor]}, "dog": {"levels": [factor]}} for factor in FACTORS]
    rows[-1]["cat"] |= memorized()
    assert list(forecasts(run_of(tmp_path, rows), 1.5)) == ["dog"]


def test_an_event_that_failed_or_is_not_finite_is_passed_over(tmp_path):
    rows = [{"cat": {"levels": [factor]}} for factor in FACTORS]
    folder = tmp_path / "run"
    events = [{"step": i, "rows": r} for i, r in enumerate(rows)]
    events.insert(2, {"step": 7, "failure": "out of memory"})
    events.insert(3, {"step": 8, "rows": {"cat": {"levels": [None, 1.2]}}})
    write_run(folder, [{"name": "cat"}], events)
    steps, values = curves(Run.read(folder).events)["cat"]
    assert steps == [0, 1, 2, 3, 4]
    assert values == pytest.approx([math.log(factor) for factor in FACTORS])


def test_the_strength_of_a_row():
    assert strength(Row("cat", levels=(2.0, 8.0))) == pytest.approx(math.log(4))
    assert strength(Row("cat")) is None
    line = json.loads('{"step": 1, "findings": [{"name": "cat", "levels": [null]}]}')
    assert strength(Event.from_dict(line).rows[0]) is None


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Forecast(633.4, 512.0, 899.1), "crosses 1.5x at about step 640 (520 to 900)"),
        (Forecast(640.0, 520.0, 900.0), "crosses 1.5x at about step 640 (520 to 900)"),
        (Forecast(633.4, 512.0, None), "crosses 1.5x at about step 640 (520 or later)"),
    ],
)
def test_a_forecast_in_words(said, words):
    assert forecast_text(said, 20, 1.5) == words


def test_the_next_event_is_the_first_that_can_show_it():
    said = forecast([0, 20, 40, 60, 80], [0.0, 0.12, 0.17, 0.33, 0.35], 0.36)
    assert forecast_text(said, 20, math.exp(0.36)).startswith("crosses 1.43333x at about step 100 (100 to ")


def test_what_lies_ahead_is_said_by_every_reader_of_the_folder(tmp_path, capsys):
    rows = [{"cat": {"levels": [factor**1.5]}} for factor in FACTORS]
    write_run(tmp_path, [{"name": "cat"}], [{"step": 20 * i, "rows": r} for i, r in enumerate(rows)])
    run = Run.read(tmp_path)
    assert ahead(replace(run, about=About())) == []  # an older version kept no settings
    (said,) = ahead(run)
    assert said.startswith("cat crosses 1.5x at about step ")
    assert f"## Forecast\n\n- {said}" in as_markdown(run)
    assert as_json(run)["forecasts"] == [said]
    assert said in write_page(tmp_path).read_text(encoding="utf-8")
    assert main(["status", str(tmp_path)]) == 0
    assert f"  forecast: {said}\n" in capsys.readouterr().out
    stopped = replace(run.events[-1], stop_reason="step 80: cat")
    assert ahead(replace(run, events=(*run.events[:-1], stopped))) == []
