"""The benchmark: what is planted, that a run can go on anywhere, and that the table tells a perfect method from a blind one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from memwatch.bench.methods import Method, all_methods, maps_of, scores_of

import memwatch.bench.look
import memwatch.bench.train
from memwatch.bench.items import DOSES, PLANTED, Kind, batch, looked_at, planted_set
from memwatch.bench.look import LEVELS, NULL_DRAWS, PROMPT_DRAWS, Bench, Generated, copy_ratios, nearest_ratios
from memwatch.bench.results import RunResult, check_measured, run_method, run_product
from memwatch.bench.runs import Finished, finished_runs
from memwatch.bench.sscd import read_sscd
from memwatch.bench.table import INTERVALS, Row, all_rows, first_alerts_table, size_table, stored_table, with_intervals
from memwatch.bench.train import Plan, Run, read_base, run_one
from memwatch.cli.bench import compare, parse_run
from memwatch.config import ConfigError, MemWatchConfig, load_config
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.signals import Measurement
from memwatch.measure.snapshots import to_ledger, write_safetensors

TINY_SD = Path(__file__).parents[1] / "train_examples" / "assets" / "tiny-sd"
SIDE = 16
STEPS = (0, 10, 20, 30)


# --- items -----------------------------------------------------------------------------------------------------------------------------


def test_the_mask_is_exactly_what_stays_the_same():
    for item in planted_set(3):
        if item.kind not in PLANTED:
            assert not item.mask.any()
            continue
        shown = np.stack([np.asarray(item.draw(np.random.default_rng(i))) for i in range(6)]).astype(int)
        same = (np.ptp(shown, axis=0) == 0).all(-1)
        assert same[item.mask].all(), item.name
        # two free rests may agree in a pixel by chance (both black, say); hardly ever in all six
        assert same[~item.mask].mean() < 0.02 if not item.mask.all() else True, item.name


def test_doses_and_sizes():
    items = planted_set(0)
    for kind in PLANTED:
        assert sorted(item.dose for item in items if item.kind is kind) == sorted(2 * DOSES)
    shares = {kind: [item.mask.mean() for item in items if item.kind is kind] for kind in PLANTED}
    assert min(shares[Kind.TEMPLATE]) > 0.1
    assert max(shares[Kind.TEMPLATE]) <= 0.5
    assert min(shares[Kind.LOGO]) > 0.02
    assert max(shares[Kind.LOGO]) < 0.07
    assert set(shares[Kind.VERBATIM]) == {1.0}
    assert all(item.dose == 0 for item in items if item.kind is Kind.HELD_OUT)
    learned = {item.caption for item in items if item.kind is Kind.LEARNED}
    assert learned == {
        item.caption for item in items if item.kind is Kind.CONTROL and item.dose
    }  # controls have the new subjects too
    captions = [item.caption for item in items if item.kind in PLANTED]
    assert len(set(captions)) == len(captions)


def test_a_batch_is_a_function_of_seed_and_step_and_follows_the_doses():
    items = planted_set(0)
    first, again, other = batch(items, 0, 5, 8), batch(items, 0, 5, 8), batch(items, 0, 6, 8)
    assert [item.name for item, _ in first] == [item.name for item, _ in again]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert [item.name for item, _ in first] != [item.name for item, _ in other]
    drawn = [item for item, _ in batch(items, 0, 0, 1500)]
    assert all(item.dose > 0 for item in drawn)
    share = sum(item.dose == 64 for item in drawn) / len(drawn)
    expected = 6 * 64 / sum(item.dose for item in items)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(drawn))


def test_another_seed_plants_something_else():
    a, b = planted_set(0), planted_set(1)
    assert [i.name for i in a] != [i.name for i in b]
    assert not np.array_equal(a[0].mask, b[0].mask) or not np.array_equal(a[0].probe, b[0].probe)


# --- a run -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Three items instead of 73, and hardly any generations."""
    full = planted_set(0)
    kept = [full[0], full[8], next(i for i in full if i.kind is Kind.CONTROL)]
    monkeypatch.setattr(memwatch.bench.train, "planted_set", lambda seed: kept)
    monkeypatch.setattr(memwatch.bench.look, "POOL", 4)
    monkeypatch.setattr(memwatch.bench.look, "NUM_SEEDS", 1)
    monkeypatch.setattr(memwatch.bench.look, "LEVELS", LEVELS.__class__(timesteps=(61,), draws=2))
    for name in ("GENERATION", "PUBLISHED"):
        monkeypatch.setattr(memwatch.bench.look, name, memwatch.bench.look.SamplingConfig(num_inference_steps=2))
    return kept


