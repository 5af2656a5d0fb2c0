"""The comparison tells a perfect method from a blind one, and the page and the command say what was measured."""

import json

import numpy as np
import pytest
import torch
from support.planted import CHOSEN

from memwatch.bench import rows as rows_module
from memwatch.bench.methods import Method, all_methods
from memwatch.bench.plots import plots
from memwatch.bench.results import RunResult, run_product
from memwatch.bench.rivals import RIVALS
from memwatch.bench.rows import INTERVALS, Row, all_rows, with_intervals
from memwatch.bench.runs import finished_runs
from memwatch.bench.sscd import read_sscd
from memwatch.bench.tables import first_alerts_table, null_table, size_table, stored_table, world_table
from memwatch.bench.worlds import WORLDS
from memwatch.cli import bench, main
from memwatch.config import MemWatchConfig

RIVAL = {method.method: method for method in RIVALS}


@pytest.fixture(scope="module")
def product(runs):
    return [run_product(CHOSEN, run) for run in finished_runs(runs)]


def test_a_method_that_sees_and_one_that_guesses(product):
    seeing = Method("memwatch", "log_ratio", "first", "adjacent_min", 8)
    methods = [seeing, RIVAL["wen norm"], RIVAL["all ones"]]
    default, saw, guessed, all_ones = (row.numbers for row in all_rows(product, CHOSEN, methods))
    assert default["default"]
    assert default["runs"] == 2
    assert default["iou_fixed"] > 0.8
    assert default["iou_fixed"] > all_ones["iou_fixed"] + 0.3
    assert saw["iou_fixed"] > 0.8
    assert saw["pixel_auroc"] > 0.95
    for row in (default, saw):
        assert row["auc_heldout"] == row["tpr1_heldout"] == 1
        assert row["called_stored"] == 1
        assert row["called_learned"] == row["called_constrained"] == 0
    # memorized at the second event, the copy comes there too: not later than it, but not before it either
    assert default["lead_fraction"] == 0
    assert default["lead_events"] == 0
    assert guessed["iou_fixed"] is None
    assert default["called_stored_interval"] == [1, 1]
    assert default["false_alarms_per_run"] == 0
    low, high = guessed["auc_heldout_interval"]
    assert low <= guessed["auc_heldout"] <= high
    assert 0.2 < guessed["auc_heldout"] < 0.8


def test_bootstrap_counts_every_resample_as_often_as_chance(product, monkeypatch):
    results = [*product, RunResult(product[0].run)]
    values = {id(r): x for r, x in zip(results, (0.0, 1.0, 5.0), strict=True)}

    def row_of(_, drawn):
        return dict.fromkeys(INTERVALS, np.mean([values[id(r)] for r in drawn]))

    monkeypatch.setattr(rows_module, "row_of", row_of)
    means = np.random.default_rng(0).choice([0.0, 1.0, 5.0], (100_000, 3)).mean(1)
    low, high = with_intervals(RIVAL["wen norm"], results)["auc_heldout_interval"]
    assert (low, high) == pytest.approx(np.quantile(means, [0.05, 0.95]))


def test_sizes_and_first_alerts(product):
    sizes = size_table(product)
    assert sum(row["stored"] for row in sizes) == 24
    assert sizes[1]["stored"] > 0  # logos are there
    assert sizes[-1]["size"] == "the whole picture"
    assert all(row["called"] == 1 for row in sizes if row["stored"])
    slow = [RunResult(p.run, scores=p.scores, first_alert=dict.fromkeys(p.first_alert, 30)) for p in product]
    rows = [
        Row(m := Method(name, name), with_intervals(m, results), results)
        for name, results in (("memwatch", product), ("clid", slow))
    ]
    ours, theirs = first_alerts_table(rows)
    assert (ours["memwatch_earlier"], theirs["memwatch_earlier"], theirs["memwatch_later"]) == (0, 1, 0)
    assert theirs["showings_at_first_alert"] == pytest.approx(1.5 * ours["showings_at_first_alert"])


