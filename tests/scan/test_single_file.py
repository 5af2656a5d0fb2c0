"""Full checkpoints in one file, under the names of the original repositories: what is loaded predicts the same."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from safetensors.torch import save_file
from support.families import PROMPT, SIZE, adapted, network
from support.originals import clip_weights, open_clip_weights, original_weights

from memwatch.scan.checkpoint_store import copy_text_encoders
from memwatch.scan.checkpoints import copy_into, load_model, read_weights, text_encoders
from memwatch.scan.weight_files import CheckpointError

FAMILIES = ("sd1", "sdxl", "sd3")


def moved(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Other weights."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return other.eval()


def encoders_of(name: str, encoders) -> dict[str, torch.Tensor]:
    """As each family's single files have them."""
    if name == "sd1":
        return clip_weights(encoders[0], "cond_stage_model.transformer.")
    if name == "sd2":
        return open_clip_weights(encoders[0], "cond_stage_model.model.")
    if name == "sdxl":
        first = clip_weights(encoders[0], "conditioner.embedders.0.transformer.")
        return first | open_clip_weights(encoders[1], "conditioner.embedders.1.model.")
    return clip_weights(encoders[1], "text_encoders.clip_g.transformer.")


def said(model, pipe, encoders) -> torch.Tensor:
    """Epsilon of fixed noise and a fixed prompt."""
    denoiser, parts = adapted(pipe)
    denoiser.model, parts.text_encoders = model, tuple(encoders)
    noisy = torch.randn(1, denoiser.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompt = denoiser.stack([denoiser.encode(PROMPT, parts, SIZE)])
        return denoiser(noisy, torch.tensor([301]), prompt)


@pytest.fixture(params=FAMILIES)
def checkpoint(request, families, tmp_path):
    """Name, the base's pipeline, other weights of its denoiser, and a file of them without text encoders."""
    pipe = families[request.param]
    model = moved(network(pipe))
    save_file(original_weights(model), tmp_path / "model.safetensors")
    return request.param, pipe, model, str(tmp_path / "model.safetensors")


def test_the_denoiser_and_a_later_one(checkpoint, family_folders):
    name, pipe, model, source = checkpoint
    loaded = load_model(source, family_folders[name])
    assert type(loaded) is type(model)
    assert not loaded.training
    for (key, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    parts = adapted(pipe)[1].text_encoders
    assert torch.equal(said(loaded, pipe, parts), said(model, pipe, parts))
    assert text_encoders(source) == []
    later = moved(model, 1).half()
    save_file(original_weights(later), source)
    copy_into(loaded, read_weights(source, loaded))
    for ours, theirs in zip(loaded.parameters(), later.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3"])
def test_the_text_encoders(name, families, tmp_path, caplog):
    pipe = families["sd1" if name == "sd2" else name]
    denoiser, parts = adapted(pipe)
    trained = [moved(encoder, 2) if encoder is not None else None for encoder in parts.text_encoders]
    source = str(tmp_path / "model.safetensors")
    save_file(original_weights(network(pipe)) | encoders_of(name, trained), source)
    running = [copy.deepcopy(encoder) for encoder in parts.text_encoders]
    inside = {"sdxl": ["text_encoder", "text_encoder_2"], "sd3": ["text_encoder_2"]}.get(name, ["text_encoder"])
    assert text_encoders(source) == inside
    with caplog.at_level(logging.WARNING, "memwatch"):
        copy_text_encoders(source, denoiser, running)
    assert not caplog.text
    for number, (ours, theirs, base) in enumerate(zip(running, trained, parts.text_encoders, strict=True)):
        part = "text_encoder" + (f"_{number + 1}" if number else "")
        expected = theirs if part in inside else base
        for (key, a), b in zip(ours.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b), (part, key)


@pytest.mark.parametrize(("name", "base"), [("sd1", "sdxl"), ("sdxl", "sd1"), ("sd3", "sd1"), ("sd1", "sd3")])
def test_a_file_of_another_base(name, base, families, family_folders, tmp_path):
    source = str(tmp_path / f"{name}.safetensors")
    save_file(original_weights(network(families[name])), source)
    with pytest.raises(CheckpointError, match=rf"^\S+{name}.safetensors: ") as caught:
        load_model(source, family_folders[base])
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=rf"^\S+{name}.safetensors: "):
        read_weights(source, network(families[base]))


def test_what_is_wrong_is_said(families, family_folders, tmp_path):
    weights = original_weights(network(families["sd1"]))
    file = tmp_path / "model.safetensors"
    del weights["model.diffusion_model.out.2.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"lacks some parameters of the base \(UNet2D"):
        load_model(str(file), family_folders["sd1"])
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="none of its 1 tensors is a parameter of the UNet2DConditionModel"):
        load_model(str(file), family_folders["sd1"])
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.ckpt: is empty"):
        load_model(str(tmp_path / "model.ckpt"), family_folders["sd1"])
