"""A run: it goes on where it was interrupted, goes on for what is called and not copied, and tells a copy from none."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evidence.runs import event, finished, protocol, train
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
from support.builders import assert_same

from memwatch.config import CurvatureConfig, LevelsConfig, SamplingConfig
from memwatch.proof.copies import copy_ratios

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
    for module in (protocol, event, finished):
        monkeypatch.setattr(module, "LEVELS", levels, raising=False)
        monkeypatch.setattr(module, "CURVATURE", curvature, raising=False)
    return kept


def test_a_run_goes_on_where_it_was_interrupted_and_for_what_is_not_copied(small, tmp_path, monkeypatch):
    run, name, real = Run(0, "captions"), small[0].name, train.batch
    monkeypatch.setattr(train, "unfinished", lambda run: [small[0]])
    run_one(run, TINY_SD, tmp_path / "whole", PLAN)

    def interrupted(items, seed, step, *how):
        if step == 3:
            raise KeyboardInterrupt
        return real(items, seed, step, *how)

    monkeypatch.setattr(train, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_one(run, TINY_SD, tmp_path / "parts", PLAN)
    monkeypatch.setattr(train, "batch", real)
    assert not Finished(tmp_path / "parts" / run.name).is_complete
    run_one(run, TINY_SD, tmp_path / "parts", PLAN)
    monkeypatch.setattr(train, "Training", None)  # would fail if a finished run were trained again
    run_one(run, TINY_SD, tmp_path / "parts", PLAN)
    whole, parts = (Finished(tmp_path / folder / run.name) for folder in ("whole", "parts"))
    assert whole.is_complete
    assert whole.plan["commit"] == commit()
    assert whole.steps == parts.steps == [0, 2, 4]
    assert whole.later_steps == parts.later_steps == [6, 8]
    for step in whole.steps:
        assert_same(whole.tensors(step), parts.tensors(step))
    assert not torch.equal(whole.tensors(0)[f"{name}/rho"], whole.tensors(4)[f"{name}/rho"])
    assert {f"screen/{name}/epsilon", f"screen/null/{name}/epsilon", f"null/{name}/rho"} <= whole.tensors(4).keys()
    assert {f"{name}/{how}/snapshot" for how in event.GUIDED} <= whole.tensors(4).keys()
    copied = {step: set(whole.numbers[step]["copy_ratio"]) for step in (2, 4, 8)}
    assert copied == {2: {name}, 4: {item.name for item in small}, 8: {name}}  # at the end, of all that is looked at


def test_ratios_of_many_items_are_those_of_each():
    """Against the product's own rule, one item after the other."""
    parts = read_parts(BASES["tiny-sd"], TINY_SD)
    items = [i for i in many_captions(0, photographs()) if i.watched][:14]
    rng = np.random.default_rng(0)
    pool = protocol.as_decoded([np.asarray(photographs().free(rng)) for _ in range(8)], parts.vae)
    bench = protocol.Bench(SimpleNamespace(in_pixels=False), parts, items, [], [], None, pool, 0)
    pictures = torch.from_numpy(np.stack([np.asarray(photographs().free(rng)) for _ in range(3)]))
    generated = [copies.Generated(p, torch.empty(0), 1.0, 0.0) for p in pictures]
    made = {item.name: generated for item in items}
    found, nearest = copies.copy_ratios(bench, made), copies.nearest_ratios(bench, made)
    for item in items:
        mask = item.mask if item.mask.any() else ~item.mask
        target, shown = bench.targets[item.name], pictures.numpy() / 255
        assert found[item.name] == pytest.approx(copy_ratios(target, shown, pool, mask)), item.name
        assert nearest[item.name] == pytest.approx(copy_ratios(target, shown, pool, np.ones_like(mask))), item.name


@pytest.mark.parametrize("name", BASES)
def test_every_base_learns_and_is_read_back(name, tmp_path, monkeypatch):
    """Three steps of each prediction type; the second reading finds the file."""
    made = []
    monkeypatch.setitem(BASES, name, replace(BASES[name], source=photographs, steps=3, batch_size=2))
    real = bases.train_base
    monkeypatch.setattr(bases, "train_base", lambda *args: (made.append(args[0]), real(*args)))
    (first, _), (second, parts) = (read_base(name, TINY_SD, tmp_path) for _ in range(2))
    assert made == ([] if name == "tiny-sd" else [name])
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert (parts.vae is None) == second.in_pixels


@pytest.mark.parametrize("name", BASES)
def test_a_perfect_network_has_no_loss(name):
    """The target of each prediction type, against the epsilon that the denoiser makes of it."""
    base = BASES[name]
    parts = read_parts(base, TINY_SD)
    schedule = bases.NoiseSchedule.from_scheduler(parts.scheduler)
    trainer = Trainer(base.family(torch.nn.Linear(1, 1), schedule), parts, 10, 1e-3, seed=0)
    generator = torch.Generator().manual_seed(0)
    latents, eps = (torch.randn(5, 4, 2, 2, generator=generator) for _ in range(2))
    timesteps = torch.tensor([1, 100, 400, 700, 990])
    x = schedule.add_noise(latents, eps, timesteps)
    assert torch.allclose(schedule.epsilon(trainer._target(latents, eps, timesteps), x, timesteps), eps, atol=1e-5)
