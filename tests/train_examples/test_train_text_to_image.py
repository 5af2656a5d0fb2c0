"""The fine-tune script, shrunk: a random pipeline of 16 px pictures and five random images."""

from __future__ import annotations

import json
from pathlib import Path

import common
import numpy as np
import pytest
import torch
import train_text_to_image
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from support.builders import EAGER, history, without_time
from support.families import SIZE
from support.processes import new_process


def write_images(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (SIZE + 8, SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"a photo of number {i}" + " and so on" * 30 * (i == 0)})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", count=5, seed=0)


def train(pretrained: Path, images: Path, output_dir: Path, *flags: str) -> None:
    """Run the script, as in a process of its own."""
    paths = {"pretrained_model_name_or_path": pretrained, "train_data_dir": images, "output_dir": output_dir}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    arguments += f"--resolution {SIZE} --mixed_precision no --train_batch_size 2".split()
    try:
        train_text_to_image.main([*arguments, *flags])
    finally:
        new_process()


def events(output_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (output_dir / "logs" / "text-to-image").glob("events.*")}
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def unet_weights(folder: Path) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()


def test_full_training_saves_the_averaged_weights_of_a_whole_pipeline(pretrained, images, tmp_path):
    flags = "--use_ema --gradient_checkpointing --gradient_accumulation_steps 2 --snr_gamma 5 --random_flip"
    flags += " --lr_warmup_steps 1 --lr_scheduler cosine --learning_rate 1e-2 --no_memwatch"
    train(pretrained, images, tmp_path, *flags.split(), "--max_train_steps", "3", "--checkpointing_steps", "3")

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    shadow = torch.load(tmp_path / "checkpoint-3" / "custom_checkpoint_0.pkl")["shadow_params"]
    assert all(torch.equal(a, b) for a, b in zip(pipeline.unet.parameters(), shadow, strict=True))
    live = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert not torch.equal(live["conv_in.weight"], pipeline.unet.conv_in.weight)
    assert not torch.equal(unet_weights(pretrained)["conv_in.weight"], pipeline.unet.conv_in.weight)
    losses = events(tmp_path).Scalars("train_loss")
    assert [point.step for point in losses] == [1, 2, 3]
    assert all(0 < point.value < 3 for point in losses)


def test_lora_in_bf16_saves_adapters_that_load(pretrained, images, tmp_path):
    flags = "--lora --rank 2 --mixed_precision bf16 --max_train_steps 3 --learning_rate 1e-2 --no_memwatch"
    flags += " --checkpointing_steps 1 --checkpoints_total_limit 2"
    train(pretrained, images, tmp_path, *flags.split())

    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    kept = load_file(tmp_path / "checkpoint-3" / "trainable.safetensors")
    assert all("lora" in name and tensor.dtype == torch.float32 for name, tensor in kept.items())
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()

    pipeline = StableDiffusionPipeline.from_pretrained(pretrained, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path)
    loaded = [parameter for name, parameter in pipeline.unet.named_parameters() if "lora_B" in name]
    assert loaded
    assert all(parameter.abs().sum() > 0 for parameter in loaded)


@pytest.fixture(scope="module")
def watching(tmp_path_factory) -> list[str]:
    """Flags of a cheap watch: an event every two steps."""
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    levels = "levels: {timesteps: [141], draws: 2}\ncurvature: {vectors: 2, tile: 2}\n"
    file.write_text(f"every_steps: 2\nstrict: true\n{levels}sampling: {{num_inference_steps: 2}}\n", encoding="utf-8")
    return ["--memwatch_config", str(file), "--learning_rate", "1e-2"]


@pytest.mark.parametrize(
    "kind", [["--use_ema", "--gradient_checkpointing"], ["--lora", "--mixed_precision", "bf16"]], ids=["full", "lora"]
)
def test_watched_training_is_the_same_training_and_resumes_with_its_history(
    kind, watching, pretrained, images, tmp_path
):
    """Three steps per epoch, the third of half a window; the checkpoint lies within the first epoch."""
    odd = "--train_batch_size 1 --gradient_accumulation_steps 2 --random_flip --checkpointing_steps 2".split()
    flags, steps = [*kind, *watching, *odd], "--max_train_steps"
    train(pretrained, images, tmp_path / "bare", *flags, steps, "4", "--no_memwatch")
    train(pretrained, images, tmp_path / "watched", *flags, steps, "4")
    train(pretrained, images, tmp_path / "resumed", *flags, steps, "2")
    torch.manual_seed(123)
    train(pretrained, images, tmp_path / "resumed", *flags, steps, "4", "--resume_from_checkpoint", "latest")

    name = "pytorch_lora_weights.safetensors" if "--lora" in kind else "unet/diffusion_pytorch_model.safetensors"
    bare = load_file(tmp_path / "bare" / name)
    for run in ("watched", "resumed"):
        assert same(bare, load_file(tmp_path / run / name)), run
    assert [event["step"] for event in history(tmp_path / "watched")] == [0, 2, 4]
    watched, resumed = (without_time(history(tmp_path / run)) for run in ("watched", "resumed"))
    assert resumed == watched
    assert any(tag.startswith("memwatch/") for tag in events(tmp_path / "watched").Tags()["images"])


@pytest.mark.usefixtures("eager")
def test_a_decided_stop_ends_the_run_and_saves_it(watching, pretrained, images, tmp_path, capsys):
    """A rule that any change meets."""
    file = tmp_path / "eager.yaml"
    small = yaml.safe_load(Path(watching[1]).read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(small | EAGER), encoding="utf-8")
    controls = write_images(tmp_path / "controls", count=2, seed=2)
    flags = [*watching, "--memwatch_config", str(file), "--memwatch_controls", str(controls), "--max_train_steps", "20"]
    train(pretrained, images, tmp_path / "out", *flags)

    stopped = history(tmp_path / "out")[-1]["step"]
    assert stopped < 20
    assert [point.step for point in events(tmp_path / "out").Scalars("train_loss")] == list(range(1, stopped + 1))
    assert f"memwatch stopped training at step {stopped}: step {stopped}:" in capsys.readouterr().out
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata.jsonl", None, r"metadata\.jsonl: not found; expected one JSON object \w+ line"),
        ("metadata.jsonl", b'{"file_name": "0.png"}', r"metadata\.jsonl, line 1: expected .*file_name.*text.*; got "),
        ("1.png", None, r"1\.png: expected a readable image file, got: .*No such file"),
        ("1.png", b"not a picture", r"1\.png: expected a readable image file, got: cannot identify"),
    ],
)
def test_broken_data_is_named(file, content, message, pretrained, tmp_path):
    images = write_images(tmp_path / "images", count=2, seed=1)
    if content is None:
        (images / file).unlink()
    else:
        (images / file).write_bytes(content)
    with pytest.raises(common.DataError, match=message):
        train(pretrained, images, tmp_path / "out", "--no_memwatch", "--report_to", "none", "--max_train_steps", "2")
