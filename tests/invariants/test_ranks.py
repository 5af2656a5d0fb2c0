"""Ranks: what a distributed type means; and two gloo processes share probes, agree on everything, and never hang."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import StableDiffusionPipeline
from support import builders
from support.builders import SMALL, Loop, history, maps, picture
from support.processes import on_two_ranks
from support.rows import make_rows

import memwatch.callback
import memwatch.event
import memwatch.measure.snapshots
import memwatch.pace
from memwatch import ConfigError, MemWatchConfig, Probe
from memwatch.config_file import load_config
from memwatch.pace import Pace
from memwatch.picking import cache as survey_cache
from memwatch.ranks import Ranks
from memwatch.report.files import FileSink

BROKEN = {"failure": (2,), "breakdown": (2, 4, 6)}  # steps at which the second rank fails
FIRST = {  # what fails on the first rank alone, at step 2
    "judge": (memwatch.event, "judge_event"),
    "ledger": (memwatch.measure.snapshots, "write_safetensors"),
    "sink": (FileSink, "write"),
}
STEPS = {"screened": 6, "breakdown": 8}  # of the others: 4
OPTIONS = {  # of the watch
    "screened": {"every_steps": None, "signals": {"baseline": "first"}},
    "proof": {"stop": {"enabled": False}},
}
GROUPS = {  # each is one pair of processes; the last scenario of the last one destroys their group
    "whole": ("plain", "screened", "stop", "proof"),
    "broken": ("failure", "breakdown", *FIRST),
    "ended": ("strict-failure", "strict-judge", "one-folder"),
}
PROBES = [
    Probe("a cat", picture(0), name="cat"),
    Probe("a poster", seed=3, name="poster"),
    Probe("a dog", picture(1), name="dog"),
]
HELD_OUT = [Probe("held out", picture(9), name="h")]


def unlike_on_the_ranks(patch, rank: int) -> None:
    """Let the screen choose two probes, and each rank time its steps in its own way."""
    patch.setattr(MemWatchConfig, "screens", builders.SCREENS)
    builders.choose(patch, "cat", "poster")
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


def scenario(name: str, pretrained: Path, pipeline: StableDiffusionPipeline, folder: Path, *, strict: bool) -> dict:
    """One training on this rank; what it saw."""
    loop, steps = Loop(pretrained, folder), STEPS.get(name, 4)
    rank = loop.accelerator.process_index
    options = {"signals": {"baseline": "previous"}} | OPTIONS.get(name, {})
    watch = loop.watch(pipeline, PROBES, controls=HELD_OUT, config=SMALL | {"strict": strict}, **options)
    real, measured = watch.observer.measure, []

    def counting(view):
        measured.append([loop.step, view.key])
        if rank == 1 and loop.step in BROKEN.get(name, ()):
            raise RuntimeError("out of memory on this rank only")
        return real(view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.observer, "measure", counting)
        if name == "proof":
            builders.call_every_change(patch)
        if name == "screened":
            unlike_on_the_ranks(patch, rank)
        if name == "stop" and rank == 0:
            builders.stop_at(2, patch)
        if name in FIRST:
            broken_on_the_first(patch, name, loop)
        if strict:
            with pytest.raises(RuntimeError) as caught:
                loop.run(watch, steps)
            return {"rank": rank, "step": loop.step, "raised": str(caught.value)}
        reports = [watch.begin(), *loop.run(watch, steps)]
    return {
        "rank": rank,
        "step": loop.step,
        "reports": builders.without_time([report.to_dict() for report in reports]),
        "stop_reason": watch.stop_reason,
        "is_off": watch.faults.is_off(memwatch.event.MEASURING),
        "errors": watch.faults.count,
        "measured": measured,
        "weights": float(sum(p.double().abs().sum() for p in loop.bare.parameters())),
    }


def one_folder(pretrained: Path, pipeline: StableDiffusionPipeline, folder: Path) -> dict:
    """A second live run, a checkpoint as diffusers' scripts save it, and an event after the end."""
    loop = Loop(pretrained, folder)
    watch = loop.watch(pipeline, PROBES, config=SMALL)
    loop.run(watch, 2)
    with pytest.raises(ConfigError) as caught:
        loop.watch(pipeline, PROBES)
    found = {"rank": loop.accelerator.process_index, "refused": str(caught.value)}
    if loop.accelerator.is_main_process:
        loop.accelerator.save_state(str(folder / "checkpoint"))
    loop.accelerator.wait_for_everyone()
    found["run"] = watch.state_dict()["run"]
    watch.close()

    again = Loop(pretrained, folder)
    watch = again.watch(pipeline, PROBES, config=SMALL)
    again.accelerator.load_state(str(folder / "checkpoint"))
    again.step = 2
    found["resumed"] = watch.state_dict()["run"]
    found["reports"] = builders.without_time([report.to_dict() for report in again.run(watch, 4)])
    again.accelerator.end_training()
    found["after"] = [watch.on_step_end(step) for step in (6, 8)]
    return found


