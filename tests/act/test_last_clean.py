"""What is kept to roll back to: the newest clean weights, one file, through full disks, resumes and two processes."""

from __future__ import annotations

import errno
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from support.builders import SMALL, Loop, assert_same
from support.processes import on_two_ranks
from support.rollback import frozen, keeper_of, loaded, said, train

import memwatch.act.last_clean
from memwatch.act.last_clean import LastClean, is_clean, is_memorized
from memwatch.faults import Faults
from memwatch.judge.verdict import ProbeState, Verdict


@pytest.fixture
def pipe(pretrained):
    """A whole UNet is trained."""
    found = frozen(pretrained)
    found.unet.requires_grad_(True)
    return found


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "rollback").glob("*"))


def name_of(step: int) -> str:
    return f"step_{step:07d}.safetensors"


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- what is clean ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "clean", "memorized"),
    [
        (ProbeState(), True, False),  # nothing to compare with yet
        (ProbeState(verdict=Verdict.SUSPICIOUS, streak=2, since=4), True, False),  # a small effect, however often
        (ProbeState(verdict=Verdict.SUSPICIOUS, streak=1, since=4, is_enough=True), False, False),
        (ProbeState(verdict=Verdict.MEMORIZED, streak=2, since=4, is_enough=True), False, True),
        (ProbeState(verdict=Verdict.INCONCLUSIVE, finite=False), False, False),
    ],
)
def test_what_is_enough_for_memorized_is_not_clean(state, clean, memorized):
    quiet = ProbeState(verdict=Verdict.NO_EVIDENCE)
    states = {"a": quiet, "b": state, "control/c": replace(quiet, streak=2, is_enough=True, verdict=Verdict.MEMORIZED)}
    findings = [SimpleNamespace(name=name, state=states[name], verdict=states[name].verdict) for name in "ab"]
    assert is_clean(states, findings) is clean
    assert is_memorized(findings) is memorized
    assert is_clean(states, findings[:1])


# --- which weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "kept", "unclean_since"),
    [
        ("ccc", 2, None),
        ("ccu", 1, 2),
        ("cuu", 0, 1),
        ("cuc", 2, None),  # what had begun has ended
        ("cucu", 2, 3),
        ("cum", 0, 1),
        ("cumc", 0, 1),  # what was memorized once is not forgotten
        ("uu", None, 0),
    ],
)
def test_the_newest_clean_weights_are_kept_until_something_is_memorized(events, kept, unclean_since, pipe, tmp_path):
    keeper, weights = keeper_of(pipe, tmp_path), []
    for step, event in enumerate(events):
        train(pipe, step)
        weights.append({f"unet/{name}": p.detach().clone() for name, p in pipe.unet.named_parameters()})
        keeper.note(step, event == "c", final=event == "m")
    assert (keeper.step, keeper.unclean_since) == (kept, unclean_since)
    assert files(tmp_path) == ([] if kept is None else [name_of(kept)])
    if kept is not None:
        assert_same(load_file(tmp_path / "rollback" / name_of(kept)), weights[kept])
    written = keeper.write()
    assert (written is not None) == (kept is not None and unclean_since is not None)
    assert (tmp_path / "last_clean").exists() == (written is not None)
    assert (tmp_path / "rollback").exists() == (written is not None)  # the final model is the clean one


def test_it_says_once_how_to_load_it(pipe, tmp_path, caplog):
    keeper = keeper_of(pipe, tmp_path)
    for step in (2, 4, 6):
        keeper.note(step, step == 2)
    with caplog.at_level(logging.INFO, "memwatch"):
        assert keeper.write() == keeper.write() == tmp_path / "last_clean"
    (message,) = caplog.messages
    about = json.loads((tmp_path / "last_clean" / "memwatch.json").read_text(encoding="utf-8"))
    assert "the latest weights saved before any probe met the memorized criteria (step 2) are in" in message
    assert "since step 4 one does" in message
    assert message.endswith(f"To load them: unet = UNet2DConditionModel.from_pretrained('{tmp_path}/last_clean/unet')")
    assert message.endswith(about["load"])
    assert (about["step"], about["unclean_since"], about["ema"]) == (2, 4, False)
    assert {"memwatch", "torch", "diffusers", "peft"} <= set(about["versions"])


def test_what_was_trained_for_some_steps_only_is_kept_as_well(pipe, pretrained, tmp_path):
    pipe.text_encoder.requires_grad_(True)
    keeper = keeper_of(pipe, tmp_path, encoders=pipe.text_encoder)
    keeper.note(0, True)
    train(pipe, 1)
    pipe.text_encoder.requires_grad_(False)
    train(pipe, 2)
    kept = said(pipe)
    keeper.note(2, True)
    train(pipe, 3)
    keeper.note(4, False)
    assert torch.equal(said(loaded(keeper.write(), pretrained)), kept)


