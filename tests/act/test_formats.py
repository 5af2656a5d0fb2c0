"""What is rolled back to is what was kept: loaded by diffusers, it says the same, however it was trained."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from support.builders import assert_same
from support.families import network
from support.rollback import frozen, keeper_of, loaded, said, train
from torch import nn

FAMILIES = ("sd1", "sdxl", "sd3", "flux", "unconditional")


def roll_back(pipe, folder, *, move=train, **parts):
    """Train, keep, train on, and write; the folder, and what the pipeline said when it was kept."""
    keeper = keeper_of(pipe, folder, **parts)
    move(pipe, 1)
    kept = said(pipe, parts.get("prompt", "a photo of a cat"))
    keeper.note(2, True)
    move(pipe, 2)
    keeper.note(4, False)
    before = snapshot(pipe)
    written = keeper.write()
    assert written == folder / "last_clean"
    assert_same(snapshot(pipe), before)
    return written, kept


def snapshot(pipe) -> dict:
    """All of the live networks that writing could disturb."""
    found = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            found[name] = [
                dict(part.state_dict()),
                [p.data_ptr() for p in part.parameters()],
                len(part._state_dict_hooks),
            ]
            found[name] += [[p.requires_grad for p in part.parameters()], [m.training for m in part.modules()]]
            found[name] += [{key: str(value) for key, value in vars(part.config).items()}]
    found["random"] = torch.get_rng_state()
    return found


def add_lora(part: nn.Module, *, name: str = "default", modules=("to_q", "to_v"), rank: int = 2) -> None:
    from peft import LoraConfig

    torch.manual_seed(5)
    config = LoraConfig(r=rank, lora_alpha=3 * rank, lora_dropout=0.2, target_modules=list(modules))
    part.add_adapter(config, adapter_name=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_trained_as_a_whole(name, family_folders, tmp_path):
    pipe = frozen(family_folders[name])
    network(pipe).requires_grad_(True)
    folder, kept = roll_back(pipe, tmp_path)
    part = "transformer" if name in ("sd3", "flux") else "unet"
    assert {path.name for path in folder.iterdir()} == {part, "memwatch.json"}
    again = loaded(folder, family_folders[name])
    assert torch.equal(said(again), kept)
    assert not torch.equal(said(pipe), kept)


@pytest.mark.parametrize("name", FAMILIES[:-1])
def test_a_lora_of_any_name_with_its_rank_and_alpha(name, family_folders, tmp_path):
    pipe = frozen(family_folders[name])
    add_lora(network(pipe), name="mine", rank=3)
    folder, kept = roll_back(pipe, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"pytorch_lora_weights.safetensors", "memwatch.json"}
    torch.testing.assert_close(said(loaded(folder, family_folders[name])), kept)
    assert not torch.allclose(said(pipe), kept, atol=1e-4)
    assert not torch.allclose(said(frozen(family_folders[name])), kept, atol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_text_encoders_trained_along(name, family_folders, tmp_path):
    pipe = frozen(family_folders[name])
    network(pipe).requires_grad_(True)
    encoders = [pipe.text_encoder] if name == "sd1" else [None, pipe.text_encoder_2]
    encoders[-1].requires_grad_(True)
    folder, kept = roll_back(pipe, tmp_path, encoders=encoders)
    part = "text_encoder" if name == "sd1" else "text_encoder_2"
    assert {path.name for path in folder.iterdir()} == {"unet", part, "memwatch.json"}
    again = loaded(folder, family_folders[name])
    assert torch.equal(said(again), kept)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_loras_of_text_encoders_lie_in_the_same_file(name, family_folders, tmp_path, monkeypatch):
    # transformers 5.24 asks for a PEFT that is not out yet
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.17.0", raising=False)
    pipe = frozen(family_folders[name])
    encoders = [pipe.text_encoder] if name in ("sd1", "flux") else [pipe.text_encoder, pipe.text_encoder_2]
    add_lora(network(pipe))
    for encoder in encoders:
        add_lora(encoder, modules=("q_proj", "v_proj"))
    folder, kept = roll_back(pipe, tmp_path, encoders=encoders)
    assert {path.name for path in folder.iterdir()} == {"pytorch_lora_weights.safetensors", "memwatch.json"}
    torch.testing.assert_close(said(loaded(folder, family_folders[name])), kept)


def add_words(tokenizer, encoder: nn.Module, *words: str) -> nn.Parameter:
    tokenizer.add_tokens(list(words))
    torch.manual_seed(6)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return encoder.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)


def train_rows(weight: nn.Parameter, rows: slice):
    """As textual inversion scripts do it: every other row is put back."""

    def move(pipe, seed: int) -> None:
        with torch.no_grad():
            weight[rows] += torch.randn(weight[rows].shape, generator=torch.Generator().manual_seed(seed))

    return move


@pytest.mark.parametrize("words", [("<toy>",), ("<toy>", "<toy>_1"), ("<toy>", "<dog>", "<dog>_1")])
def test_a_textual_inversion(words, pretrained, tmp_path):
    pipe = frozen(pretrained)
    weight = add_words(pipe.tokenizer, pipe.text_encoder, *words)
    prompt = f"a photo of {' '.join(words)}"
    parts = {"encoders": pipe.text_encoder, "tokenizers": pipe.tokenizer, "prompt": prompt}
    folder, kept = roll_back(pipe, tmp_path, move=train_rows(weight, slice(-len(words), None)), **parts)
    assert {path.name for path in folder.iterdir()} == {"learned_embeds.safetensors", "memwatch.json"}
    shapes = {word: tuple(rows.shape) for word, rows in load_file(folder / "learned_embeds.safetensors").items()}
    first = {"<toy>": (2 if "<toy>_1" in words else 1, 16)}
    assert shapes == first | ({"<dog>": (2, 16)} if "<dog>" in words else {})
    torch.testing.assert_close(said(loaded(folder, pretrained), prompt), kept)


def test_a_textual_inversion_of_the_second_text_encoder(family_folders, tmp_path):
    pipe = frozen(family_folders["sdxl"])
    weight = add_words(pipe.tokenizer_2, pipe.text_encoder_2, "<toy>")
    parts = {"encoders": [None, pipe.text_encoder_2], "tokenizers": [None, pipe.tokenizer_2]}
    folder, _ = roll_back(pipe, tmp_path, move=train_rows(weight, slice(-1, None)), **parts)
    assert {path.name for path in folder.iterdir()} == {"learned_embeds_2.safetensors", "memwatch.json"}
    again = loaded(folder, family_folders["sdxl"])
    rows = again.text_encoder_2.get_input_embeddings().weight
    kept = load_file(folder / "learned_embeds_2.safetensors")["<toy>"][0]
    assert torch.equal(rows[again.tokenizer_2.convert_tokens_to_ids("<toy>")], kept)


def test_an_embedding_without_new_words_is_a_text_encoder(pretrained, tmp_path):
    """``load_textual_inversion`` refuses words that the tokenizer knows."""
    pipe = frozen(pretrained)
    pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    folder, kept = roll_back(pipe, tmp_path, encoders=pipe.text_encoder)
    assert {path.name for path in folder.iterdir()} == {"text_encoder", "memwatch.json"}
    assert torch.equal(said(loaded(folder, pretrained)), kept)


@pytest.mark.parametrize("lora", [False, True])
def test_the_averages_where_there_are_any(lora, pretrained, tmp_path):
    pipe = frozen(pretrained)
    add_lora(pipe.unet) if lora else pipe.unet.requires_grad_(True)
    ema = EMAModel(pipe.unet.parameters(), decay=0.5)

    def move(pipe, seed: int) -> None:
        for half in range(2):  # the first average is of one step only
            train(pipe, 2 * seed + half)
            ema.step(pipe.unet.parameters())

    folder, live = roll_back(pipe, tmp_path, move=move, ema=ema)
    again = loaded(folder, pretrained)
    assert not torch.allclose(said(again), live, atol=1e-4)

    other = frozen(pretrained)  # the same steps, and what its average says
    add_lora(other.unet) if lora else other.unet.requires_grad_(True)
    twin = EMAModel(other.unet.parameters(), decay=0.5)
    for seed in (2, 3):
        train(other, seed)
        twin.step(other.unet.parameters())
    twin.copy_to(other.unet.parameters())
    torch.testing.assert_close(said(again), said(other))
    assert json.loads((folder / "memwatch.json").read_text(encoding="utf-8"))["ema"]


def test_a_model_that_was_cast_is_written_as_it_was_trained(pretrained, tmp_path):
    pipe = frozen(pretrained)
    pipe.unet.requires_grad_(True)
    keeper = keeper_of(pipe, tmp_path)
    train(pipe, 1)
    kept = said(pipe)
    keeper.note(2, True)
    keeper.note(4, False)
    pipe.unet.to(torch.float16)
    assert torch.equal(said(loaded(keeper.write(), pretrained)), kept)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float16}


def peft_model(unet: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))


def dora(unet: nn.Module) -> None:
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=["to_q", "to_v"]))


def half_frozen(unet: nn.Module) -> None:
    add_lora(unet)
    for name, p in unet.named_parameters():
        p.requires_grad_(".lora_B." in name)


@pytest.mark.parametrize("adapt", [peft_model, dora, half_frozen])
def test_other_loras(adapt, pretrained, tmp_path):
    pipe = frozen(pretrained)
    adapt(pipe.unet)
    folder, kept = roll_back(pipe, tmp_path)
    torch.testing.assert_close(said(loaded(folder, pretrained)), kept)
