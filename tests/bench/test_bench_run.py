"""A run: it goes on where it was interrupted, and tells a copy from what is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memwatch.bench import copies, look, protocol, train
from memwatch.bench.items import PLANTED, Kind, planted_set
from memwatch.bench.runs import Finished
from memwatch.bench.train import Run, read_base, run_one
from memwatch.bench.worlds import WORLDS, Plan
from memwatch.config import CurvatureConfig, LevelsConfig, SamplingConfig

TINY_SD = Path(__file__).parents[2] / "train_examples" / "assets" / "tiny-sd"
SIDE = 16


@pytest.fixture
def small(monkeypatch):
    """Two items instead of 75, hardly any generations and prompts, and as few test vectors as there can be."""
    full = planted_set(0)
    kept = [full[8], next(i for i in full if i.kind is Kind.CONTROL)]
    world = replace(
        WORLDS["lora"], items=lambda seed: kept, levels=LevelsConfig(timesteps=(61,), draws=2), prompts=True
    )
    monkeypatch.setitem(WORLDS, "lora", world)
    monkeypatch.setattr(protocol, "POOL", 4)
    monkeypatch.setattr(protocol, "NUM_PROMPTS", {"prompt-control": 1})
    monkeypatch.setattr(look, "RENOISED", (61,))
    monkeypatch.setattr(look, "SEED_DRAWS", (2, 1))
    monkeypatch.setattr(copies, "NUM_SEEDS", 1)
    monkeypatch.setattr(look, "CURVATURE", CurvatureConfig(vectors=1, tile=1))
    monkeypatch.setattr(look, "PUBLISHED_VECTORS", 1)
    for module, name in ((copies, "GENERATION"), (look, "GENERATION"), (look, "PUBLISHED")):
        monkeypatch.setattr(module, name, SamplingConfig(num_inference_steps=2))
    return kept


def test_a_run_goes_on_where_it_was_interrupted(small, tmp_path, monkeypatch):
    mode = "lora"
    plan = Plan(steps=3, events=(2, 3), batch_size=2, prepare_steps=1, lora_rank=2)
    run_one(Run(0, mode), TINY_SD, tmp_path / "whole", plan)
    real = train.batch

    def interrupted(items, seed, step, *how):
        if step == 2:
            raise KeyboardInterrupt
        return real(items, seed, step, *how)

    monkeypatch.setattr(train, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_one(Run(0, mode), TINY_SD, tmp_path / "parts", plan)
    monkeypatch.setattr(train, "batch", real)
    run_one(Run(0, mode), TINY_SD, tmp_path / "parts", plan)
    whole, parts = Finished(tmp_path / "whole" / f"{mode}-0"), Finished(tmp_path / "parts" / f"{mode}-0")
    assert whole.steps == parts.steps == [2, 3]
    assert whole.is_complete
    for step in whole.steps:
        a, b = whole.tensors(step), parts.tensors(step)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    name = small[0].name
    assert not torch.equal(whole.tensors(2)[f"{name}/rho"], whole.tensors(3)[f"{name}/rho"])
    assert {f"{name}/published_snapshot", f"{name}/bright_ending", f"null/{name}/rho"} <= whole.tensors(3).keys()
    assert set(whole.numbers[3]["copy_ratio"]) == {item.name for item in small if item.kind in PLANTED}
    assert set(whole.numbers[3]["wen"]) == set(whole.numbers[3]["nearest_ratio"]) == {item.name for item in small}
    now, first, null = (whole.measurement(f"{key}/{name}", 3) for key in ("prompt", "prompt_first", "prompt_null"))
    assert now.rho.samples.shape == first.rho.samples.shape == (1, protocol.PROMPT_DRAWS, SIDE, SIDE)
    assert not torch.equal(now.epsilon, first.epsilon)
    assert not torch.equal(now.epsilon, null.epsilon)
    keys = {"renoised", "renoised_null", "renoised_first", "renoised_first_null"}
    assert {f"{key}/{n}/{seed}/rho" for key in keys for n in (name, "prompt-control-00") for seed in (0, 1)} <= set(b)
    renoised = {key: whole.measurement(f"{key}/{name}/0", 3).epsilon for key in keys}
    assert len({value.numpy().tobytes() for value in renoised.values()}) == 4


def test_a_copy_is_near_its_item_inside_the_mask_only():
    _, parts = read_base(TINY_SD)
    item = next(i for i in planted_set(0) if i.kind is Kind.TEMPLATE)
    others = np.stack([np.asarray(i.probe) for i in planted_set(0) if i.kind is Kind.HELD_OUT][:4])
    decoded = protocol.as_decoded([np.asarray(item.probe)], parts.vae)[0]
    target = torch.from_numpy((decoded * 255).round()).byte()
    spoiled_outside, spoiled_inside = target.clone(), target.clone()
    spoiled_outside[~torch.from_numpy(item.mask)] = 0
    spoiled_inside[torch.from_numpy(item.mask)] = target.flip(0, 1)[torch.from_numpy(item.mask)]
    darker = (target * 0.6).byte()
    pool = protocol.as_decoded(list(others), parts.vae)
    bench = protocol.Bench(None, parts, [item], [], [], [], {}, pool, 0)
    pictures = (target, spoiled_outside, spoiled_inside, darker)
    generated = {item.name: [copies.Generated(picture, torch.empty(0)) for picture in pictures]}
    same, outside, inside, dark = copies.copy_ratios(bench, generated)[item.name]
    assert same == outside < 0.05
    assert inside > 1 / 3
    assert dark < 0.05
    same, outside, _, _ = copies.nearest_ratios(bench, generated)[
        item.name
    ]  # without the mask, a spoiled rest hides the copy
    assert same < 0.05
    assert outside > 1 / 3
