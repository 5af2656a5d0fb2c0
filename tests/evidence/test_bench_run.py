"""A run: it goes on where it was interrupted, goes on for what is called and not copied, and tells a copy from none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evidence.runs import event, protocol, train
from evidence.runs import generations as copies
from evidence.runs.finished import Finished
from evidence.runs.train import Run, commit, run_one
from evidence.runs.trainer import Trainer
from evidence.worlds import bases
from evidence.worlds.bases import BASES, read_base, read_parts
from evidence.worlds.items import Kind
from evidence.worlds.sets import many_captions
from evidence.worlds.sources import photographs
from evidence.worlds.world import WORLDS, Plan

from memwatch.config import CurvatureConfig, LevelsConfig, SamplingConfig
from memwatch.measure.copies import copy_ratios

TINY_SD = Path(__file__).parents[2] / "train_examples" / "assets" / "tiny-sd"
PLAN = Plan(steps=4, events=(0, 2, 4), batch_size=2, lora_rank=2)


@pytest.fixture
def small(monkeypatch):
    """Three items instead of 72, hardly any generations, and as few noisy latents and test vectors as there can be."""
    full = many_captions(0, photographs())
    kept = [full[0], *[next(i for i in full if i.kind is kind) for kind in (Kind.CONTROL, Kind.HELD_OUT)]]
    monkeypatch.setitem(WORLDS, "captions", replace(WORLDS["captions"], make=lambda seed, source: kept))
    monkeypatch.setattr(protocol, "POOL", 4)
    monkeypatch.setattr(event, "PUBLISHED_VECTORS", 1)
    quick = SamplingConfig(num_inference_steps=2)
    monkeypatch.setattr(event, "GUIDED", {"published": quick, "verified": quick})
    monkeypatch.setattr(copies.generate, "__defaults__", (quick, None))
    levels, curvature = LevelsConfig(timesteps=(141,), draws=4), CurvatureConfig(vectors=1, tile=1)
    for module in (protocol, event, train.Finished.observation.__globals__):
        target = module if isinstance(module, dict) else vars(module)
        for name, value in (("LEVELS", levels), ("CURVATURE", curvature)):
            if name in target:
                monkeypatch.setitem(target, name, value)
    return kept


def test_a_run_goes_on_where_it_was_interrupted(small, tmp_path, monkeypatch):
    run_one(Run(0, "captions"), TINY_SD, tmp_path / "whole", PLAN)
    real = train.batch

    def interrupted(items, seed, step, *how):
        if step == 3:
            raise KeyboardInterrupt
        return real(items, seed, step, *how)

    monkeypatch.setattr(train, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_one(Run(0, "captions"), TINY_SD, tmp_path / "parts", PLAN)
    assert not Finished(tmp_path / "parts" / "captions-0").is_complete
    monkeypatch.setattr(train, "batch", real)
    run_one(Run(0, "captions"), TINY_SD, tmp_path / "parts", PLAN)
    whole, parts = Finished(tmp_path / "whole" / "captions-0"), Finished(tmp_path / "parts" / "captions-0")
    assert whole.steps == parts.steps == [0, 2, 4]
    assert whole.is_complete
    assert whole.plan["commit"] == commit()
    for step in whole.steps:
        a, b = whole.tensors(step), parts.tensors(step)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    name = small[0].name
    assert not torch.equal(whole.tensors(0)[f"{name}/rho"], whole.tensors(4)[f"{name}/rho"])
    assert {f"screen/{name}/epsilon", f"screen/null/{name}/epsilon", f"null/{name}/rho"} <= whole.tensors(4).keys()
    assert {f"{name}/{how}/snapshot" for how in event.GUIDED} <= whole.tensors(4).keys()
    assert set(whole.numbers[2]["copy_ratio"]) == {name}  # of what is trained on; of everything at the end
    assert set(whole.numbers[4]["copy_ratio"]) == {item.name for item in small}


def test_a_finished_run_is_left_alone_and_an_uncopied_call_goes_on(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "unfinished", lambda run: [small[0]])
    run_one(Run(0, "captions"), TINY_SD, tmp_path, PLAN)
    run = Finished(tmp_path / "captions-0")
    assert run.later_steps == [6, 8]
    assert set(run.numbers[8]["copy_ratio"]) == {small[0].name}
    monkeypatch.setattr(train, "Training", None)  # would fail if it were asked again
    run_one(Run(0, "captions"), TINY_SD, tmp_path, PLAN)


def test_ratios_of_many_items_are_those_of_each():
    """Against the product's own rule, one item after the other."""
    parts = read_parts(BASES["tiny-sd"], TINY_SD)
    items = [i for i in many_captions(0, photographs()) if i.watched][:14]
    rng = np.random.default_rng(0)
    pool = protocol.as_decoded([np.asarray(photographs().free(rng)) for _ in range(8)], parts.vae)
    bench = bench_of(items, pool, parts)
    pictures = torch.from_numpy(np.stack([np.asarray(photographs().free(rng)) for _ in range(3)]))
    made = dict.fromkeys((i.name for i in items), generated(pictures))
    found, nearest = copies.copy_ratios(bench, made), copies.nearest_ratios(bench, made)
    for item in items:
        mask = item.mask if item.mask.any() else ~item.mask
        target, shown = bench.targets[item.name], pictures.numpy() / 255
        assert found[item.name] == pytest.approx(copy_ratios(target, shown, pool, mask)), item.name
        assert nearest[item.name] == pytest.approx(copy_ratios(target, shown, pool, np.ones_like(mask))), item.name


def bench_of(items, pool, parts):
    return protocol.Bench(type("Pixels", (), {"in_pixels": False})(), parts, items, [], [], None, pool, 0)


def generated(pictures):
    return [copies.Generated(p, torch.empty(0), 1.0, 0.0) for p in pictures]


@pytest.mark.parametrize("name", BASES)
def test_every_base_learns_and_is_read_back(name, tmp_path, monkeypatch):
    """Three steps of each prediction type; the second reading finds the file."""
    made = []
    monkeypatch.setitem(BASES, name, replace(BASES[name], source=photographs, steps=3, batch_size=2))
    real = bases.train_base
    monkeypatch.setattr(bases, "train_base", lambda *args: (made.append(args[0]), real(*args)))
    first, second = (read_base(name, TINY_SD, tmp_path)[0] for _ in range(2))
    assert made == ([] if name == "tiny-sd" else [name])
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    parts = read_base(name, TINY_SD, tmp_path)[1]
    assert (parts.vae is None) == second.in_pixels


@pytest.mark.parametrize("name", BASES)
def test_a_perfect_network_has_no_loss(name, monkeypatch):
    """The target of each prediction type, against the epsilon that the denoiser makes of it."""
    base = BASES[name]
    parts = read_parts(base, TINY_SD)
    schedule = bases.NoiseSchedule.from_scheduler(parts.scheduler)
    network = torch.nn.Linear(1, 1)
    denoiser = base.family(network, schedule)
    trainer = Trainer(denoiser, parts, 10, 1e-3, seed=0)
    generator = torch.Generator().manual_seed(0)
    latents, eps = (torch.randn(5, 4, 2, 2, generator=generator) for _ in range(2))
    timesteps = torch.tensor([1, 100, 400, 700, 990])
    x = schedule.add_noise(latents, eps, timesteps)
    assert torch.allclose(schedule.epsilon(trainer._target(latents, eps, timesteps), x, timesteps), eps, atol=1e-5)
