"""The DreamBooth, textual inversion, SDXL and SD3 scripts, three steps each on a random pipeline of 16 px pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import textual_inversion
import torch
import train_dreambooth_lora
import train_lora_sd3
import train_text_to_image_sdxl
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from support.builders import SIZE, history, picture
from support.processes import new_process
from transformers import CLIPTextModel


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        picture(20 + i).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"a photo of number {i}"}) for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def run(script, pretrained: Path, output_dir: Path, *flags: object) -> None:
    """Three steps with an event after the second; an event that fails is an error."""
    config = output_dir.parent / f"{output_dir.name}.yaml"
    cheap = "levels: {timesteps: [141], draws: 2}\ncurvature: {vectors: 2, tile: 2}\nsignals: {unconditional: false}\n"
    config.write_text(f"every_steps: 2\nscreen: false\nstrict: true\n{cheap}", encoding="utf-8")
    common = {
        "pretrained_model_name_or_path": pretrained,
        "output_dir": output_dir,
        "resolution": SIZE,
        "mixed_precision": "no",
        "train_batch_size": 2,
        "max_train_steps": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "memwatch_config": config,
    }
    arguments = [part for name, value in common.items() for part in (f"--{name}", value)]
    try:
        script.main([str(argument) for argument in (*arguments, *flags)])
    finally:
        new_process()


def assert_watched(output_dir: Path) -> None:
    rows = history(output_dir)
    assert [row["step"] for row in rows] == [0, 2]
    names = [finding["name"] for finding in rows[-1]["findings"]]  # picked from the training images
    assert len(names) >= 2
    for name in names:
        assert rows[-1]["scalars"][f"memwatch/collapse/{name}"] != 0


def test_dreambooth_lora_with_prior_preservation(pretrained, photos, tmp_path, monkeypatch):
    real = StableDiffusionPipeline.__call__
    monkeypatch.setattr(
        StableDiffusionPipeline, "__call__", lambda self, *a, **k: real(self, *a, **k, num_inference_steps=2)
    )
    instance = ["--instance_data_dir", photos, "--instance_prompt", "a photo of sks dog"]
    prior = ["--class_data_dir", tmp_path / "dogs", "--class_prompt", "a photo of a dog", "--num_class_images", 2]
    flags = [*instance, "--with_prior_preservation", *prior, "--checkpointing_steps", 2]
    run(train_dreambooth_lora, pretrained, tmp_path / "out", *flags)
    assert sorted(file.name for file in (tmp_path / "dogs").iterdir()) == ["0.png", "1.png"]
    assert_watched(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(value.any() for name, value in saved.items() if "lora_B" in name or "lora.up" in name)
    assert (tmp_path / "out" / "checkpoint-2" / "trainable.safetensors").is_file()


def test_the_prior_loss_is_its_own_term():
    """Two pairs; a model that predicts zero, so that each term is the mean square of its noise."""

    class Zero(torch.nn.Module):
        def forward(self, latents, timesteps, hidden):
            return type("Output", (), {"sample": torch.zeros_like(latents)})

    class Posterior:
        def sample(self):
            return torch.zeros(4, 4, 8, 8)

    vae = type("Vae", (), {"dtype": torch.float32, "config": type("C", (), {"scaling_factor": 1.0})})
    vae.encode = lambda pixels: type("Encoded", (), {"latent_dist": Posterior()})
    frozen = {"vae": vae, "text_encoder": lambda ids: (ids,)}
    batch = {"pixel_values": torch.zeros(2, 2, 3, 16, 16), "input_ids": torch.zeros(2, 2, 5)}
    scheduler = DDIMScheduler()
    torch.manual_seed(0)
    eps = torch.randn(4, 4, 8, 8)
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        loss = train_dreambooth_lora.denoising_loss(Zero(), scheduler, frozen, batch, weight)
        expected = eps[[0, 2]].square().mean() + weight * eps[[1, 3]].square().mean()  # instance and class take turns
        torch.testing.assert_close(loss, expected)


def test_dreambooth_without_prior_needs_no_class(pretrained, photos, tmp_path, capsys):
    instance = ["--instance_data_dir", photos, "--instance_prompt", "sks"]
    run(train_dreambooth_lora, pretrained, tmp_path / "out", *instance)
    assert_watched(tmp_path / "out")
    with pytest.raises(SystemExit):
        run(train_dreambooth_lora, pretrained, tmp_path / "out", *instance, "--with_prior_preservation")
    assert "needs --class_data_dir and --class_prompt" in capsys.readouterr().err


def test_textual_inversion_moves_one_word_and_the_maps(pretrained, photos, tmp_path):
    flags = ["--train_data_dir", photos, "--placeholder_token", "<it>", "--initializer_token", "a"]
    run(textual_inversion, pretrained, tmp_path / "out", *flags, "--checkpointing_steps", 3)
    assert_watched(tmp_path / "out")
    before = CLIPTextModel.from_pretrained(pretrained, subfolder="text_encoder").get_input_embeddings().weight
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    after = next(value for name, value in saved.items() if "token_embedding" in name)
    assert len(after) == len(before) + 1
    assert torch.equal(before, after[:-1])
    assert torch.equal(load_file(tmp_path / "out" / "learned_embeds.safetensors")["<it>"][0], after[-1])


def test_sdxl(family_folders, photos, tmp_path):
    sdxl = family_folders["sdxl"]
    run(train_text_to_image_sdxl, sdxl, tmp_path / "out", "--train_data_dir", photos, "--gradient_checkpointing")
    assert_watched(tmp_path / "out")
    before, after = (
        UNet2DConditionModel.from_pretrained(path, subfolder="unet").state_dict() for path in (sdxl, tmp_path / "out")
    )
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])


def test_weights_stored_in_half_precision_are_trained_as_well(family_folders, pretrained, photos, tmp_path):
    """tiny-sd and the fp16 variants of the hub are stored so. All parts must be loaded in types that fit each other."""
    StableDiffusionXLPipeline.from_pretrained(family_folders["sdxl"], dtype=torch.float16).save_pretrained(
        tmp_path / "sdxl"
    )
    run(train_text_to_image_sdxl, tmp_path / "sdxl", tmp_path / "full", "--train_data_dir", photos)
    assert_watched(tmp_path / "full")
    StableDiffusionPipeline.from_pretrained(pretrained, dtype=torch.float16).save_pretrained(tmp_path / "sd")
    instance = ["--instance_data_dir", photos, "--instance_prompt", "sks", "--with_prior_preservation"]
    prior = ["--class_data_dir", tmp_path / "dogs", "--class_prompt", "a dog", "--num_class_images", 1]
    run(train_dreambooth_lora, tmp_path / "sd", tmp_path / "lora", *instance, *prior)
    assert_watched(tmp_path / "lora")


def test_lora_sd3(family_folders, photos, tmp_path):
    run(train_lora_sd3, family_folders["sd3-without-t5"], tmp_path / "out", "--train_data_dir", photos)
    assert_watched(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)