def slow_survey(folder: Path) -> None:
    """Pick, with a survey that takes longer than a collective may, and agree on something."""
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=8))  # NCCL's default is ten minutes
    accelerator, surveys, real = Accelerator(cpu=True, kwargs_handlers=[timeout]), [], survey_cache.survey

    def slow(rows):
        surveys.append(len(rows))
        time.sleep(12)
        return real(rows)

    survey_cache.survey, survey_cache.PATIENCE = slow, 1.0
    picked = memwatch.pick(make_rows(60), probes=2, controls=11)
    accelerator.wait_for_everyone()
    found = {"picked": [[w.row for w in picked.watched], list(picked.held_out)], "surveys": surveys}
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(found), encoding="utf-8")


def main(pretrained: Path, folder: Path, group: str) -> None:
    if group == "survey":
        return slow_survey(folder)
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


def baselines(result: dict) -> dict[str, int]:
    """Of the last report."""
    return {f["name"]: f["baseline_step"] for f in result["reports"][-1]["findings"]}


def steps(rows: list[dict]) -> list[int]:
    return [row["step"] for row in rows]


def test_every_rank_gets_the_same_report(ranks):
    folder, found = ranks
    first, second = found("plain")
    assert (first["rank"], second["rank"]) == (0, 1)
    shares = [{key for _, key in result.pop("measured")} for result in (first, second)]
    assert shares == [{"cat", "dog"}, {"poster", "control/h"}]
    assert first | {"rank": 1} == second
    assert (first["step"], first["is_off"], first["errors"]) == (4, False, 0)
    assert baselines(first) == {"cat": 2, "poster": 2, "dog": 2}
    assert steps(first["reports"]) == steps(history(folder / "plain")) == [0, 2, 4]  # one writer


def test_ranks_agree_on_the_pace_and_on_whom_to_measure(ranks):
    folder, found = ranks
    first, second = found("screened")
    assert steps(first["reports"]) == [0, 3, 6]  # as the first rank chose
    assert first["reports"] == second["reports"]
    shares = [[key for _, key in result["measured"] if key != "control/h"] for result in (first, second)]
    now, before = ["cat"] * 2, ["cat"] * 2  # with the prompt and without; of the baseline once
    assert shares[0] == now + before + now
    assert set(shares[1]) == {"poster"}
    assert baselines(first) == {"cat": 0, "poster": 0, "dog": 0}
    assert "cat/collapse" in maps(folder / "screened", 6)
    assert "dog/collapse" not in maps(folder / "screened", 6)


def test_sharing_out_changes_no_number(ranks, pretrained, tmp_path):
    folder, found = ranks
    found("plain")
    Loop(pretrained, tmp_path).watch(pretrained, PROBES, controls=HELD_OUT, config=SMALL).begin()
    builders.assert_same(maps(tmp_path, 0), maps(folder / "plain", 0))


def test_a_stop_decided_on_one_rank_stops_all(ranks):
    for result in ranks[1]("stop"):  # it is the first rank that decides
        assert (result["stop_reason"], result["step"]) == ("enough", 2)
        assert result["reports"][-1]["stop_reason"] == "enough"


def test_captions_are_shared_out_and_every_rank_gets_the_same_proofs(ranks):
    first, second = ranks[1]("proof")
    assert first["reports"] == second["reports"]
    assert first["errors"] == second["errors"] == 0
    copied = [[f["copied"] and f["copied"]["generations"] for f in r["findings"]] for r in first["reports"]]
    assert copied == [[None] * 3, [4, 2, 4], [None] * 3]  # a prompt probe's own serve as its proof
    assert first["weights"] == second["weights"] == ranks[1]("plain")[0]["weights"]


@pytest.mark.parametrize(
    ("name", "is_off", "errors"), [("failure", False, [0, 1, 1]), ("breakdown", True, [0, 1, 2, 3])]
)
def test_a_failure_on_one_rank_costs_all_ranks_that_look_and_the_third_ends_them(name, is_off, errors, ranks):
    first, second = ranks[1](name)
    assert first["reports"] == second["reports"]
    for result in (first, second):
        assert (result["is_off"], result["errors"], result["step"]) == (is_off, errors[-1], STEPS.get(name, 4))
    assert steps(first["reports"]) == [2 * i for i in range(len(errors))]
    assert [report["errors"] for report in first["reports"]] == errors
    assert "out of memory on this rank only" in first["reports"][1]["failure"]
    assert first["reports"][1]["findings"] == []
    assert first["weights"] == second["weights"]
    if not is_off:
        assert set(baselines(first).values()) == {0}  # what was lost is no baseline
        assert first["weights"] == ranks[1]("plain")[0]["weights"]  # training is the same, watched or not


