"""What a distributed type means: who looks at what, what is refused, and that nothing is lost when ranks agree."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from memwatch.config import ConfigError
from memwatch.config_file import load_config
from memwatch.faults import Faults, PartError
from memwatch.ranks import Ranks


def accelerator(kind: str, rank: int = 0, world: int = 2, **more):
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        process_index=rank,
        num_processes=world,
        is_local_main_process=rank == 0,
        device=torch.device("cpu"),
        **more,
    )


def deepspeed(stage: int, **more):
    return accelerator("DEEPSPEED", deepspeed_config={"zero_optimization": {"stage": stage}}, **more)


@pytest.mark.parametrize(
    ("made", "sharding", "lockstep", "swappable", "reuse_graph"),
    [
        (accelerator("NO", world=1), "one process", False, True, True),
        (accelerator("MULTI_GPU"), "DDP", False, True, True),
        (accelerator("FSDP", is_fsdp2=True), "FSDP2", True, True, True),
        (accelerator("FSDP", is_fsdp2=False), "FSDP1", True, False, False),
        (accelerator("FSDP"), "FSDP1", True, False, False),
        (deepspeed(1), "DeepSpeed ZeRO-1", False, True, True),
        (deepspeed(2), "DeepSpeed ZeRO-2", False, True, True),
        (deepspeed(3), "DeepSpeed ZeRO-3", True, False, False),
    ],
)
def test_what_a_distributed_type_means(made, sharding, lockstep, swappable, reuse_graph):
    ranks = Ranks.of(made)
    assert (ranks.sharding, ranks.lockstep, ranks.swappable) == (sharding, lockstep, swappable)
    assert ranks.reuse_graph is reuse_graph
    assert ranks.share([1, 2, 3]) == ([1, 2, 3] if lockstep or made.num_processes == 1 else [1, 3])


@pytest.mark.parametrize("kind", ["MEGATRON_LM", "XLA", "TP"])
def test_an_unknown_split_is_refused(kind):
    with pytest.raises(
        ValueError, match=f"distributed type {kind} .*works with one process, DDP, FSDP1, FSDP2 and DeepSpeed"
    ):
        Ranks.of(accelerator(kind))


@pytest.mark.parametrize("made", [accelerator("FSDP"), deepspeed(3)], ids=["FSDP1", "ZeRO-3"])
@pytest.mark.parametrize(
    ("overrides", "has_prompts", "message"),
    [
        ({}, True, "'probes': got 'prompts', allowed: images with captions under"),
        ({"weights": "ema"}, False, "'weights': got 'ema', allowed: live under"),
        ({"signals": {"baseline": "base"}}, False, "'signals.baseline': got 'base', allowed: first, previous"),
        ({"signals": {"baseline": "path:x"}}, False, "'signals.baseline': got 'path:x', allowed: first, previous"),
    ],
)
def test_what_needs_other_weights_is_refused_where_they_cannot_be_exchanged(made, overrides, has_prompts, message):
    config = load_config(None, **overrides)
    with pytest.raises(ConfigError, match=message):
        Ranks.of(made).require(config, has_prompts)
    Ranks.of(deepspeed(2)).require(config, has_prompts)
    Ranks.of(made).require(load_config(None, signals={"baseline": "lag:2"}), False)


def test_parameters_kept_on_another_device_are_refused():
    made = accelerator("FSDP", is_fsdp2=True)
    made.device = torch.device("cuda")
    with pytest.raises(
        ValueError, match="FSDP2 keeps parameters on cpu while cuda computes; memwatch works without CPU offload"
    ):
        Ranks.of(made).forward_module(torch.nn.Linear(2, 2))


def test_alone_nothing_is_gathered():
    ranks = Ranks.of(accelerator("NO", world=1))
    assert ranks.gather([1, 2]) == [1, 2]
    assert (ranks.agree(None), ranks.agree("broken")) == (None, "broken")
    assert ranks.largest(3) == 3
    assert ranks.broadcast("stop") == "stop"


def test_work_that_fails_is_counted_and_ends_what_depends_on_it():
    ranks, faults = Ranks.of(accelerator("NO", world=1)), Faults()
    assert ranks.together("judging", faults, lambda: 3) == 3

    def broken():
        raise OSError("disk full")

    with pytest.raises(PartError, match=r"judging failed: OSError\('disk full'\)") as caught:
        ranks.together("judging", faults, broken)
    assert isinstance(caught.value.__cause__, OSError)
    assert faults.state_dict() == {"count": 1, "in_a_row": {"judging": 1}}
    ranks.together("judging", faults, lambda: None)
    assert faults.state_dict() == {"count": 1, "in_a_row": {}}


def test_strict_work_raises_once_and_counts_once():
    ranks, faults = Ranks.of(accelerator("NO", world=1)), Faults(strict=True)

    def writing():
        with faults.surviving("writing the ledger"):
            raise OSError("disk full")

    with pytest.raises(RuntimeError, match=r"^memwatch: writing the ledger failed: OSError\('disk full'\)$"):
        ranks.together("keeping", faults, writing)
    assert faults.count == 1


def test_every_rank_writes_its_own_shard_and_one_a_machine_whole_weights(tmp_path):
    second = Ranks.of(accelerator("FSDP", rank=1, is_fsdp2=True))
    assert second.writes_weights
    assert second.weights_folder(tmp_path) == tmp_path / "rank-1-of-2"
    whole = Ranks.of(accelerator("MULTI_GPU", rank=1))
    assert not whole.writes_weights
    assert whole.weights_folder(tmp_path) == tmp_path
