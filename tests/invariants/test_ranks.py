"""Ranks: what a distributed type means; and two gloo processes share probes, agree on everything, and never hang."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.builders import (
    EAGER,
    SCREENS,
    SMALL,
    Loop,
    call_every_change,
    choose,
    history,
    maps,
    picture,
    without_time,
)
from support.processes import on_two_ranks

import memwatch.callback
import memwatch.event
import memwatch.measure.snapshots
import memwatch.pace
from memwatch import ConfigError, MemWatchConfig, Probe
from memwatch.config_file import load_config
from memwatch.faults import Faults, PartError
from memwatch.judge.stop import StopState
from memwatch.pace import Pace
from memwatch.ranks import Ranks
from memwatch.report.files import FileSink

BROKEN = {"failure": (2,), "breakdown": (2, 4, 6)}  # steps at which the second rank fails
FIRST = {  # what fails on the first rank alone, at step 2
    "judge": (memwatch.event, "judge_event"),
    "ledger": (memwatch.measure.snapshots, "write_safetensors"),
    "sink": (FileSink, "write"),
}
STEPS = {"plain": 4, "screened": 6, "stop": 4, "proof": 4, "failure": 4, "breakdown": 8} | dict.fromkeys(FIRST, 4)
SCREENED = {"every_steps": None, "signals": {"baseline": "first"}}


def probes() -> list[Probe]:
    return [
        Probe("a cat", picture(0), name="cat"),
        Probe("a poster", seed=3, name="poster"),
        Probe("a dog", picture(1), name="dog"),
    ]


def plain(report) -> dict | None:
    """A report without what time it took."""
    return None if report is None else without_time([report.to_dict()])[0]


def stopping(rank: int):
    """A rule that stops on the first rank alone; the others hear of it."""
    return lambda state, findings, step, rule: StopState("rank 0 says so") if rank == 0 and step >= 2 else state


def unlike_on_the_ranks(patch, rank: int) -> None:
    """Let the screen choose two probes, and each rank time its steps in its own way."""
    patch.setattr(MemWatchConfig, "screens", SCREENS)
    choose(patch, "cat", "poster")
    patch.setattr(memwatch.pace.Clock, "step_seconds", property(lambda clock: 1.0 if len(clock.steps) > 1 else None))
    patch.setattr(memwatch.callback, "choose_pace", lambda prices, config: Pace(3 + 4 * rank, 0.01, True))


def broken_on_the_first(patch, name: str, loop: Loop) -> None:
    owner, what = FIRST[name]
    real = getattr(owner, what)

    def failing(*args, **kwargs):
        if loop.accelerator.process_index == 0 and loop.step == 2:
            raise ValueError("on the first rank only")
        return real(*args, **kwargs)

    patch.setattr(owner, what, failing)


def scenario(
    name: str, pretrained: Path, pipeline: StableDiffusionPipeline, folder: Path, *, strict: bool = False
) -> dict:
    """One training on this rank; what it saw."""
    loop = Loop(pretrained, folder, lr=1e-2)
    rank = loop.accelerator.process_index
    controls, baseline = [Probe("held out", picture(9), name="h")], {"baseline": "previous"}
    eager = EAGER | {"stop": {"enabled": False}} if name == "proof" else {}
    options = {"signals": baseline} | eager | (SCREENED if name == "screened" else {})
    watch = loop.watch(pipeline, probes(), controls=controls, config=SMALL | {"strict": strict}, **options)
    real, measured = watch.observer.measure, []

    def counting(view):
        measured.append([loop.step, view.key])
        if rank == 1 and loop.step in BROKEN.get(name, ()):
            raise RuntimeError("out of memory on this rank only")
        return real(view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.observer, "measure", counting)
        if name == "proof":
            call_every_change(patch)
        if name == "screened":
            unlike_on_the_ranks(patch, rank)
        if name == "stop":
            patch.setattr(memwatch.event, "decide_stop", stopping(rank))
        if name in FIRST:
            broken_on_the_first(patch, name, loop)
        if strict:
            with pytest.raises(RuntimeError) as caught:
                loop.run(watch, STEPS[name])
            return {"rank": rank, "step": loop.step, "raised": str(caught.value)}
        reports = [watch.begin(), *loop.run(watch, STEPS[name])]
    return {
        "rank": rank,
        "world": loop.accelerator.num_processes,
        "step": loop.step,
        "reports": [plain(report) for report in reports],
        "stop_reason": watch.stop_reason,
        "is_off": watch.faults.is_off(memwatch.event.MEASURING),
        "errors": watch.faults.count,
        "measured": measured,
        "weights": float(sum(p.double().abs().sum() for p in loop.bare.parameters())),
    }


def one_folder(pretrained: Path, pipeline: StableDiffusionPipeline, folder: Path) -> dict:
    """A second live run, a checkpoint as diffusers' scripts save it, and an event after the end."""
    loop = Loop(pretrained, folder)
    watch = loop.watch(pipeline, probes(), config=SMALL)
    loop.run(watch, 2)
    with pytest.raises(ConfigError) as caught:
        loop.watch(pipeline, probes())
    found = {"rank": loop.accelerator.process_index, "refused": str(caught.value)}
    if loop.accelerator.is_main_process:
        loop.accelerator.save_state(str(folder / "checkpoint"))
    loop.accelerator.wait_for_everyone()
    found["run"] = watch.state_dict()["run"]
    watch.close()

    again = Loop(pretrained, folder)
    watch = again.watch(pipeline, probes(), config=SMALL)
    again.accelerator.load_state(str(folder / "checkpoint"))
    again.step = 2
    found["resumed"] = watch.state_dict()["run"]
    found["reports"] = [plain(report) for report in again.run(watch, 4)]
    again.accelerator.end_training()
    found["after"] = [watch.on_step_end(step) for step in (6, 8)]
    return found


