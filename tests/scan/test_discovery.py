"""Checkpoints in a trainer's folder: which files they are, their steps, and whether they are written to their end."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from memwatch.scan.checkpoints import found_in, is_complete, numbered


def write(folder, *names, **metadata):
    """Files with one tensor each, and with what a trainer says in their headers."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"lora_unet_a.lora_down.weight": torch.zeros(3, 2)}, folder / name, metadata or None)


def found(folder):
    return [(step, path.name) for step, path in found_in(folder)]


def test_kohyas_steps_by_name_and_by_what_the_file_says(tmp_path):
    write(tmp_path, "cat-step00000500.safetensors", "cat-step00001000.safetensors", "cat-000002.safetensors")
    write(tmp_path, "cat-000002.safetensors", ss_steps="750")
    write(tmp_path, "cat.safetensors", ss_steps="1200")
    assert found(tmp_path) == [
        (500, "cat-step00000500.safetensors"),
        (750, "cat-000002.safetensors"),
        (1000, "cat-step00001000.safetensors"),
        (1200, "cat.safetensors"),
    ]


def test_epochs_sort_by_their_number_and_the_last_file_comes_last(tmp_path):
    write(tmp_path, "cat.safetensors", "cat-000010.safetensors", "cat-000002.safetensors")
    assert found(tmp_path) == [
        (2, "cat-000002.safetensors"),
        (10, "cat-000010.safetensors"),
        (11, "cat.safetensors"),
    ]


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["cat_000000250.safetensors", "cat_000000500.safetensors"], [250, 500]),  # ai-toolkit
        (["cat2026-10-08_10-00-00-save-500-1-20.safetensors", "cat-save-90-0-90.safetensors"], [90, 500]),  # OneTrainer
        (["checkpoint-3/unet/a.safetensors", "checkpoint-20/unet/a.safetensors"], [3, 20]),
        (["step-3/a.safetensors", "step-20/a.safetensors"], [3, 20]),
        (["epoch-1/a.safetensors", "epoch-2/a.safetensors"], [1, 2]),
        (["cat-step00000020/unet/a.safetensors", "cat_000000030/transformer/a.safetensors"], [20, 30]),
        (["cat.safetensors"], [0]),
    ],
)
def test_every_trainers_names(names, steps, tmp_path):
    write(tmp_path, *names)
    assert [step for step, _ in found_in(tmp_path)] == steps


def test_ai_toolkits_last_file_says_its_step(tmp_path):
    write(tmp_path, "cat_000000500.safetensors")
    write(tmp_path, "cat.safetensors", training_info=json.dumps({"step": 800, "epoch": 3}))
    assert found(tmp_path) == [(500, "cat_000000500.safetensors"), (800, "cat.safetensors")]
    write(tmp_path, "cat.safetensors", training_info="nonsense", ss_steps="many")
    assert found(tmp_path)[1] == (501, "cat.safetensors")


def test_what_is_no_checkpoint(tmp_path):
    write(
        tmp_path,
        "optimizer.safetensors",
        "cat-step00000500-state/model.safetensors",
        "cat_state.safetensors",
        "training_state_100.safetensors",
        "cat_clip_l.safetensors",
        "vae.safetensors",
        "pytorch_lora_weights.safetensors",
        "adapter_model.safetensors",
        "model.safetensors",
        "samples_20/picture.safetensors",
        "logs/events-3.safetensors",
    )
    (tmp_path / "cat-7.txt").write_text("7", encoding="utf-8")
    assert found_in(tmp_path) == []
    write(tmp_path, "state-of-the-art-7.safetensors", "my-estate-9.safetensors")
    assert found(tmp_path) == [(7, "state-of-the-art-7.safetensors"), (9, "my-estate-9.safetensors")]


def test_a_pipeline_is_no_folder_of_checkpoints(family_folders):
    assert {name: found_in(folder) for name, folder in family_folders.items()} == {name: [] for name in family_folders}


def test_a_runs_last_file_does_not_count_twice_and_two_runs_are_said_once(tmp_path, caplog):
    write(tmp_path, "cat-step00000500.safetensors", "cat.safetensors", ss_steps="500")
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert found(tmp_path) == [(500, "cat-step00000500.safetensors")]
        assert not caplog.text
        write(tmp_path, "dog-step00000500.safetensors")
        assert found(tmp_path) == found(tmp_path) == [(500, "cat-step00000500.safetensors")]
    assert caplog.text.count("dog-step00000500.safetensors is left out") == 1


def test_checkpoint_folders_as_before(tmp_path):
    write(tmp_path, "checkpoint-20/a.safetensors", "checkpoint-3/a.safetensors", "checkpoint-x/a.safetensors")
    assert [step for step, _ in numbered(tmp_path)] == [3, 20]


def test_a_file_is_complete_at_its_last_byte_only(tmp_path):
    write(tmp_path, "cat.safetensors", ss_steps="3")
    whole, part = (tmp_path / "cat.safetensors").read_bytes(), tmp_path / "part.safetensors"
    for length in range(0, len(whole), 5):
        part.write_bytes(whole[:length])
        assert not is_complete(part), length
    part.write_bytes(whole)
    assert is_complete(part)
    part.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert not is_complete(part)
    assert not is_complete(tmp_path / "gone.safetensors")


def test_a_folder_is_complete_with_all_of_its_weights(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    assert not is_complete(folder)
    assert not is_complete(tmp_path / "gone")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}", encoding="utf-8")
    torch.save({}, folder / "optimizer.bin")
    assert not is_complete(folder)
    write(folder, "unet/diffusion_pytorch_model.safetensors")
    assert is_complete(folder)
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text("{}", encoding="utf-8")
    assert not is_complete(folder)
    torch.save({"weight": torch.zeros(100)}, folder / "text_encoder" / "pytorch_model.bin")
    assert is_complete(folder)
    file = folder / "text_encoder" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-10])
    assert not is_complete(folder)
