"""What is kept to roll back to: the newest clean weights as diffusers loads them, through full disks and resumes."""

from __future__ import annotations

import errno
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from support.builders import assert_same
from support.families import network
from support.rollback import add_lora, frozen, keeper_of, loaded, said, snapshot, train
from torch import nn

import memwatch.act.last_clean
from memwatch.act.actions import Actions
from memwatch.act.last_clean import is_clean
from memwatch.config import MemWatchConfig
from memwatch.faults import Faults
from memwatch.judge.verdict import ProbeState, Verdict

FAMILIES = ("sd1", "sdxl", "sd3", "flux", "unconditional")


@pytest.fixture
def pipe(pretrained):
    """A whole UNet is trained."""
    found = frozen(pretrained)
    found.unet.requires_grad_(True)
    return found


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "last_clean").glob("*"))


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- which weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "clean"),
    [
        (ProbeState(), True),  # nothing to compare with yet
        (ProbeState(verdict=Verdict.SUSPICIOUS, since=4), True),
        (ProbeState(verdict=Verdict.SUSPICIOUS, since=4, has_begun=True), False),
        (ProbeState(verdict=Verdict.MEMORIZED, since=4), False),
        (ProbeState(verdict=Verdict.INCONCLUSIVE, finite=False), False),
    ],
)
def test_what_is_memorized_is_not_clean(state, clean):
    quiet = ProbeState(verdict=Verdict.NO_EVIDENCE)
    states = {"a": quiet, "b": state, "control/c": replace(quiet, verdict=Verdict.MEMORIZED)}
    findings = [SimpleNamespace(name=name, state=states[name], verdict=states[name].verdict) for name in "ab"]
    assert is_clean(states, findings) is clean
    assert is_clean(states, findings[:1])


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
def test_the_newest_clean_weights_are_kept_until_something_is_memorized(
    events, kept, unclean_since, pipe, pretrained, tmp_path
):
    keeper, outputs = keeper_of(pipe, tmp_path), []
    for step, event in enumerate(events):
        train(pipe, step)
        outputs.append(said(pipe))
        keeper.note(step, event == "c", final=event == "m")
    assert (keeper.step, keeper.unclean_since) == (kept, unclean_since)
    assert steps_in(tmp_path) == ([] if kept is None else [kept])
    folder = keeper.end()
    assert (folder is not None) == (kept is not None and unclean_since is not None)
    assert (tmp_path / "last_clean").exists() == (folder is not None)  # else the final model is the clean one
    if folder is not None:
        assert torch.equal(said(loaded(folder, pretrained)), outputs[kept])


def test_it_says_once_how_to_load_it(pipe, tmp_path, caplog):
    keeper, folder = keeper_of(pipe, tmp_path), tmp_path / "last_clean" / "step_0000002"
    for step in (2, 4, 6):
        keeper.note(step, step == 2)
    with caplog.at_level(logging.INFO, "memwatch"):
        assert keeper.end() == keeper.end() == folder
    (message,) = caplog.messages
    about = json.loads((folder / "memwatch.json").read_text(encoding="utf-8"))
    assert "the latest weights saved before any probe was memorized (step 2) are in" in message
    assert "since step 4 one is" in message
    assert message.endswith(f"To load them: unet = UNet2DConditionModel.from_pretrained('{folder}/unet')")
    assert message.endswith(about["load"])
    assert (about["step"], about["ema"]) == (2, False)
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
    assert torch.equal(said(loaded(keeper.end(), pretrained)), kept)


def test_shards_and_averages_of_other_tensors_are_said(pipe, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "memwatch"):
        keeper = keeper_of(pipe, tmp_path, ema=EMAModel(list(pipe.unet.parameters())[:3]))
        observer = SimpleNamespace(ranks=replace(keeper.ranks, sharding="FSDP2", lockstep=True))
        Actions(MemWatchConfig(), observer, Faults(), None, {}, None).end()
    assert "the EMA averages 3 tensors, and the model has" in caplog.messages[0]
    assert "rollback is off, because FSDP2 holds the model in shards" in caplog.messages[1]


# --- every way to train ----------------------------------------------------------------------------------------------


def roll_back(pipe, folder, *, move=train, **parts):
    """Train, keep, and train on; the folder, and what the pipeline said when it was kept."""
    keeper = keeper_of(pipe, folder, **parts)
    move(pipe, 1)
    kept, before = said(pipe, parts.get("prompt", "a photo of a cat")), snapshot(pipe)
    keeper.note(2, True)
    assert_same(snapshot(pipe), before)
    move(pipe, 2)
    keeper.note(4, False)
    return keeper.end(), kept


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"memwatch.json"}


