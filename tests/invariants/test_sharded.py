"""Sharded over two gloo processes: training stays bit-identical, and the maps are those of whole models (DDP)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from support import builders
from support.builders import Loop, history, maps
from support.processes import on_two_ranks

from memwatch import ConfigError, Probe

CAT = Probe("a cat", builders.picture(0), name="cat")
POSTER = Probe("a poster", seed=3, name="poster")
BLOCKS = ["BasicTransformerBlock", "ResnetBlock2D"]
RUNS = {  # how the model is held, and how it is trained
    "torch": ["ddp-full", "ddp-lora", "fsdp2-full", "fsdp2-lora", "fsdp1-lora"],
    "deepspeed": ["ddp-full", "ddp-lora", "zero2-full", "zero2-lora", "zero3-lora"],
}
WORDS = {"ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}
ONLY_LIVE = ("fsdp1", "zero3")


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
            settings = {"gradient_accumulation_steps": 1, "gradient_clipping": 1e6}
            return Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=int(self.held[-1]), **settings), **options)
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
        return FullyShardedDataParallel(
            unet, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """What this rank holds."""
        parts = {name: p.detach() for name, p in self.unet.named_parameters()}
        if self.held == "zero3":
            parts = {name: p.ds_tensor.detach() for name, p in self.unet.named_parameters()}
        return {name: (p.to_local() if hasattr(p, "to_local") else p).clone() for name, p in parts.items()}


def scenario(run: str, pretrained: Path, folder: Path) -> dict[str, Any]:
    """Two trainings on this rank, without and with memwatch."""
    held, way = run.split("-")
    lora, only_live = way == "lora", held in ONLY_LIVE
    bare = Sharded(held, pretrained, lora=lora)
    bare.run(None, 3)
    expected = bare.weights()
    loop = Sharded(held, pretrained, folder / run, lora=lora)
    baseline = "base" if lora and not only_live else "first"
    probes = [CAT] if only_live else [CAT, POSTER]
    watch = loop.watch(pretrained, probes, config=builders.SMALL, signals={"baseline": baseline})
    reports = [watch.begin(), *loop.run(watch, 3)]
    found = loop.weights()
    refused = ""
    if only_live:
        with pytest.raises(ConfigError) as caught:
            loop.watch(pretrained, [POSTER])
        refused = str(caught.value)
    return {
        "held": watch.ranks.sharding,
        "refused": refused,
        "found": [[(float(f.signals.decisive.mean.sum()), f.reason) for f in r.findings] for r in reports if r.step],
        "names": [f.name for f in reports[-1].findings],
        "elements": sum(p.numel() for p in found.values()),
        "identical": found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found),
    }


def main(which: str, pretrained: Path, folder: Path) -> None:
    for run in RUNS[which]:
        found = scenario(run, pretrained, folder)
        (folder / f"{run}-{torch.distributed.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=list(RUNS))
def ranks(request, pretrained, tmp_path_factory):
    """The folder of a set of runs, and what both ranks of every run saw."""
    if request.param == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    on_two_ranks(__file__, request.param, pretrained, folder, folder=folder)
    return folder, {
        run: [json.loads((folder / f"{run}-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
        for run in RUNS[request.param]
    }


def test_training_is_bit_identical_with_and_without(ranks):
    _, found = ranks
    for run, both in found.items():
        held, way = run.split("-")
        assert all(result["identical"] for result in both), run
        assert [result["held"] for result in both] == [WORDS[held]] * 2
        if held in ("fsdp1", "fsdp2", "zero3"):  # really sharded
            assert max(result["elements"] for result in both) < 0.75 * found[f"ddp-{way}"][0]["elements"], run


def test_every_rank_gets_the_same_report(ranks):
    folder, found = ranks
    for run, (first, second) in found.items():
        assert first["found"] == second["found"], run
        assert all(total != 0 for total, _ in first["found"][0]), run
        assert first["names"] == second["names"] == (["cat"] if run.startswith(ONLY_LIVE) else ["cat", "poster"])
        assert [row["step"] for row in history(folder / run)] == [0, 2]
        message = "'probes': got 'prompts', allowed: images with captions under"
        assert [message in result["refused"] for result in (first, second)] == [run.startswith(ONLY_LIVE)] * 2, run
    if "fsdp2-full" in found:  # every rank keeps its own shards
        for rank in range(2):
            snapshots = folder / "fsdp2-full" / "memwatch" / "snapshots" / f"rank-{rank}-of-2"
            assert [file.name for file in snapshots.iterdir()] == ["step_0000000.safetensors"]


def test_maps_are_those_of_the_whole_model_and_a_fresh_lora_is_exactly_its_base(ranks):
    """The learned weights differ by rounding only, hence the tolerance. A fresh ``lora_B`` is zero, in shards, too."""
    folder, found = ranks
    for run in found:
        for step in (0, 2):
            expected, own = maps(folder / f"ddp-{run.split('-')[1]}", step), maps(folder / run, step)
            assert own
            for name, value in own.items():
                torch.testing.assert_close(
                    value.float(), expected[name].float(), rtol=1e-3, atol=1e-4, msg=f"{run} {step} {name}"
                )
            if step == 0 and run.endswith("lora") and not run.startswith(ONLY_LIVE):
                assert not any(own[name].any() for name in ("cat/collapse", "poster/collapse", "poster/score")), run
        assert own["cat/collapse"].any()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
