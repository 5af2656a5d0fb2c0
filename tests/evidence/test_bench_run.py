"""A run goes on where it was interrupted, bit for bit, and keeps of every event what the page needs."""

from dataclasses import replace
from pathlib import Path

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
from support.builders import assert_same

from memwatch.config import CurvatureConfig, LevelsConfig, SamplingConfig

TINY_SD = Path(__file__).parents[2] / "train_examples" / "assets" / "tiny-sd"
PLAN = Plan(steps=4, every=2, batch_size=2, lora_rank=2, timesteps=(141,), curvature=True)


@pytest.fixture
def small(monkeypatch):
    """Four items, hardly any generations, and as few noisy latents and test vectors as there can be."""
    full = many_captions(0, photographs())
    planted = [next(i for i in full if i.name.startswith("large") and i.half == half) for half in "ab"]
    kept = [*planted, *[next(i for i in full if i.kind is kind) for kind in (Kind.CONTROL, Kind.HELD_OUT)]]
    monkeypatch.setitem(WORLDS, "captions", replace(WORLDS["captions"], make=lambda seed, source: kept))
    monkeypatch.setattr(copies, "GENERATION", SamplingConfig(num_inference_steps=2))
    monkeypatch.setattr(copies, "NUM_SEEDS", 2)
    monkeypatch.setattr(protocol, "TRUTH", LevelsConfig(timesteps=(100,), draws=2))
    monkeypatch.setattr(event, "CURVATURE", CurvatureConfig(vectors=1, tile=1))
    return kept


def test_a_run_goes_on_where_it_was_interrupted(small, tmp_path, monkeypatch):
    run, (own, other, _, held_out), real = Run(0, "captions", "a"), [i.name for i in small], train.batch
    run_one(run, TINY_SD, tmp_path / "whole", PLAN)

    def interrupted(items, half, seed, step, *how):
        if step == 3:
            raise KeyboardInterrupt
        return real(items, half, seed, step, *how)

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
    assert (whole.plan["commit"], whole.half) == (commit(), "a")
    assert whole.steps == parts.steps == [0, 2, 4]
    for step in whole.steps:
        assert_same(whole.tensors(step), parts.tensors(step))
    assert not torch.equal(whole.tensors(0)[f"{own}/rho"], whole.tensors(4)[f"{own}/rho"])
    kept = {step: set(whole.tensors(step)) for step in whole.steps}
    assert {f"{name}/epsilon" for name in (own, other, f"null/{own}", held_out)} <= kept[2]
    assert {step for step in kept if f"{own}/rho" in kept[step] and f"null/{own}/rho" in kept[step]} == {0, 4}
    assert {step for step in kept if f"truth/{other}" in kept[step]} == {0, 4}
    generated = {step: {key for key in kept[step] if key.endswith("/generated")} for step in kept}
    assert generated[2] == {f"{own}/generated"}
    assert generated[4] == {f"{name}/generated" for name in (own, other, held_out)}


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