def test_worlds_and_runs_with_nothing_planted(product):
    first = world_table(product)[0]
    assert (first["run"], first["large stored"], first["small stored"]) == ("full-0", "8/8", "4/4")
    assert (first["held out"], first["learned"], first["ordinary"]) == ("0/12", "0/6", "0/12")
    assert first["large iou"] > 0.8
    held_out, ordinary, both = null_table(product)  # what was planted in these is no probe of theirs
    assert (held_out["runs"], held_out["probes per run"], both["probes per run"]) == (2, 12, 24)
    assert [row["runs with a memorized"] for row in (held_out, ordinary, both)] == [0, 0, 0]
    assert both["at most (95 %)"] == pytest.approx(1 - 0.05**0.5)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_measured(runs, tmp_path):
    levels = ("61", "adjacent_min", "-", "last of 50", "last of 20")
    few = [m for m in all_methods() if m.level in levels and m.draws in (0, 1, 8)][:8]
    bench.compare(runs, tmp_path / "results", CHOSEN, None, few)
    rows = json.loads((tmp_path / "results" / "bench.json").read_text(encoding="utf-8"))
    assert len(rows) == len(few) + 1
    required = (
        "method signal baseline level draws iou_fixed iou_oracle pixel_auroc auc_heldout tpr1_heldout tpr5_heldout "
        "called_learned called_constrained lead_fraction lead_exposures runs"
    )
    assert all(set(required.split()) <= row.keys() for row in rows)
    assert [row.get("default", False) for row in rows] == [True] + [False] * len(few)
    text = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert f"{rows[0]['iou_fixed']:.3f}" in text
    assert "| full-0 | many captions | 30 |" in text
    assert "8/8" in text  # large stored items
    assert "captions, re-noised, 4 seeds" in text
    assert f"torch {torch.__version__}" in text
    for name in ("levels", "draws", "lead"):
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 1000


def test_plots_without_any_number(product, tmp_path):
    row = {"signal": "both", "baseline": "first", "level": "61", "draws": 8, "iou_fixed": None, "auc_heldout": None}
    plots([row, row | {"level": "mean"}], product, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"levels.png", "draws.png", "lead.png"}


class Descriptor(torch.nn.Module):
    """In place of SSCD: the mean colours of the quarters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript, and the authors of SSCD publish nothing else
def test_a_descriptor_is_asked_about_the_masked_part(runs, tmp_path):
    torch.jit.trace(Descriptor(), torch.rand(2, 3, 288, 288)).save(str(tmp_path / "sscd.pt"))
    sscd = read_sscd(tmp_path / "sscd.pt")
    results = [RunResult(run) for run in finished_runs(runs)]
    assert all(row["sscd"] == pytest.approx(1) for row in stored_table(results, sscd))  # the generations are the items
    (tmp_path / "broken.pt").write_bytes(b"no model")
    with pytest.raises(ValueError, match="--sscd .*broken.pt: not a readable TorchScript model"):
        read_sscd(tmp_path / "broken.pt")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_base_is_found_in_a_clone_or_asked_for(tmp_path, monkeypatch):
    clone = bench.find_base(None)
    assert (clone / "unet").is_dir()
    assert bench.find_base(clone) == clone
    installed = tmp_path / "site-packages" / "memwatch" / "cli" / "bench.py"
    monkeypatch.setattr(bench, "__file__", str(installed))
    monkeypatch.chdir(clone.parents[2])
    assert bench.find_base(None) == clone
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--base: missing, and there is no .*site-packages.*tiny-sd.*; pass"):
        bench.find_base(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "half-0"], f"--runs: got 'half-0', allowed: WORLD-SEED with a world of {', '.join(WORLDS)}"),
        (["--base", "nowhere"], "--base: got 'nowhere', allowed: the folder of a diffusers pipeline"),
        (["--steps", "0"], "--steps: got 0, allowed: 1 or greater"),
        (["--threads", "-1"], "--threads: got -1, allowed: 1 or greater"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path, capsys):
    assert main(["bench", "--output", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err == f"memwatch bench: {message}\n"


def test_no_finished_run(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        bench.compare(tmp_path, tmp_path / "results", MemWatchConfig(), None, [])
