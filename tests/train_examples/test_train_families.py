"""The DreamBooth, textual inversion, SDXL and SD3 scripts: three steps, the same with and without memwatch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import textual_inversion
import torch
import train_dreambooth_lora
import train_lora_sd3
import train_text_to_image_sdxl
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from support.builders import assert_same, history, picture
from support.families import SIZE
from support.processes import new_process
from transformers import CLIPTextModel

import memwatch


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        picture(20 + i).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"a photo of number {i}"}) for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


class Unwatched:
    """Takes the place of ``MemWatch`` and does nothing."""

    should_stop = False

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def guard(self, loader):
        return loader

    def on_step_end(self, step: int) -> None:
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script into ``tmp_path/out`` with an event after the second step, and once more without memwatch."""

    def train(script, pretrained: Path, output_dir: Path, flags: tuple[object, ...]) -> dict[Path, dict]:
        common = {
            "pretrained_model_name_or_path": pretrained,
            "output_dir": output_dir,
            "resolution": SIZE,
            "mixed_precision": "no",
            "train_batch_size": 2,
            "max_train_steps": 3,
            "learning_rate": 1e-2,
            "report_to": "none",
            "memwatch_config": tmp_path / "small.yaml",
        }
        arguments = [part for name, value in common.items() for part in (f"--{name}", value)]
        try:
            script.main([str(argument) for argument in (*arguments, *flags)])
        finally:
            new_process()
        saved = (file.relative_to(output_dir) for file in output_dir.rglob("*.safetensors"))
        return {name: load_file(output_dir / name) for name in saved if name.parts[0] != "memwatch"}

    def both(script, pretrained: Path, *flags: object) -> None:
        cheap = "every_steps: 2\nstrict: true\nlevels: {timesteps: [141], draws: 2}\ncurvature: {vectors: 2, tile: 2}\n"
        (tmp_path / "small.yaml").write_text(cheap, encoding="utf-8")
        watched = train(script, pretrained, tmp_path / "out", flags)
        assert_watched(tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(memwatch, "MemWatch", Unwatched)
            alone = train(script, pretrained, tmp_path / "alone", flags)
        assert alone
        assert_same(alone, watched)

    return both


def assert_watched(output_dir: Path) -> None:
    rows = history(output_dir)
    assert [row["step"] for row in rows] == [0, 2]
    names = [finding["name"] for finding in rows[-1]["findings"]]  # picked from the training images
    assert len(names) >= 2
    for name in names:
        assert rows[-1]["scalars"][f"memwatch/collapse/{name}"] != 0


def test_dreambooth_lora_with_prior_preservation(run, pretrained, photos, tmp_path):
    instance = ["--instance_data_dir", photos, "--instance_prompt", "a photo of sks dog"]
    prior = ["--class_data_dir", tmp_path / "dogs", "--class_prompt", "a photo of a dog", "--num_class_images", 2]
    flags = [*instance, "--with_prior_preservation", *prior, "--checkpointing_steps", 2]
    run(train_dreambooth_lora, pretrained, *flags)
    assert sorted(file.name for file in (tmp_path / "dogs").iterdir()) == ["0.png", "1.png"]
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


def test_dreambooth_without_prior_needs_no_class(run, pretrained, photos, capsys):
    instance = ["--instance_data_dir", photos, "--instance_prompt", "sks"]
    run(train_dreambooth_lora, pretrained, *instance)
    with pytest.raises(SystemExit):
        run(train_dreambooth_lora, pretrained, *instance, "--with_prior_preservation")
    assert "needs --class_data_dir and --class_prompt" in capsys.readouterr().err


def test_textual_inversion_moves_one_word_and_the_maps(run, pretrained, photos, tmp_path):
    flags = ["--train_data_dir", photos, "--placeholder_token", "<it>", "--initializer_token", "a"]
    run(textual_inversion, pretrained, *flags, "--checkpointing_steps", 3)
    before = CLIPTextModel.from_pretrained(pretrained, subfolder="text_encoder").get_input_embeddings().weight
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    after = next(value for name, value in saved.items() if "token_embedding" in name)
    assert len(after) == len(before) + 1
    assert torch.equal(before, after[:-1])
    assert torch.equal(load_file(tmp_path / "out" / "learned_embeds.safetensors")["<it>"][0], after[-1])


def test_sdxl(run, family_folders, photos, tmp_path):
    sdxl = family_folders["sdxl"]
    run(train_text_to_image_sdxl, sdxl, "--train_data_dir", photos, "--gradient_checkpointing")
    before, after = (
        UNet2DConditionModel.from_pretrained(path, subfolder="unet").state_dict() for path in (sdxl, tmp_path / "out")
    )
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])


def test_lora_sd3(run, family_folders, photos, tmp_path):
    run(train_lora_sd3, family_folders["sd3-without-t5"], "--train_data_dir", photos)
    saved = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["sdxl", "dreambooth"])
def test_weights_stored_in_half_precision_are_trained_as_well(kind, run, family_folders, pretrained, photos, tmp_path):
    """tiny-sd and the fp16 variants of the hub are stored so. All parts must be loaded in types that fit each other."""
    path = family_folders["sdxl"] if kind == "sdxl" else pretrained
    DiffusionPipeline.from_pretrained(path, dtype=torch.float16).save_pretrained(tmp_path / "half")
    if kind == "sdxl":
        run(train_text_to_image_sdxl, tmp_path / "half", "--train_data_dir", photos)
        return
    instance = ["--instance_data_dir", photos, "--instance_prompt", "sks", "--with_prior_preservation"]
    prior = ["--class_data_dir", tmp_path / "dogs", "--class_prompt", "a dog", "--num_class_images", 1]
    run(train_dreambooth_lora, tmp_path / "half", *instance, *prior)
