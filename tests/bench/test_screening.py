"""Screened against full on finished runs."""

from __future__ import annotations

import pytest

from memwatch.bench.results import forward_only, run_product
from memwatch.bench.runs import finished_runs
from memwatch.bench.screening import passes_share, row_of, write_screening
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config
from memwatch.measure.passes import count_passes

FULL = load_config({"screen": False})


@pytest.fixture(scope="module")
def run(runs):
    return next(iter(finished_runs(runs)))


def test_what_is_not_chosen_is_what_the_screen_would_have_seen(run):
    screened = run_product(MemWatchConfig(), run)
    measured = run_product(FULL, run)
    for step, judgement in measured.events.items():
        seen = {f.name: f.observation for f in screened.events[step].everything}
        for f in judgement.everything:
            o = seen[f.name]
            if o.now.rho is None:
                assert o.now.epsilon.equal(forward_only(f.observation, 1).now.epsilon)
                assert o.eps.shape[1] == o.now.draws == o.baseline.draws == 1
            else:
                assert o is not f.observation
                assert o.now.rho.samples.equal(f.observation.now.rho.samples)


def test_a_run_equals_itself(run):
    screened = run_product(MemWatchConfig(), run)
    row = row_of(screened, screened, MemWatchConfig())
    same, total = map(int, row["same"].split("/"))
    assert same == total > 0
    assert (row["lost"], row["gained"], row["called otherwise"]) == (0, 0, "none")


def test_the_passes_are_those_of_what_was_chosen(run):
    config = MemWatchConfig()
    screened = run_product(config, run)
    passes = count_passes(config, 1, 0)
    counts = [f.observation.now.rho is not None for e in screened.events.values() for f in e.everything]
    expected = (len(counts) * passes.screen + sum(counts) * passes.full) / (len(counts) * passes.full)
    assert passes_share(screened, config) == pytest.approx(expected)


def test_the_page(runs, run, tmp_path):
    file = write_screening([run], MemWatchConfig(), tmp_path, "memwatch bench --screen")
    text = file.read_text(encoding="utf-8")
    assert file.name == "screen.md"
    assert "Written by `memwatch bench --screen`." in text
    assert f"| {run.name} |" in text
    with pytest.raises(ValueError, match="does not screen"):
        write_screening([run], FULL, tmp_path, "")