def whole(pipe):
    network(pipe).requires_grad_(True)


def whole_with_text(pipe):
    whole(pipe)
    encoders = [pipe.text_encoder] if not hasattr(pipe, "text_encoder_2") else [None, pipe.text_encoder_2]
    encoders[-1].requires_grad_(True)
    return encoders


def embedding(pipe):
    """Without new words; ``load_textual_inversion`` refuses those that the tokenizer knows."""
    pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    return [pipe.text_encoder]


def lora(pipe):
    add_lora(network(pipe), name="mine", rank=3)


def lora_with_text(pipe):
    lora(pipe)
    clips = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    clips = [clip for clip in clips if type(clip).__name__.startswith("CLIP")]
    for clip in clips:
        add_lora(clip, modules=("q_proj", "v_proj"))
    return clips


def dora(pipe):
    add_lora(pipe.unet, use_dora=True)


def half_frozen(pipe):
    add_lora(pipe.unet)
    for name, p in pipe.unet.named_parameters():
        p.requires_grad_(".lora_B." in name)


def peft_model(pipe):
    from peft import LoraConfig, get_peft_model

    get_peft_model(pipe.unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))


LORA_FILE, TRANSFORMERS = {"pytorch_lora_weights.safetensors"}, ("sd3", "flux")


@pytest.mark.parametrize(
    ("name", "adapt", "files"),
    [
        *((name, whole, {"transformer" if name in TRANSFORMERS else "unet"}) for name in FAMILIES),
        ("sd1", whole_with_text, {"unet", "text_encoder"}),
        ("sdxl", whole_with_text, {"unet", "text_encoder_2"}),
        ("sd1", embedding, {"text_encoder"}),
        *((name, adapt, LORA_FILE) for name in FAMILIES[:-1] for adapt in (lora, lora_with_text)),
        *(("sd1", adapt, LORA_FILE) for adapt in (dora, half_frozen, peft_model)),
    ],
)
def test_what_diffusers_loads_says_what_was_kept(name, adapt, files, family_folders, tmp_path, monkeypatch):
    # transformers 5.24 asks for a PEFT that is not out yet
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.17.0", raising=False)
    pipe = frozen(family_folders[name])
    folder, kept = roll_back(pipe, tmp_path, encoders=adapt(pipe))
    assert names_in(folder) == files
    again = said(loaded(folder, family_folders[name]))
    exactly = {} if files == LORA_FILE else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(again, kept, **exactly)
    for other in (pipe, frozen(family_folders[name])):
        assert not torch.allclose(said(other), kept, atol=1e-5)


def add_words(tokenizer, encoder: nn.Module, *words: str) -> nn.Parameter:
    tokenizer.add_tokens(list(words))
    torch.manual_seed(6)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return encoder.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)


def train_rows(weight: nn.Parameter, number: int):
    """As textual inversion scripts do it: every row but the last ones is put back."""

    def move(pipe, seed: int) -> None:
        with torch.no_grad():
            weight[-number:] += torch.randn(number, weight.shape[1], generator=torch.Generator().manual_seed(seed))

    return move


@pytest.mark.parametrize("words", [("<toy>",), ("<toy>", "<toy>_1"), ("<toy>", "<dog>", "<dog>_1")])
def test_a_textual_inversion(words, pretrained, tmp_path):
    pipe = frozen(pretrained)
    weight = add_words(pipe.tokenizer, pipe.text_encoder, *words)
    prompt = f"a photo of {' '.join(words)}"
    parts = {"encoders": pipe.text_encoder, "tokenizers": pipe.tokenizer, "prompt": prompt}
    folder, kept = roll_back(pipe, tmp_path, move=train_rows(weight, len(words)), **parts)
    assert names_in(folder) == {"learned_embeds.safetensors"}
    shapes = {word: tuple(rows.shape) for word, rows in load_file(folder / "learned_embeds.safetensors").items()}
    first = {"<toy>": (2 if "<toy>_1" in words else 1, 16)}
    assert shapes == first | ({"<dog>": (2, 16)} if "<dog>" in words else {})
    torch.testing.assert_close(said(loaded(folder, pretrained), prompt), kept)


def test_a_textual_inversion_of_the_second_text_encoder(family_folders, tmp_path):
    pipe = frozen(family_folders["sdxl"])
    weight = add_words(pipe.tokenizer_2, pipe.text_encoder_2, "<toy>")
    parts = {"encoders": [None, pipe.text_encoder_2], "tokenizers": [None, pipe.tokenizer_2]}
    folder, _ = roll_back(pipe, tmp_path, move=train_rows(weight, 1), **parts)
    assert names_in(folder) == {"learned_embeds_2.safetensors"}
    again = loaded(folder, family_folders["sdxl"])
    rows = again.text_encoder_2.get_input_embeddings().weight
    kept = load_file(folder / "learned_embeds_2.safetensors")["<toy>"][0]
    assert torch.equal(rows[again.tokenizer_2.convert_tokens_to_ids("<toy>")], kept)