@pytest.mark.parametrize("name", FIRST)
def test_what_fails_on_the_main_process_alone_keeps_nobody_waiting(name, ranks):
    folder, found = ranks
    first, second = found(name)
    assert first["reports"] == second["reports"] or name == "sink"  # which fails after the report
    assert first["errors"] == second["errors"] == (2 if name == "ledger" else 1)  # ledger, weights
    for result in (first, second):
        assert (result["step"], steps(result["reports"])) == (4, [0, 2, 4])
        assert [r["failure"] is not None for r in result["reports"]] == [False, name == "judge", False]
    if name != "judge":  # the second rank looks at the poster, and cannot read the weights that the first one holds
        assert baselines(second) == {"cat": 2, "dog": 2, "poster": 0 if name == "ledger" else 2}
    assert steps(history(folder / name)) == ([0, 4] if name == "sink" else [0, 2, 4])
    assert first["weights"] == second["weights"] == found("plain")[0]["weights"]


@pytest.mark.parametrize(
    ("name", "why"), [("failure", "out of memory on this rank only"), ("judge", "on the first rank only")]
)
def test_strict_raises_on_every_rank(name, why, ranks):
    for result in ranks[1](f"strict-{name}"):
        assert result["step"] == 2
        assert result["raised"].startswith("memwatch: ")
        assert why in result["raised"]


def test_one_folder_is_one_run_s_and_is_resumed_by_all_and_after_the_end_there_is_no_event(ranks):
    """Only the main process saved. The group is gone in the end: a rank that did not know would wait, or fail."""
    folder, found = ranks
    first, second = found("one-folder")
    assert first | {"rank": 1} == second
    assert first["resumed"] == first["run"]
    assert "'output_dir'" in first["refused"]
    assert "no other live run" in first["refused"]
    assert first["after"] == [None, None]
    assert set(baselines(first).values()) == {0}
    assert steps(history(folder / "one-folder")) == [0, 2, 4]


def test_no_rank_waits_in_a_collective_for_a_survey(pretrained, tmp_path):
    log = on_two_ranks(
        __file__, pretrained, tmp_path, "survey", folder=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert first["picked"] == second["picked"]
    assert first["surveys"] + second["surveys"] == [60]
    assert "another process surveys these 60 rows; this one waits for it" in log


def accelerator(kind: str, **more):
    world = {"process_index": 0, "num_processes": 2, "device": torch.device("cpu")}
    return SimpleNamespace(**{"distributed_type": SimpleNamespace(value=kind), **world, **more})


def deepspeed(stage: int):
    return accelerator("DEEPSPEED", deepspeed_config={"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize(
    ("made", "sharding", "lockstep", "swappable"),
    [
        (accelerator("NO", num_processes=1), "one process", False, True),
        (accelerator("MULTI_GPU"), "DDP", False, True),
        (accelerator("FSDP", is_fsdp2=True), "FSDP2", True, True),
        (accelerator("FSDP", is_fsdp2=False), "FSDP1", True, False),
        (accelerator("FSDP"), "FSDP1", True, False),
        (deepspeed(2), "DeepSpeed ZeRO-2", False, True),
        (deepspeed(3), "DeepSpeed ZeRO-3", True, False),
    ],
)
def test_what_a_distributed_type_means(made, sharding, lockstep, swappable):
    ranks = Ranks.of(made)
    assert (ranks.sharding, ranks.lockstep, ranks.swappable) == (sharding, lockstep, swappable)
    assert ranks.reuse_graph is swappable  # FSDP1 and ZeRO-3 free parameters after the first backward pass
    assert ranks.share([1, 2, 3]) == ([1, 2, 3] if lockstep or made.num_processes == 1 else [1, 3])


@pytest.mark.parametrize("kind", ["MEGATRON_LM", "XLA", "TP"])
def test_an_unknown_split_is_refused(kind):
    with pytest.raises(ValueError, match=f"works with one process, DDP, FSDP1, FSDP2 .*got distributed type {kind}"):
        Ranks.of(accelerator(kind))


def test_sharded_parameters_on_the_cpu_are_refused():
    ranks = Ranks.of(accelerator("FSDP", is_fsdp2=True, device=torch.device("cuda")))
    with pytest.raises(ValueError, match="keeps parameters on cpu while cuda computes; memwatch works without CPU off"):
        ranks.forward_module(torch.nn.Linear(2, 2))


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
