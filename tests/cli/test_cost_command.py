"""The command ``memwatch cost``: a table with every kind of event; what cannot be done is one clear line."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from support.builders import CONFIG
from support.processes import new_process

from memwatch.cli import main
from memwatch.cli.cost import multiplied
from memwatch.config_file import load_config
from memwatch.measure.measure import count_passes
from memwatch.pace import CHOSEN

SCREENING = {key: CONFIG[key] for key in ("levels", "sampling")} | {"curvature": {"vectors": 2, "tile": 2}}
ALWAYS = SCREENING | {"every_steps": 2, "signals": {"terms": "variance"}}  # there is no loss to screen by


@pytest.fixture
def cost(screened, pretrained, tmp_path, capsys):
    """Runs the command with settings; its exit code and what it printed."""

    def run(*arguments, model=pretrained, settings=SCREENING):
        new_process()
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        code = main(["cost", str(model), "--config", str(file), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def events(out):
    """By kind of event, what the table says of it."""
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    return {name: (int(passes), float(seconds)) for name, passes, seconds in rows}


def test_the_table_has_every_event_and_the_passes_of_count_passes(cost):
    code, out, _ = cost("--probes", 3, "--controls", 5, "--step-seconds", 0.5, "--steps", 300)
    assert code == 0
    passes, found = count_passes(load_config(SCREENING), 8, 0), events(out)
    expected = {"forward passes alone": 0, f"curvature of {CHOSEN:.0%}": CHOSEN, "curvature of all": 1}
    assert {name: row[0] for name, row in found.items()} == {n: round(passes.of_event(c)) for n, c in expected.items()}
    seconds = [row[1] for row in found.values()]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2]
    every = int(re.search(r"a run of 300 steps of 0.5 s memwatch looks every (\d+) steps and takes ", out)[1])
    assert 25 <= every <= 75  # four events in 300 steps
    assert "memwatch step" not in out


def test_without_a_screen_every_event_measures_everything(cost):
    code, out, _ = cost("--probes", 2, "--controls", 0, "--step-seconds", 1, settings=ALWAYS)
    assert code == 0
    assert list(events(out)) == ["curvature of all"]
    assert "looks every 2 steps" in out  # the user's own interval


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "--steps: got 0, allowed: 1 or greater"),
        (["--probes", 0], "--probes: got 0, allowed: 1 or greater"),
        (["--step-seconds", "nan"], "--step-seconds: got nan, allowed: greater than 0"),
    ],
)
def test_bad_options_are_one_clear_line(cost, arguments, message):
    assert cost(*arguments) == (2, "", f"memwatch cost: {message}\n")


def test_an_unknown_model_is_one_clear_line(cost, tmp_path):
    for model in (tmp_path / "none", tmp_path):
        code, _, err = cost(model=model)
        assert code == 2
        assert re.search(r"memwatch cost: MODEL: got .*, allowed: the folder or hub id of a diffusers pipeline", err)


def test_what_one_more_costs_is_never_negative():
    assert multiplied(np.array([3.0, 5.0]), np.array([5.0, 4.0]), 10).tolist() == [21, 3 + 20]