def test_shards_and_averages_of_other_tensors_are_said(pipe, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "memwatch"):
        keeper = keeper_of(pipe, tmp_path, ema=EMAModel(list(pipe.unet.parameters())[:3]))
    (message,) = caplog.messages
    assert "the EMA averages 3 tensors, and the model has" in message
    denoiser, parts = SimpleNamespace(part="unet", pipeline="", text_encoders=()), SimpleNamespace(tokenizers=())
    ranks = replace(keeper.ranks, sharding="FSDP2", lockstep=True)
    observer = SimpleNamespace(ranks=ranks, denoiser=denoiser, model=pipe.unet, ema=None, text_encoders=(), parts=parts)
    with caplog.at_level(logging.WARNING, "memwatch"):
        keeper = LastClean(observer, tmp_path, Faults(strict=True))
        keeper.note(0, True)
        keeper.note(2, False)
        assert keeper.write() is None
    assert "rollback is off, because FSDP2 holds the model in shards" in caplog.messages[-1]
    assert not any(tmp_path.iterdir())


# --- full disks, and models that were changed ------------------------------------------------------------------------


def test_a_full_disk_while_keeping_leaves_what_was_kept(pipe, pretrained, tmp_path, monkeypatch, caplog):
    keeper = keeper_of(pipe, tmp_path, strict=False)
    kept = said(pipe)
    keeper.note(0, True)
    with monkeypatch.context() as full, caplog.at_level(logging.WARNING, "memwatch"):
        full.setattr(memwatch.act.last_clean, "write_safetensors", no_space)
        train(pipe, 1)
        keeper.note(2, True)
    assert sum("keeping the weights to roll back to failed" in message for message in caplog.messages) == 1
    assert keeper._faults.count == 1
    assert (keeper.step, files(tmp_path)) == (0, [name_of(0)])
    keeper.note(4, False)
    assert torch.equal(said(loaded(keeper.write(), pretrained)), kept)
    keeper.note(6, True)  # there is space again
    assert (keeper.step, files(tmp_path)) == (6, [name_of(6)])


@pytest.mark.parametrize("where", ["save_pretrained", "write_json"])
def test_a_full_disk_while_writing_leaves_the_file_and_is_tried_again(
    where, pipe, pretrained, tmp_path, monkeypatch, caplog
):
    keeper = keeper_of(pipe, tmp_path, strict=False)
    kept = said(pipe)
    keeper.note(2, True)
    keeper.note(4, False)
    with monkeypatch.context() as full, caplog.at_level(logging.WARNING, "memwatch"):
        full.setattr(pipe.unet if where == "save_pretrained" else memwatch.act.last_clean, where, no_space)
        assert keeper.write() is None
    (said_,) = caplog.messages
    assert "No space left" in said_
    assert f"those of step 2 stay in {tmp_path}/rollback/{name_of(2)}. Training goes on." in said_
    assert [path.name for path in tmp_path.iterdir()] == ["rollback"]
    assert not pipe.unet._state_dict_hooks
    assert torch.equal(said(loaded(keeper.write(), pretrained)), kept)


def add_lora(network, *names: str) -> None:
    from peft import LoraConfig

    for name in names:
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=name)


def add_adapters_of_two_names(network) -> None:
    add_lora(network, "one", "two")
    for name, p in network.named_parameters():
        p.requires_grad_(".lora_" in name)


def add_lora_and_thaw(network) -> None:
    add_lora(network, "one")
    network.conv_out.requires_grad_(True)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT warns of several adapters
@pytest.mark.parametrize(
    ("adapt", "why"),
    [
        (add_adapters_of_two_names, "unet trains 2 adapters (one, two), and one file holds one"),
        (add_lora_and_thaw, "unet holds adapters and trains conv_out"),
    ],
)
def test_what_diffusers_has_no_form_for_stays_a_file(adapt, why, pretrained, tmp_path, caplog):
    pipe = frozen(pretrained)
    adapt(pipe.unet)
    keeper = keeper_of(pipe, tmp_path, strict=False)
    keeper.note(2, True)
    keeper.note(4, False)
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert keeper.write() is None
    (message,) = caplog.messages
    assert why in message
    assert name_of(2) in message
    kept = load_file(tmp_path / "rollback" / name_of(2))
    assert set(kept) == {f"unet/{name}" for name, p in pipe.unet.named_parameters() if p.requires_grad}


