"""Models sharded over two gloo processes: training stays bit-identical, and the maps are those of whole models (DDP)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from conftest import Loop, history, maps, on_two_ranks, picture

from memwatch import ConfigError, Probe

PICTURES = [Probe("a cat", picture(0), name="cat"), Probe("a dog", picture(1), name="dog")]
POSTER = Probe("a poster", seed=3, name="poster")
CONTROLS = [Probe("held out", picture(9), name="h")]
BLOCKS = ["BasicTransformerBlock", "ResnetBlock2D"]
SETS = {"torch": ("ddp", "fsdp2", "fsdp1"), "deepspeed": ("ddp", "zero2", "zero3")}
WAYS = {"full": ({}, "first"), "lora": ({"lora": True}, "base")}


class Sharded(Loop):
    """accelerate reaches FSDP and DeepSpeed on GPUs only, so they are switched on behind its back."""

    def __init__(self, held: str, *args: Any, **kwargs: Any) -> None:
        self.held = held
        super().__init__(*args, **kwargs)

    def make_accelerator(self, **options: Any) -> Accelerator:
        if self.held.startswith("zero"):
            from accelerate import DeepSpeedPlugin

            PartialState(cpu=True)
            os.environ.pop("ACCELERATE_USE_CPU", None)
            plugin = DeepSpeedPlugin(zero_stage=int(self.held[-1]), gradient_accumulation_steps=1, gradient_clipping=1e6)
            return Accelerator(deepspeed_plugin=plugin, **options)
        accelerator = Accelerator(cpu=True, **options)
        if self.held.startswith("fsdp"):
            for state in (accelerator.state, PartialState()):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            version = int(self.held[-1])
            wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": BLOCKS}
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=version, **wrap)
            if version == 1:
                prepare = accelerator.prepare
                accelerator.prepare = lambda unet, *others: (self.fully_sharded(unet), *prepare(*others))
        return accelerator

    @staticmethod
    def fully_sharded(unet: torch.nn.Module) -> torch.nn.Module:
        """As accelerate does, but for the CPU, whose device has no index."""
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({BasicTransformerBlock, ResnetBlock2D})
        return FullyShardedDataParallel(unet, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))

    def weights(self) -> dict[str, torch.Tensor]:
        """What this rank holds."""
        parts = {name: p.detach() for name, p in self.unet.named_parameters()}
        if self.held == "zero3":
            parts = {name: p.ds_tensor.detach() for name, p in self.unet.named_parameters()}
        return {name: (p.to_local() if hasattr(p, "to_local") else p).clone() for name, p in parts.items()}


def scenario(held: str, way: str, pretrained: Path, folder: Path) -> dict[str, Any]:
    """Two trainings on this rank, without and with memwatch."""
    options, baseline = WAYS[way]
    whole = held in ("fsdp1", "zero3")
    probes = PICTURES if whole else [*PICTURES, POSTER]
    bare = Sharded(held, pretrained, **options)
    bare.run(None, 3)
    expected = bare.weights()

    loop = Sharded(held, pretrained, folder / held / way, **options)
    watch = loop.watch(pretrained, probes, controls=CONTROLS, strict=True, signals={"baseline": "first" if whole else baseline})
    reports = [watch.begin(), *loop.run(watch, 3)]
    found = loop.weights()
    refused = None
    if whole:
        with pytest.raises(ConfigError) as caught:
            loop.watch(pretrained, [POSTER])
        refused = str(caught.value)
    return {
        "held": watch.ranks.held, "refused": refused, "reports": [[f.severity for f in r.findings] for r in reports],
        "names": [f.name for f in reports[-1].findings], "steps": watch._weights.steps, "elements": sum(p.numel() for p in found.values()),
        "identical": found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found),
    }  # fmt: skip


def main(which: str, pretrained: Path, folder: Path) -> None:
    for held in SETS[which]:
        for way in WAYS:
            found = scenario(held, way, pretrained, folder)
            rank = torch.distributed.get_rank()
            (folder / f"{held}-{way}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=list(SETS))
def ranks(request, pretrained, tmp_path_factory):
    """Folder and names of what ran."""
    if request.param == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    on_two_ranks(__file__, request.param, pretrained, folder, folder=folder)
    return folder, SETS[request.param]


def results(ranks, way: str) -> dict[str, list[dict[str, Any]]]:
    folder, names = ranks
    return {held: [json.loads((folder / f"{held}-{way}-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)] for held in names}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_bit_identical_with_and_without(ranks, way):
    found = results(ranks, way)
    words = {"ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}
    for held, both in found.items():
        assert all(result["identical"] for result in both), held
        assert [result["held"] for result in both] == [words[held]] * 2
    whole = found["ddp"][0]["elements"]
    for held in set(found) & {"fsdp1", "fsdp2", "zero3"}:  # really sharded
        assert max(result["elements"] for result in found[held]) < 0.75 * whole, held


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_gets_the_same_report(ranks, way):
    for held, (first, second) in results(ranks, way).items():
        assert first["reports"] == second["reports"], held
        assert first["names"] == second["names"] == ["cat", "dog", "poster"][: 2 if held in ("fsdp1", "zero3") else 3]
        assert [row["step"] for row in history(ranks[0] / held / way)] == [0, 2]


@pytest.mark.parametrize("way", WAYS)
def test_maps_are_those_of_the_whole_model(ranks, way):
    """The learned weights differ by rounding only, hence the tolerance; nothing here is zero."""
    folder, names = ranks
    for step in (0, 2):
        expected = maps(folder / "ddp" / way, step)
        for held in names[1:]:
            found = maps(folder / held / way, step)
            assert {name.split("/")[0] for name in found} >= {"cat", "dog"}
            for name, value in found.items():
                torch.testing.assert_close(value.float(), expected[name].float(), rtol=1e-3, atol=1e-4, msg=f"{held} {step} {name}")
            assert step == 0 or found["cat/log_ratio"].any()


def test_without_adapters_a_fresh_lora_is_the_base(ranks):
    """Before the first step ``lora_B`` is zero, so that swapping it for zeros must read exactly zero, in shards, too."""
    folder, names = ranks
    for held in set(names) - {"fsdp1", "zero3"}:
        found = maps(folder / held / "lora", 0)
        assert not found["poster/log_ratio"].any(), held
        assert not found["cat/log_ratio"].any(), held


def test_every_rank_keeps_its_own_shards(ranks):
    folder, names = ranks
    for held in set(names) & {"fsdp2"}:
        for rank in range(2):
            files = sorted(file.name for file in (folder / held / "full" / "memwatch" / "snapshots" / f"rank-{rank}-of-2").iterdir())
            assert files == ["step_0000000.safetensors", "step_0000002.safetensors"]


def test_prompts_are_refused_where_weights_cannot_be_exchanged(ranks):
    for held in set(ranks[1]) & {"fsdp1", "zero3"}:
        for result in results(ranks, "full")[held]:
            assert "'probes': got 'prompts', allowed: images with captions under" in result["refused"]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