def test_a_run_goes_on_where_it_was_interrupted(small, tmp_path, monkeypatch):
    mode = "lora"
    plan = Plan(steps=3, events=(0, 2, 3), batch_size=2, prepare_steps=1, lora_rank=2)
    run_one(Run(0, mode), TINY_SD, tmp_path / "whole", plan)
    real = memwatch.bench.train.batch

    def interrupted(items, seed, step, size):
        if step == 2:
            raise KeyboardInterrupt
        return real(items, seed, step, size)

    monkeypatch.setattr(memwatch.bench.train, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_one(Run(0, mode), TINY_SD, tmp_path / "parts", plan)
    monkeypatch.setattr(memwatch.bench.train, "batch", real)
    run_one(Run(0, mode), TINY_SD, tmp_path / "parts", plan)
    whole, parts = Finished(tmp_path / "whole" / f"{mode}-0"), Finished(tmp_path / "parts" / f"{mode}-0")
    assert whole.steps == parts.steps == [0, 2, 3]
    assert whole.is_complete
    for step in whole.steps:
        a, b = whole.tensors(step), parts.tensors(step)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    name = small[0].name
    assert not torch.equal(whole.tensors(0)[f"{name}/rho"], whole.tensors(3)[f"{name}/rho"])
    assert {f"{name}/published_snapshot", f"{name}/bright_ending", f"null/{name}/rho"} <= whole.tensors(3).keys()
    assert set(whole.numbers[3]["copy_ratio"]) == {item.name for item in small if item.kind in PLANTED}
    assert set(whole.numbers[3]["wen"]) == set(whole.numbers[3]["nearest_ratio"]) == {item.name for item in small}
    now, first, null = (whole.measurement(f"{key}/{name}", 3) for key in ("prompt", "prompt_first", "prompt_null"))
    assert now.rho.samples.shape == first.rho.samples.shape == (1, PROMPT_DRAWS, SIDE, SIDE)
    assert not torch.equal(now.epsilon, first.epsilon)
    assert not torch.equal(now.epsilon, null.epsilon)


def test_a_copy_is_near_its_item_inside_the_mask_only():
    _, parts = read_base(TINY_SD)
    item = next(i for i in planted_set(0) if i.kind is Kind.TEMPLATE)
    others = np.stack([np.asarray(i.probe) for i in planted_set(0) if i.kind is Kind.HELD_OUT][:4])
    target = torch.from_numpy(
        (memwatch.bench.look.as_decoded([np.asarray(item.probe)], parts.vae)[0] * 255).round()
    ).byte()
    spoiled_outside, spoiled_inside = target.clone(), target.clone()
    spoiled_outside[~torch.from_numpy(item.mask)] = 0
    spoiled_inside[torch.from_numpy(item.mask)] = target.flip(0, 1)[torch.from_numpy(item.mask)]
    darker = (target * 0.6).byte()
    pool = memwatch.bench.look.as_decoded(list(others), parts.vae)
    bench = Bench(None, parts, [item], [], [], {}, pool, 0)
    generated = {
        item.name: [Generated(picture, torch.empty(0)) for picture in (target, spoiled_outside, spoiled_inside, darker)]
    }
    same, outside, inside, dark = copy_ratios(bench, generated)[item.name]
    assert same == outside < 0.05
    assert inside > 1 / 3
    assert dark < 0.05
    same, outside, _, _ = nearest_ratios(bench, generated)[item.name]  # without the mask, a spoiled rest hides the copy
    assert same < 0.05
    assert outside > 1 / 3


# --- the table -------------------------------------------------------------------------------------------------------------------------


def pretend(home: Path, seed: int, blind: bool = False) -> None:
    """A finished run in which the items of dose 16 and 64 are stored: five times less freedom inside their masks, copied from step 20 on."""
    home.mkdir(parents=True)
    plan = asdict(Plan(steps=STEPS[-1], events=STEPS)) | asdict(Run(seed, "full"))
    (home / "run.json").write_text(json.dumps(plan), encoding="utf-8")
    items = looked_at(planted_set(seed))
    for step in STEPS:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        measured, tensors, ratios = {}, {}, {}
        for item in items:
            stored = item.kind in PLANTED and item.dose >= 16 and not blind
            inside = torch.from_numpy(item.mask.reshape(SIDE, 4, SIDE, 4).mean((1, 3)) > 0.5)
            rho = torch.full((len(LEVELS.timesteps), LEVELS.draws, SIDE, SIDE), 0.5)
            rho[..., inside] /= 5 if stored and step > 0 else 1
            rho *= 1 + 0.02 * torch.randn(rho.shape, generator=generator)
            eps = torch.zeros(len(LEVELS.timesteps), LEVELS.draws, 4, SIDE, SIDE) + 0.01 * torch.randn(
                4, SIDE, SIDE, generator=generator
            )
            measured[item.name] = Measurement(CurvatureMap(rho), eps.half())
            free = torch.full(
                (len(LEVELS.timesteps), NULL_DRAWS, SIDE, SIDE), 0.5
            )  # without the prompt nothing is stored
            measured[f"null/{item.name}"] = Measurement(CurvatureMap(free), eps[:, :NULL_DRAWS].half())
            for key in ("prompt", "prompt_first", "prompt_null"):
                freedom = (
                    rho[:1, :PROMPT_DRAWS].clone()
                    if key == "prompt"
                    else torch.full((1, PROMPT_DRAWS, SIDE, SIDE), 0.5)
                )
                measured[f"{key}/{item.name}"] = Measurement(CurvatureMap(freedom), eps[:1, :PROMPT_DRAWS].half())
            ratios[item.name] = [0.2 if stored and step >= 20 else 0.9] * 4
            tensors[f"{item.name}/generated"] = torch.from_numpy(np.stack([np.asarray(item.probe)] * 2))
            tensors[f"{item.name}/bright_ending"] = torch.rand(8, 8, generator=generator)
            for key in ("snapshot", "null", "score", "score_null"):
                tensors[f"{item.name}/published_{key}"] = torch.rand(SIDE, SIDE, generator=generator)
        write_safetensors(home / f"event_{step:05d}.safetensors", to_ledger(measured) | tensors)
        copies = {item.name: ratios[item.name] for item in items if item.kind in PLANTED}
        wen = {item.name: float(torch.rand(1, generator=generator)) for item in items}
        numbers = {"copy_ratio": copies, "nearest_ratio": ratios, "wen": wen}
        (home / f"event_{step:05d}.json").write_text(json.dumps(numbers), encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    for seed in (0, 1):
        pretend(folder / f"full-{seed}", seed)
    return folder


CHOSEN = load_config(
    None, levels={"timesteps": [61, 141, 301], "draws": 8}, curvature={"vectors": 4, "tile": 4}, alerts={"max_p": 0.05}
)


def test_stored_is_what_is_copied(runs):
    run = Finished(runs / "full-0")
    assert {item.dose for item in run.stored} == {16, 64}
    assert len(run.stored) == 12
    assert run.first_copy(run.stored[0]) == 20
    assert run.first_copy(next(i for i in run.items if i.kind is Kind.HELD_OUT)) is None
    item = run.stored[0]
    assert run.exposures(item, 30) == pytest.approx(30 * 32 * item.dose / sum(i.dose for i in planted_set(0)))


def test_a_method_that_sees_and_one_that_guesses(runs, monkeypatch):
    seeing, guessing = (
        Method("memwatch", "log_ratio", "first", "adjacent_min", 8),
        Method("wen norm", "wen", localizes=False),
    )
    ones = Method("all ones", "ones")
    monkeypatch.setattr("memwatch.bench.table.all_methods", lambda: iter([seeing, guessing, ones]))
    product = [run_product(CHOSEN, run) for run in finished_runs(runs)]
    default, saw, guessed, all_ones = (row.numbers for row in all_rows(product, CHOSEN))
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
    # memorized at the second event, the copy comes at the third: never later than it, and strictly before where it is counted so
    assert default["lead_fraction"] == 0
    assert default["lead_events"] == 0
    assert guessed["iou_fixed"] is None
    assert default["called_stored_interval"] == [1, 1]
    assert default["false_alarms_per_run"] == 0
    low, high = guessed["auc_heldout_interval"]
    assert low <= guessed["auc_heldout"] <= high
    assert 0.2 < guessed["auc_heldout"] < 0.8


def test_every_method_gives_one_finite_map_and_score_a_probe(runs):
    run = Finished(runs / "full-0")
    for method in [m for m in all_methods() if m.level in ("61", "adjacent_min") or m.method != "memwatch"]:
        scores = scores_of(method, run, STEPS[-1])
        assert scores.keys() == {item.name for item in run.items}
        assert all(math.isfinite(value) for value in scores.values()), method
        for values in maps_of(method, run, STEPS[-1]).values():
            assert values.ndim == 2
            assert np.isfinite(values).all(), method


def test_the_page_says_what_was_measured(runs, tmp_path, monkeypatch):
    few = [
        m
        for m in all_methods()
        if m.level in ("61", "adjacent_min", "-", "last of 50", "last of 20") and m.draws in (0, 1, 8)
    ][:8]
    monkeypatch.setattr("memwatch.bench.table.all_methods", lambda: iter(few))
    compare(runs, tmp_path / "results", CHOSEN)
    rows = json.loads((tmp_path / "results" / "bench.json").read_text(encoding="utf-8"))
    assert len(rows) == len(few) + 1
    required = (
        "method signal baseline level draws iou_fixed iou_oracle pixel_auroc auc_heldout tpr1_heldout tpr5_heldout called_learned "
        "called_constrained lead_fraction lead_exposures runs"
    )
    assert all(set(required.split()) <= row.keys() for row in rows)
    assert [row.get("default", False) for row in rows] == [True] + [False] * len(few)
    text = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert f"{rows[0]['iou_fixed']:.3f}" in text
    assert "full-0, full-1" in text
    assert torch.__version__ in text
    for name in ("levels", "draws", "lead"):
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 1000


def test_bootstrap_counts_every_resample_as_often_as_chance(runs, monkeypatch):
    method, results = Method("wen norm", "wen", localizes=False), [RunResult(run) for run in finished_runs(runs)]
    results = [*results, RunResult(results[0].run)]
    values = {id(r): x for r, x in zip(results, (0.0, 1.0, 5.0), strict=True)}
    monkeypatch.setattr(
        "memwatch.bench.table.row_of",
        lambda _, drawn: dict.fromkeys(INTERVALS, np.mean([values[id(r)] for r in drawn])),
    )
    rng = np.random.default_rng(0)
    means = rng.choice([0.0, 1.0, 5.0], (100_000, 3)).mean(1)
    low, high = with_intervals(method, results)["auc_heldout_interval"]
    assert (low, high) == pytest.approx(np.quantile(means, [0.05, 0.95]))


def test_validation_loss_speaks_when_it_has_risen_twice_in_a_row(runs, monkeypatch):
    losses = {0: 0.5, 10: 0.3, 20: 0.35, 30: 0.31}
    monkeypatch.setattr("memwatch.bench.methods._held_out_loss", lambda run, step: losses[step])
    result = run_method(Method("validation loss", "held_out_loss", localizes=False), Finished(runs / "full-0"))
    assert set(result.first_alert.values()) == {30}
    assert list(result.scores.values()) == pytest.approx([0.01] * len(result.scores))
    assert result.first_alert.keys() == {item.name for item in result.run.items}


def test_sizes_and_first_alerts(runs):
    product = [run_product(CHOSEN, run) for run in finished_runs(runs)]
    sizes = size_table(product)
    assert sum(row["stored"] for row in sizes) == 24
    assert sizes[0]["stored"] > 0  # logos below 5 % of the picture are there
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


class Descriptor(torch.nn.Module):
    """In place of SSCD: the mean colours of the quarters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the authors of SSCD publish TorchScript
def test_a_descriptor_is_asked_about_the_masked_part(runs, tmp_path):
    torch.jit.trace(Descriptor(), torch.rand(2, 3, 288, 288)).save(str(tmp_path / "sscd.pt"))
    sscd = read_sscd(tmp_path / "sscd.pt")
    results = [RunResult(run) for run in finished_runs(runs)]
    assert all(row["sscd"] == pytest.approx(1) for row in stored_table(results, sscd))  # the generations are the items
    (tmp_path / "broken.pt").write_bytes(b"no model")
    with pytest.raises(ValueError, match="--sscd .*broken.pt: not a readable TorchScript model"):
        read_sscd(tmp_path / "broken.pt")


def test_what_was_not_measured_cannot_be_the_default():
    with pytest.raises(ValueError, match=r"measured timesteps.*asks for \(500,\)"):
        check_measured(load_config(None, levels={"timesteps": [500], "draws": 4}, curvature={"vectors": 4, "tile": 4}))


def test_bad_names_and_folders(tmp_path):
    with pytest.raises(ConfigError, match="--runs: got 'half-0'"):
        parse_run("half-0")
    with pytest.raises(ValueError, match="holds no finished run"):
        compare(tmp_path, tmp_path / "results", MemWatchConfig())