def test_a_model_that_was_changed_after_training_is_named(pipe, tmp_path, caplog):
    keeper = keeper_of(pipe, tmp_path, strict=False)
    keeper.note(2, True)
    keeper.note(4, False)
    add_lora(pipe.unet, "later")  # as a script that goes on with its model
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert keeper.write() is None
    (message,) = caplog.messages
    assert "unet was changed" in message
    assert name_of(2) in message


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_file_of_the_last_checkpoint_outlasts_newer_ones(pipe, tmp_path):
    keeper = keeper_of(pipe, tmp_path)
    keeper.note(0, True)
    assert keeper.state_dict() == {"step": 0, "unclean_since": None, "final": False}
    for step in (2, 4):
        keeper.note(step, True)
        assert files(tmp_path) == [name_of(0), name_of(step)]
    keeper.state_dict()
    assert files(tmp_path) == [name_of(4)]


@pytest.mark.parametrize("lora", [False, True])
def test_a_new_process_goes_on_from_a_checkpoint(lora, pretrained, tmp_path):
    def trained():
        found = frozen(pretrained)
        add_lora(found.unet, "default") if lora else found.unet.requires_grad_(True)
        return found

    torch.manual_seed(0)
    pipe = trained()
    keeper = keeper_of(pipe, tmp_path)
    train(pipe, 1)
    kept = said(pipe)
    keeper.note(2, True)
    keeper.note(4, False, final=True)
    state = json.loads(json.dumps(keeper.state_dict()))
    again = keeper_of(trained(), tmp_path)
    again.load_state_dict(state)
    again.note(6, True)
    assert (again.step, again.unclean_since, again.final) == (2, 4, True)
    torch.testing.assert_close(said(loaded(again.write(), pretrained)), kept)


def test_weights_that_are_gone_are_said_and_the_next_are_kept(pipe, tmp_path, caplog):
    keeper = keeper_of(pipe, tmp_path)
    keeper.note(2, True)
    keeper.note(4, False)
    state = keeper.state_dict()
    (tmp_path / "rollback" / name_of(2)).unlink()
    again = keeper_of(pipe, tmp_path)
    with caplog.at_level(logging.WARNING, "memwatch"):
        again.load_state_dict(state)
        assert again.write() is None
    assert "the weights of step 2, kept to roll back to, are missing" in caplog.text
    again.note(6, True)
    assert (again.step, again.unclean_since) == (6, None)


# --- training is untouched -------------------------------------------------------------------------------------------


KINDS = [{"ema": True}, {"lora": True}, {"ema": True, "checkpointing": True, "precision": "bf16"}]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind))
def test_training_is_bit_identical_with_and_without(kind, pretrained, pipeline, tmp_path):
    without, with_keeper = [], []
    Loop(pretrained, **kind).run(None, 4, each=lambda running: without.append(running.state()))
    loop = Loop(pretrained, tmp_path, **kind)
    before = loop.identities()
    keeper = LastClean(loop.watch(pipeline, config=SMALL).observer, tmp_path / "kept", Faults(strict=True))

    def each(running: Loop) -> None:
        keeper.note(running.step, running.step == 1)
        assert (keeper.write() is None) == (running.step == 0)
        with_keeper.append(running.state())

    keeper.note(0, True)
    loop.run(None, 4, each=lambda running: each(running) if running.step > 1 else keeper.note(1, True))
    assert_same(without[1:], with_keeper)
    assert (keeper.step, keeper.unclean_since) == (1, 2)
    after = loop.identities()
    assert all(after[key] == before[key] for key in ("forward", "processors", "parameters", "hooks"))


# --- two processes ---------------------------------------------------------------------------------------------------


def main(pretrained: Path, folder: Path) -> None:
    """On each rank: the disk of the first is full once, and both know."""
    loop = Loop(pretrained, folder)
    rank = loop.accelerator.process_index
    keeper = LastClean(loop.watch(pretrained, config=SMALL).observer, folder / "kept", Faults())
    found = []

    def each(running: Loop) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if running.step == 2:
                patch.setattr(memwatch.act.last_clean, "write_safetensors", no_space)
            keeper.note(running.step, running.step < 3)
        found.append([keeper.step, keeper.unclean_since, keeper._faults.count])

    loop.run(None, 3, each=each)
    written = keeper.write()
    loop.run(None, 4)  # DDP still averages the gradients
    sums = [float(p.double().sum()) for p in loop.bare.parameters()]
    result = {"found": found, "written": str(written), "sums": sums, "state": keeper.state_dict()}
    (folder / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_and_one_writes(pretrained, tmp_path):
    logs = on_two_ranks(__file__, pretrained, tmp_path, folder=tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert first == second
    assert first["found"] == [[1, None, 0], [1, None, 1], [1, 3, 1]]
    assert first["written"] == str(tmp_path / "kept" / "last_clean")
    assert files(tmp_path / "kept") == [name_of(1)]
    assert logs.count("To load them: unet = UNet2DConditionModel") == 1
    kept = load_file(tmp_path / "kept" / "rollback" / name_of(1))
    pipe = loaded(tmp_path / "kept" / "last_clean", pretrained)
    assert_same({f"unet/{name}": p.detach() for name, p in pipe.unet.named_parameters()}, kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
