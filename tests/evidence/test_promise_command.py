"""The command ``memwatch promise``: one page, printed or written; what cannot be done is one clear line."""

from __future__ import annotations

import pytest
from evidence.promise import Cell

from memwatch.cli import main
from memwatch.cli import promise as command


@pytest.fixture
def two_cells(monkeypatch):
    monkeypatch.setattr(command, "cells", lambda: iter([Cell(11, 1, 2, 0.5), Cell(12, 1, 2, 0.5, "lognormal")]))


def test_the_page_is_written(two_cells, tmp_path, capsys):
    file = tmp_path / "results" / "promise.md"
    assert main(["promise", "--runs", "2", "--seed", "3", "--output", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert "`memwatch promise --runs 2 --seed 3`: 2 settings, 2 runs each" in text
    assert "| normal | - | 11 | 1 | 2 | 0.5 | " in text
    assert "| skewed (lognormal) | - | 12 | 1 | 2 | 0.5 | " in text
    out, err = capsys.readouterr()
    assert out == ""
    assert f"2 settings, 0 of them break the promise: {file}" in err


def test_the_page_is_printed(two_cells, capsys):
    assert main(["promise", "--runs", "1"]) == 0
    assert capsys.readouterr().out.startswith("# The promise, simulated\n")


def test_the_rule_is_that_of_the_config(two_cells, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("alerts:\n  false_alarms_per_run: 0.2\n", encoding="utf-8")
    assert main(["promise", "--runs", "1", "--config", str(config)]) == 0
    assert "with a probability of 20 % at most" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "allowed"), [(["--runs", "0"], "1 or greater"), (["--seed", "-1"], "0 or greater")])
def test_what_cannot_be_done_is_one_line(option, allowed, capsys):
    assert main(["promise", *option]) == 2
    assert capsys.readouterr().err == f"memwatch promise: {option[0]}: got {option[1]}, allowed: {allowed}\n"