@pytest.mark.parametrize("adapt", [whole, lora])
def test_the_averages_where_there_are_any(adapt, pretrained, tmp_path):
    def begin():
        pipe = frozen(pretrained)
        adapt(pipe)
        return pipe, EMAModel(pipe.unet.parameters(), decay=0.5)

    pipe, ema = begin()

    def move(pipe, seed: int) -> None:
        for half in range(2):  # the first average is of one step only
            train(pipe, 2 * seed + half)
            ema.step(pipe.unet.parameters())

    folder, live = roll_back(pipe, tmp_path, move=move, ema=ema)
    again = said(loaded(folder, pretrained))
    assert not torch.allclose(again, live, atol=1e-4)
    pipe, ema = begin()  # the same steps, and what its average says
    move(pipe, 1)
    ema.copy_to(pipe.unet.parameters())
    torch.testing.assert_close(again, said(pipe))
    assert json.loads((folder / "memwatch.json").read_text(encoding="utf-8"))["ema"]


def two_adapters(unet: nn.Module) -> None:
    add_lora(unet, name="one")
    add_lora(unet, name="two")
    for name, p in unet.named_parameters():
        p.requires_grad_(".lora_" in name)


def lora_and_more(unet: nn.Module) -> None:
    add_lora(unet)
    unet.conv_out.requires_grad_(True)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT warns of several adapters
@pytest.mark.parametrize(
    ("adapt", "why"),
    [
        (two_adapters, "unet trains 2 adapters (one, two), and one file holds one"),
        (lora_and_more, "unet holds adapters and trains more than them"),
    ],
)
def test_what_diffusers_has_no_form_for_is_said(adapt, why, pretrained, tmp_path, caplog):
    pipe = frozen(pretrained)
    adapt(pipe.unet)
    keeper = keeper_of(pipe, tmp_path, strict=False)
    with caplog.at_level(logging.WARNING, "memwatch"):
        for step in range(5):
            keeper.note(step, True)
    assert keeper.end() is None
    assert [why in message for message in caplog.messages] == [True, True]  # the second time it is switched off
    assert steps_in(tmp_path) == []


@pytest.mark.parametrize("where", ["save_pretrained", "write_json"])
def test_a_full_disk_leaves_what_was_kept(where, pipe, pretrained, tmp_path, monkeypatch, caplog):
    keeper = keeper_of(pipe, tmp_path, strict=False)
    kept = said(pipe)
    keeper.note(0, True)
    with monkeypatch.context() as full, caplog.at_level(logging.WARNING, "memwatch"):
        full.setattr(pipe.unet if where == "save_pretrained" else memwatch.act.last_clean, where, no_space)
        train(pipe, 1)
        keeper.note(2, True)
    assert sum("keeping the weights to roll back to failed" in message for message in caplog.messages) == 1
    assert (keeper._faults.count, keeper.step, steps_in(tmp_path)) == (1, 0, [0])
    assert not pipe.unet._state_dict_hooks
    keeper.note(4, False)
    assert torch.equal(said(loaded(keeper.end(), pretrained)), kept)
    keeper.note(6, True)  # there is space again
    assert (keeper.step, steps_in(tmp_path)) == (6, [6])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_weights_of_the_last_checkpoint_outlast_newer_ones(pipe, tmp_path):
    keeper = keeper_of(pipe, tmp_path)
    keeper.note(0, True)
    assert keeper.state_dict() == {"step": 0, "unclean_since": None, "final": False}
    for step in (2, 4):
        keeper.note(step, True)
        assert steps_in(tmp_path) == [0, step]
    keeper.state_dict()
    keeper.note(6, True)
    assert steps_in(tmp_path) == [4, 6]


@pytest.mark.parametrize("adapt", [whole, lora])
def test_a_new_process_goes_on_from_a_checkpoint(adapt, pretrained, tmp_path, caplog):
    def trained():
        found = frozen(pretrained)
        adapt(found)
        return found

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
    torch.testing.assert_close(said(loaded(again.end(), pretrained)), kept)
    (again.end() / "memwatch.json").unlink()
    again = keeper_of(trained(), tmp_path)
    again.load_state_dict(state | {"final": False})
    assert "the weights of step 2, kept to roll back to, are missing" in caplog.text
    assert again.end() is None
    again.note(6, True)
    assert (again.step, again.unclean_since) == (6, None)