GROUPS = {  # each is one pair of processes; the last scenario of the last one destroys their group
    "whole": ("plain", "screened", "stop", "proof"),
    "broken": ("failure", "breakdown", *FIRST),
    "ended": ("strict-failure", "strict-judge", "one-folder"),
}


def main(pretrained: Path, folder: Path, group: str) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(pretrained)
    for name in GROUPS[group]:
        if name == "one-folder":
            found = one_folder(pretrained, pipeline, folder / name)
        else:
            found = scenario(name.removeprefix("strict-"), pretrained, pipeline, folder / name, strict="strict" in name)
        (folder / f"{name}{found['rank']}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def ranks(pretrained, tmp_path_factory):
    """The folder of the scenarios, and a function that gives what both ranks saw of one; a group runs when needed."""
    folder = tmp_path_factory.mktemp("ranks")

    @cache
    def run(group: str) -> None:
        on_two_ranks(__file__, pretrained, folder, group, folder=folder)

    def found(name: str) -> list[dict]:
        run(next(group for group, names in GROUPS.items() if name in names))
        return [json.loads((folder / f"{name}{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]

    return folder, found


def test_every_rank_gets_the_same_report(ranks):
    folder, found = ranks
    first, second = found("plain")
    assert (first["rank"], second["rank"], first["world"], second["world"]) == (0, 1, 2, 2)
    assert first["step"] == second["step"] == 4
    assert len(first["reports"]) == 3
    assert first["reports"] == second["reports"]
    shares = [{key for _, key in result["measured"]} for result in (first, second)]
    assert shares == [{"cat", "dog"}, {"poster", "control/h"}]
    assert [f["name"] for f in first["reports"][-1]["findings"]] == ["cat", "poster", "dog"]
    assert [f["baseline_step"] for f in first["reports"][-1]["findings"]] == [2, 2, 2]
    assert first["weights"] == second["weights"]
    assert [row["step"] for row in history(folder / "plain")] == [0, 2, 4]  # one writer
    assert not first["is_off"]
    assert first["errors"] == second["errors"] == 0


def test_ranks_agree_on_the_pace_and_on_whom_to_measure(ranks):
    folder, found = ranks
    first, second = found("screened")
    assert [report["step"] for report in first["reports"]] == [0, 3, 6]  # as the first rank chose
    assert first["reports"] == second["reports"]
    shares = [[key for _, key in result["measured"] if key != "control/h"] for result in (first, second)]
    now, before = ["cat"] * 2, ["cat"] * 2  # with the prompt and without; of the baseline once
    assert shares[0] == now + before + now
    assert set(shares[1]) == {"poster"}
    assert [f["baseline_step"] for f in first["reports"][-1]["findings"]] == [0, 0, 0]
    assert "cat/collapse" in maps(folder / "screened", 6)
    assert "dog/collapse" not in maps(folder / "screened", 6)


def test_sharing_out_changes_no_number(ranks, pretrained, tmp_path):
    folder, found = ranks
    found("plain")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks: another number of threads sums in another order
    try:
        loop = Loop(pretrained, tmp_path)
        loop.watch(pretrained, probes(), controls=[Probe("held out", picture(9), name="h")], config=SMALL).begin()
    finally:
        torch.set_num_threads(threads)
    alone, shared = maps(tmp_path, 0), maps(folder / "plain", 0)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[key], shared[key]) for key in alone)


def test_a_stop_decided_on_one_rank_stops_all(ranks):
    _, found = ranks
    for result in found("stop"):
        assert (result["stop_reason"], result["step"]) == ("rank 0 says so", 2)
        assert result["reports"][-1]["stop_reason"] == "rank 0 says so"


def test_captions_are_shared_out_and_every_rank_gets_the_same_proofs(ranks):
    _, found = ranks
    first, second = found("proof")
    assert first["reports"] == second["reports"]
    assert first["errors"] == second["errors"] == 0
    copied = [[f["copied"] and f["copied"]["generations"] for f in r["findings"]] for r in first["reports"]]
    assert copied == [[None] * 3, [4, 2, 4], [None] * 3]  # a prompt probe's own serve as its proof
    assert first["weights"] == second["weights"] == found("plain")[0]["weights"]


def test_a_failure_on_one_rank_costs_all_ranks_that_look_and_no_other(ranks):
    _, found = ranks
    for result in found("failure"):
        assert not result["is_off"]
        assert result["errors"] == 1
        assert result["step"] == 4
        assert [report["step"] for report in result["reports"]] == [0, 2, 4]
        assert [report["errors"] for report in result["reports"]] == [0, 1, 1]
        assert "out of memory on this rank only" in result["reports"][1]["failure"]
        assert result["reports"][1]["findings"] == []
    first, second = found("failure")
    assert first["reports"] == second["reports"]
    assert {f["baseline_step"] for f in first["reports"][-1]["findings"]} == {0}  # what was lost is no baseline
    assert first["weights"] == found("plain")[0]["weights"]  # training is the same, watched or not
    assert first["weights"] == second["weights"]


def test_three_failures_on_one_rank_end_the_looking_on_all(ranks):
    _, found = ranks
    first, second = found("breakdown")
    for result in (first, second):
        assert result["is_off"]
        assert result["errors"] == 3
        assert result["step"] == 8
        assert [report["step"] for report in result["reports"]] == [0, 2, 4, 6]
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("name", FIRST)
def test_what_fails_on_the_main_process_alone_keeps_nobody_waiting(name, ranks):
    folder, found = ranks
    first, second = found(name)
    assert first["reports"] == second["reports"] or name == "sink"  # which fails after the report
    assert first["errors"] == second["errors"] == (2 if name == "ledger" else 1)  # ledger, weights
    lost = name == "judge"
    for result in (first, second):
        assert result["step"] == 4
        assert [report["step"] for report in result["reports"]] == [0, 2, 4]
        failures = [report["failure"] for report in result["reports"]]
        assert [failure is not None for failure in failures] == [False, lost, False]
    steps = {f["name"]: f["baseline_step"] for f in second["reports"][-1]["findings"]}
    if not lost:  # the second rank looks at the poster, and cannot read the weights that the first holds in memory
        assert steps == {"cat": 2, "dog": 2, "poster": 0 if name == "ledger" else 2}
    assert [row["step"] for row in history(folder / name)] == ([0, 4] if name == "sink" else [0, 2, 4])
    assert first["weights"] == second["weights"] == found("plain")[0]["weights"]


@pytest.mark.parametrize("name", ["failure", "judge"])
def test_strict_raises_on_every_rank(name, ranks):
    why = "out of memory on this rank only" if name == "failure" else "on the first rank only"
    for result in ranks[1](f"strict-{name}"):
        assert result["step"] == 2
        assert result["raised"].startswith("memwatch: ")
        assert why in result["raised"]


def test_one_folder_is_one_run_s_and_is_resumed_by_all_and_after_the_end_there_is_no_event(ranks):
    """Only the main process saved. The group is gone in the end: a rank that did not know would wait, or fail."""
    folder, found = ranks
    first, second = found("one-folder")
    for result in (first, second):
        assert "'output_dir'" in result["refused"]
        assert "no other live run" in result["refused"]
        assert result["after"] == [None, None]
    assert first["run"] == second["run"] == first["resumed"] == second["resumed"]
    assert first["reports"] == second["reports"]
    assert {f["baseline_step"] for f in first["reports"][-1]["findings"]} == {0}
    assert [row["step"] for row in history(folder / "one-folder")] == [0, 2, 4]


# --- what a distributed type means ------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=f"works with one process, DDP, FSDP1, FSDP2 .*got distributed type {kind}"):
        Ranks.of(accelerator(kind))
    sharded = accelerator("FSDP", is_fsdp2=True)
    sharded.device = torch.device("cuda")
    with pytest.raises(ValueError, match="keeps parameters on cpu while cuda computes; memwatch works without CPU off"):
        Ranks.of(sharded).forward_module(torch.nn.Linear(2, 2))


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
    assert (ranks.gather([1, 2]), ranks.agree(None), ranks.largest(3), ranks.broadcast("a")) == ([1, 2], None, 3, "a")


def test_every_rank_writes_its_own_shard_and_one_a_machine_whole_weights(tmp_path):
    second = Ranks.of(accelerator("FSDP", rank=1, is_fsdp2=True))
    assert second.writes_weights
    assert second.weights_folder(tmp_path) == tmp_path / "rank-1-of-2"
    whole = Ranks.of(accelerator("MULTI_GPU", rank=1))
    assert not whole.writes_weights
    assert whole.weights_folder(tmp_path) == tmp_path


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
