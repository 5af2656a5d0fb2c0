"""The DreamBooth, textual inversion, SDXL and SD3 scripts: three steps, the same with and without memwatch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import textual_inversion
import torch
import train_dreambooth_lora
import train_lora_sd3
import train_text_to_image_sdxl
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file
from support.builders import assert_same, history
from transformers import CLIPTextModel

import memwatch

LORA = "pytorch_lora_weights.safetensors"
UNWATCHED = SimpleNamespace(should_stop=False, guard=lambda loader: loader, on_step_end=lambda step: None)


@pytest.fixture
def run(train, tmp_path, monkeypatch):
    """Runs a script into ``tmp_path/out`` with an event after the second step, and once more without memwatch."""

    def both(script, pretrained: Path, flags: str) -> None:
        flags = f"--train_batch_size 2 --max_train_steps 3 --report_to none {flags}"
        train(script, pretrained, tmp_path / "out", flags)
        rows = history(tmp_path / "out")
        assert [row["step"] for row in rows] == [0, 2]
        names = [finding["name"] for finding in rows[-1]["findings"]]  # picked from the training images
        assert len(names) >= 2
        assert all(rows[-1]["scalars"][f"memwatch/collapse/{name}"] != 0 for name in names)
        with monkeypatch.context() as patch:
            patch.setattr(memwatch, "MemWatch", lambda *_, **__: UNWATCHED)
            train(script, pretrained, tmp_path / "alone", flags)
        assert weights_in(tmp_path / "alone")
        assert_same(weights_in(tmp_path / "alone"), weights_in(tmp_path / "out"))

    return both


def weights_in(folder: Path) -> dict[Path, dict]:
    files = [file.relative_to(folder) for file in folder.rglob("*.safetensors")]
    return {file: load_file(folder / file) for file in files if file.parts[0] != "memwatch"}


@pytest.fixture
def halved(tmp_path):
    """A pipeline stored in half precision, as tiny-sd and the fp16 variants of the hub are; all of it is trained."""

    def save(folder: Path) -> Path:
        DiffusionPipeline.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
        return tmp_path / "half"

    return save


def test_dreambooth_lora_with_prior_preservation(run, pretrained, halved, photos, tmp_path):
    flags = f"--instance_data_dir {photos} --instance_prompt sks --with_prior_preservation"
    flags += f" --class_data_dir {tmp_path / 'dogs'} --class_prompt dog --num_class_images 2"
    run(train_dreambooth_lora, halved(pretrained), flags)
    assert sorted(file.name for file in (tmp_path / "dogs").iterdir()) == ["0.png", "1.png"]
    learned = [up.any() for name, up in load_file(tmp_path / "out" / LORA).items() if "lora_B" in name]
    assert all(learned)
    assert learned


def test_dreambooth_without_prior_needs_no_class(run, pretrained, photos, tmp_path, capsys):
    flags = f"--instance_data_dir {photos} --instance_prompt sks --checkpointing_steps 2"
    run(train_dreambooth_lora, pretrained, flags)
    assert (tmp_path / "out" / "checkpoint-2" / "trainable.safetensors").is_file()
    with pytest.raises(SystemExit):
        run(train_dreambooth_lora, pretrained, f"{flags} --with_prior_preservation")
    assert "needs --class_data_dir and --class_prompt" in capsys.readouterr().err


def predict_zero(latents, *_):
    return SimpleNamespace(sample=torch.zeros_like(latents))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_prior_loss_is_its_own_term(weight):
    """Two pairs. Where the model predicts zero, each term is the mean square of its noise."""
    latents = torch.zeros(4, 4, 8, 8)
    encoded = SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: latents))
    vae = SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(scaling_factor=1.0), encode=lambda _: encoded)
    frozen = {"vae": vae, "text_encoder": lambda ids: (ids,)}
    batch = {"pixel_values": torch.zeros(2, 2, 3, 16, 16), "input_ids": torch.zeros(2, 2, 5)}
    torch.manual_seed(0)
    eps = torch.randn_like(latents)
    torch.manual_seed(0)
    loss = train_dreambooth_lora.denoising_loss(predict_zero, DDIMScheduler(), frozen, batch, weight)
    expected = eps[[0, 2]].square().mean() + weight * eps[[1, 3]].square().mean()  # instance and class take turns
    torch.testing.assert_close(loss, expected)


def test_textual_inversion_moves_one_word_and_the_maps(run, pretrained, photos, tmp_path):
    flags = f"--train_data_dir {photos} --placeholder_token <it> --initializer_token a --checkpointing_steps 3"
    run(textual_inversion, pretrained, flags)
    before = CLIPTextModel.from_pretrained(pretrained, subfolder="text_encoder").get_input_embeddings().weight
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    after = next(value for name, value in saved.items() if "token_embedding" in name)
    assert len(after) == len(before) + 1
    assert torch.equal(before, after[:-1])
    assert torch.equal(load_file(tmp_path / "out" / "learned_embeds.safetensors")["<it>"][0], after[-1])


def test_sdxl(run, family_folders, halved, photos, tmp_path):
    sdxl = halved(family_folders["sdxl"])
    run(train_text_to_image_sdxl, sdxl, f"--train_data_dir {photos} --gradient_checkpointing")
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / file)["conv_in.weight"].float() for folder in (sdxl, tmp_path / "out"))
    assert not torch.equal(before, after)


def test_lora_sd3(run, family_folders, photos, tmp_path):
    run(train_lora_sd3, family_folders["sd3-without-t5"], f"--train_data_dir {photos}")
    assert any(up.any() for name, up in load_file(tmp_path / "out" / LORA).items() if "lora_B" in name)
