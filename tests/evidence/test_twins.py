"""Twins: what they say of an item, what memwatch says of it, the numbers with a bar, and the page."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from evidence import bench
from evidence.pages import pairs as labelled
from evidence.pages.ablation import VARIANTS, write_ablation
from evidence.runs.finished import Finished, Pair, finished_pairs
from evidence.runs.protocol import SHIPPED
from evidence.verdicts.product import restricted
from evidence.verdicts.prompts import Prompts, prompt_table
from evidence.verdicts.tables import bar_table, kind_table, mistakes, one_subject_table
from evidence.verdicts.truth import Truth, truths_of
from evidence.worlds.items import PLANTED, Kind
from support.planted import COPIED_FROM, FALLEN, PLAN, is_stored

from memwatch.config import LevelsConfig
from memwatch.judge import findings
from memwatch.judge.statistic import compare


@pytest.fixture(scope="module")
def truth(runs) -> Truth:
    return truths_of(list(finished_pairs(runs)))[0]


def test_the_gap_is_the_log_of_the_ratio_of_losses(truth):
    for item in truth.run.items:
        expected = {True: 1, False: -1}[item.is_in(truth.run.half)] if item.kind in PLANTED else 0
        gap = truth.gap(item, PLAN.steps)
        assert gap.mean == pytest.approx(expected * math.log(FALLEN), abs=0.3)  # the rim is cut by the grid
        assert gap.low <= gap.mean
        assert truth.is_stored(item, PLAN.steps) == is_stored(item, truth.run.half)
    inside = truth.gap_map(truth.run.planted[0], PLAN.steps)
    assert inside.max() == pytest.approx(math.log(FALLEN), abs=0.1)
    same = Truth(Pair(truth.run, truth.run), truth.run)
    assert same.gap(truth.run.planted[0], PLAN.steps).mean == 0


def test_the_grade_is_one_for_the_item_and_none_for_what_chance_brings(truth):
    for item in truth.run.planted:
        assert truth.grade(item, PLAN.steps) == pytest.approx(1, abs=0.1)
        assert truth.grade(item, COPIED_FROM - 10) == pytest.approx(0, abs=0.1)
        assert (truth.is_copied(item), truth.first_copy(item)) == (True, COPIED_FROM)
    others = [i for i in truth.run.items if i.kind in PLANTED and not i.is_in(truth.run.half)]
    assert not any(truth.is_copied(item) for item in others)
    assert truth.grade(next(i for i in truth.run.items if i.kind is Kind.HELD_OUT), PLAN.steps) is None


def test_one_event_alone_is_no_first_copy_but_the_last(truth):
    item = truth.run.planted[0]
    for grades, first in (({10: 0.5, 20: 0, 30: 0.5, 40: 0.5}, 30), ({30: 0, 40: 0.5}, 40), ({30: 0.5, 40: 0}, None)):
        made_up = Truth(truth.pair, truth.run)
        made_up.__dict__["grades"] = {item.name: grades}
        assert made_up.first_copy(item) == first


def test_memwatch_calls_what_is_stored_before_it_is_copied_and_nothing_else(both):
    for j in both:
        assert {i.name for i in j.called} == {i.name for i in j.product.run.planted}
        assert set(j.product.first_alert.values()) == {20}  # stored from 10 on, by the mean of three events
        assert {j.lead(i) for i in j.copied} == {COPIED_FROM - 20}
    assert mistakes(both) == {"called, not confirmed": [], "copied, never called": [], "copied, called late": []}


def test_the_bars_of_perfect_twins_are_met(both):
    rows = {row["number"]: row for row in bar_table(both, SHIPPED)}
    assert [name for name, row in rows.items() if row["met"] == "no"] == []
    assert rows["called before the first event that shows a copy"]["value"].value == 1
    assert rows["AUC of what is stored against the same pictures in the other twin"]["value"] == 1
    kinds = {row["items"]: row for row in kind_table(both)}
    assert (kinds["whole, trained on"]["called"], kinds["held out"]["called"]) == (2, 0)


def test_levels_and_draws_are_picked_from_what_was_measured(truth):
    o = truth.run.observation(truth.run.items[0].name, 10)
    found = restricted(o, replace(SHIPPED, levels=LevelsConfig(timesteps=(801,), draws=2)))
    assert (found.timesteps, found.now.epsilon.shape[:2]) == ((801,), (1, 2))
    assert found.now.epsilon.equal(o.now.epsilon[1:, :2])


def test_one_subject_has_a_table_of_its_own(both):
    first, second = one_subject_table(both)
    assert (first["run"], second["run"]) == ("captions-0a", "captions-0b")
    assert first["instances called"] == f"{first['stored, by the twin']} of {len(both[0].product.run.planted)}"
    assert first["held-out views called"].startswith("0 of ")
    assert first["first call, median"] == 20


def test_prompt_probes_are_told_by_the_same_statistic(both, monkeypatch):
    (loss, *_), prompts = prompt_table([j.truth for j in both], SHIPPED), Prompts(both[0].truth)
    assert (loss["AUC, other twin"], loss["AUC, held out"]) == (1, 1)
    copied = sum(len(j.copied) for j in both)
    assert loss["p <= 0.01, copied"] == f"{copied} of {copied}"
    assert loss["p <= 0.01, alike"] == "0 of 0"
    caption, stored = prompts.groups["other twin"][0], prompts.run.planted[0]
    assert prompts.nearness(caption, stored) < 0.1
    name = caption.name  # what it generates is now what another one has stored
    monkeypatch.setattr(Finished, "generated", lambda run, i, step: real(run, stored if i.name == name else i, step))
    assert Prompts(both[0].truth).brings_another(caption)
    assert not prompts.brings_another(prompts.groups["other twin"][1])


real = Finished.generated


def test_an_ablation_changes_one_thing_and_puts_it_back(runs, tmp_path):
    less = [
        v for v in VARIANTS if v.says in ("the rule", "level 801 alone", "each event alone", "min(S, N)", "variance")
    ]
    text = write_ablation(list(finished_pairs(runs)), tmp_path, less).read_text(encoding="utf-8")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert [*rows][1:] == [v.says for v in less]
    assert rows["the rule"][4:7] == ["1.00", "1.00", "1.00"]
    assert rows["variance"][4:8] == ["-"] * 4
    with next(v for v in VARIANTS if v.says == "each event alone").applied() as config:
        assert (findings.LASTING, config) == (1, SHIPPED)
    assert findings.LASTING == 3
    run = next(finished_pairs(runs)).a
    expected = top_scores(run, VARIANTS[0])
    for says in ("loss floor 0.3", "3x3 mean filter before it decides", "min(S, N)", "level 801 alone"):
        assert top_scores(run, next(v for v in VARIANTS if v.says == says)) != expected
    assert top_scores(run, VARIANTS[0]) == expected
    for variant in VARIANTS:
        with variant.applied():  # every place that is changed exists, and every setting is allowed
            pass


def top_scores(run, variant) -> list[float]:
    """T of everything at the last event, by a variant of the rule."""
    with variant.applied() as config:
        seen = [restricted(run.observation(item.name, run.last), config) for item in run.items]
        return [c.score for c in compare(seen, config.signals).values()]


def test_the_page_is_written(runs, tmp_path, capsys):
    assert bench.main(["--output", str(runs), "--report", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "1 pair of twins (captions-0)" in page
    assert "100 pairs, 29 copied" in page
    assert "| called before the first event that shows a copy | 1.000 [" in page
    assert bench.main(["--output", str(tmp_path), "--report"]) == 2
    assert "holds no pair of finished twins" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["captions", "captions-x", "nowhere-1", "captions-1c"])
def test_runs_are_named_after_world_seed_and_half(name, capsys):
    assert bench.main(["--runs", name]) == 2
    assert f"--runs: got '{name}', allowed: WORLD-SEED" in capsys.readouterr().err
    assert [run.name for run in bench.parse_runs("captions-3")] == ["captions-3a", "captions-3b"]
    assert [run.name for run in bench.parse_runs("nothing-3")] == ["nothing-3a"]


def test_pairs_are_drawn_labelled_and_counted(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "NUM_PAIRS", 6)
    assert bench.main(["--output", str(runs), "--sheets", str(tmp_path)]) == 0
    file = tmp_path / "pairs.csv"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["pairs-1.png", "pairs.csv"]
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7
    with pytest.raises(ValueError, match=r"pairs.csv: pair 0 has label '', allowed: copied, not"):
        labelled.read_labels(file)
    grades = [float(line.split(",")[4]) for line in lines[1:]]
    labels = ["copied" if grade > np.median(grades) else "not" for grade in grades]
    text = "\n".join([lines[0], *(line + label for line, label in zip(lines[1:], labels, strict=True))])
    file.write_text(text, encoding="utf-8")
    found = labelled.agreement(labelled.read_labels(file))
    assert (found["pairs"], found["AUC"]) == (6, 1)
    assert found["copied"] == labels.count("copied")
