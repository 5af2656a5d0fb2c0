"""The fine-tune script, shrunk: a random pipeline of 16 px pictures and five random images."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import common
import pytest
import torch
import train_text_to_image
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from support.builders import assert_same, history, without_time

# Three steps per epoch, the third of half a window; the first checkpoint lies within the first epoch.
ODD = "--train_batch_size 1 --gradient_accumulation_steps 2 --random_flip --checkpointing_steps 2"
KINDS = {
    "full": f"{ODD} --use_ema --gradient_checkpointing --snr_gamma 5"
    " --lr_scheduler constant_with_warmup --lr_warmup_steps 1",
    "lora": f"{ODD} --lora --rank 2 --mixed_precision bf16 --checkpoints_total_limit 1",
}
SAVED = {"full": "unet/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}


def events(output_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (output_dir / "logs" / "text-to-image").glob("events.*")}
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


@pytest.fixture(scope="module")
def train_it(train, pretrained, photos) -> Callable[..., None]:
    return lambda folder, flags, **settings: train(
        train_text_to_image, pretrained, folder, f"--train_data_dir {photos} {flags}", **settings
    )


@pytest.fixture(scope="module")
def runs(train_it, tmp_path_factory) -> Callable[[str], Path]:
    """Of a kind, the folder of the same four steps ``bare``, ``watched``, and watched and ``resumed`` after two."""

    @functools.cache
    def of_kind(kind: str) -> Path:
        folder, flags = tmp_path_factory.mktemp(kind), KINDS[kind]
        train_it(folder / "bare", f"{flags} --max_train_steps 4 --no_memwatch")
        train_it(folder / "watched", f"{flags} --max_train_steps 4")
        train_it(folder / "resumed", f"{flags} --max_train_steps 2")
        torch.manual_seed(123)
        train_it(folder / "resumed", f"{flags} --max_train_steps 4 --resume_from_checkpoint latest")
        return folder

    return of_kind


@pytest.mark.parametrize("kind", KINDS)
def test_watched_training_is_the_same_training_and_resumes_with_its_history(kind, runs):
    bare, watched, resumed = (runs(kind) / name for name in ("bare", "watched", "resumed"))
    for run in (watched, resumed):
        assert_same(load_file(bare / SAVED[kind]), load_file(run / SAVED[kind]))
    assert [event["step"] for event in history(watched)] == [0, 2, 4]
    assert without_time(history(resumed)) == without_time(history(watched))
    assert any(tag.startswith("memwatch/") for tag in events(watched).Tags()["images"])


def test_full_training_saves_the_averaged_weights_of_a_whole_pipeline(runs, pretrained):
    bare = runs("full") / "bare"
    saved = StableDiffusionPipeline.from_pretrained(bare, dtype=torch.float32).unet
    shadow = torch.load(bare / "checkpoint-4" / "custom_checkpoint_0.pkl")["shadow_params"]
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), shadow, strict=True))
    for others in (bare / "checkpoint-4" / "model.safetensors", pretrained / SAVED["full"]):
        assert not torch.equal(load_file(others)["conv_in.weight"], saved.conv_in.weight)
    losses = events(bare).Scalars("train_loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    assert all(0 < point.value < 3 for point in losses)


def test_lora_in_bf16_saves_adapters_that_load(runs, pretrained):
    bare = runs("lora") / "bare"
    (checkpoint,) = bare.glob("checkpoint-*")
    kept = load_file(checkpoint / "trainable.safetensors")
    assert all("lora" in name and tensor.dtype == torch.float32 for name, tensor in kept.items())
    assert (checkpoint.name, (checkpoint / "model.safetensors").exists()) == ("checkpoint-4", False)
    pipeline = StableDiffusionPipeline.from_pretrained(pretrained, dtype=torch.float32)
    pipeline.load_lora_weights(bare)
    loaded = [parameter for name, parameter in pipeline.unet.named_parameters() if "lora_B" in name]
    assert loaded
    assert all(parameter.abs().sum() > 0 for parameter in loaded)


@pytest.mark.usefixtures("eager")
def test_a_decided_stop_ends_the_run_and_saves_it(train_it, images, tmp_path, capsys):
    """A rule that any change meets."""
    flags = f"--train_batch_size 2 --memwatch_controls {images} --max_train_steps 20"
    train_it(tmp_path / "out", flags)
    stopped = history(tmp_path / "out")[-1]["step"]
    assert stopped < 20
    assert [point.step for point in events(tmp_path / "out").Scalars("train_loss")] == list(range(1, stopped + 1))
    assert f"memwatch stopped training at step {stopped}: step {stopped}:" in capsys.readouterr().out
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata.jsonl", b"", r"metadata\.jsonl names no image"),
        (
            "metadata.jsonl",
            b'{"text": "a cat"}',
            r"metadata\.jsonl, line 1: .*'file_name'.*; the columns are text",
        ),
        ("1.png", None, r"1\.png: expected a readable image file, got: .*No such file"),
        ("1.png", b"not a picture", r"1\.png: expected a readable image file, got: cannot identify"),
    ],
)
def test_broken_data_is_named(file, content, message, train_it, photos, tmp_path):
    broken = shutil.copytree(photos, tmp_path / "images") / file
    broken.unlink() if content is None else broken.write_bytes(content)
    with pytest.raises(common.DataError, match=message):
        train_it(
            tmp_path / "out", f"--train_data_dir {broken.parent} --no_memwatch --report_to none --max_train_steps 5"
        )
