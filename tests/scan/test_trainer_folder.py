"""A trainer's folder: which files are checkpoints, their steps, and which comes next."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memwatch.scan.trainer_folder import Arrivals, Checkpoint, checkpoints_in


def write(folder, *names, **metadata):
    """Files with one tensor each, and with what a trainer says in their headers."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"lora_unet_a.lora_down.weight": torch.zeros(3, 2)}, folder / name, metadata or None)


def found(folder):
    return [(c.step, Path(c.source).name) for c in checkpoints_in(folder)]


def test_steps_by_name_and_by_what_the_file_says(tmp_path):
    """The run's last file has no number; without metadata it comes one step after all others."""
    write(tmp_path, "cat-step00000500.safetensors", "cat-step00001000.safetensors", "cat.safetensors")
    write(tmp_path, "cat-000002.safetensors", ss_steps="750")
    names = ["cat-step00000500", "cat-000002", "cat-step00001000", "cat"]
    expected = [f"{name}.safetensors" for name in names]
    assert found(tmp_path) == list(zip([500, 750, 1000, 1001], expected, strict=True))
    for said in ({"ss_steps": "1200"}, {"training_info": json.dumps({"step": 1200, "epoch": 3})}):  # kohya, ai-toolkit
        write(tmp_path, "cat.safetensors", **said)
        assert found(tmp_path)[-1] == (1200, "cat.safetensors")
    write(tmp_path, "cat.safetensors", training_info="nonsense", ss_steps="many")
    assert found(tmp_path)[-1] == (1001, "cat.safetensors")


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["cat_000000250.safetensors", "cat_000000500.safetensors"], [250, 500]),  # ai-toolkit
        (["cat2026-10-08_10-00-00-save-500-1-20.safetensors", "cat-save-90-0-90.safetensors"], [90, 500]),  # OneTrainer
        (["checkpoint-3/unet/a.safetensors", "checkpoint-20/unet/a.safetensors"], [3, 20]),
        (["step-3/a.safetensors", "step-20/a.safetensors"], [3, 20]),
        (["sd-100.ckpt", "sd-200.ckpt"], [100, 200]),
        (["epoch-1/a.safetensors", "epoch-2/a.safetensors"], [1, 2]),
        (["cat-step00000020/unet/a.safetensors", "cat_000000030/transformer/a.safetensors"], [20, 30]),
    ],
)
def test_every_trainers_names(names, steps, tmp_path):
    write(tmp_path, *names)
    assert [step for step, _ in found(tmp_path)] == steps


def test_what_is_no_checkpoint(tmp_path):
    write(
        tmp_path,
        "optimizer.safetensors",
        "model_1.safetensors",
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
    assert found(tmp_path) == []
    write(tmp_path, "state-of-the-art-7.safetensors", "my-estate-9.safetensors")
    assert found(tmp_path) == [(7, "state-of-the-art-7.safetensors"), (9, "my-estate-9.safetensors")]


def test_a_pipeline_is_no_folder_of_checkpoints(family_folders):
    assert {name: found(folder) for name, folder in family_folders.items()} == {name: [] for name in family_folders}


def test_a_runs_last_file_does_not_count_twice_and_two_runs_are_said_once(tmp_path, caplog):
    write(tmp_path, "cat-step00000500.safetensors", "cat.safetensors", ss_steps="500")
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert found(tmp_path) == [(500, "cat-step00000500.safetensors")]
        assert not caplog.text
        write(tmp_path, "dog-step00000500.safetensors")
        assert found(tmp_path) == found(tmp_path) == [(500, "cat-step00000500.safetensors")]
    assert caplog.text.count("dog-step00000500.safetensors is left out") == 1


# --- which comes next -------------------------------------------------------------------------------------------------


def checkpoint(step: int, *, size: int = 10, source: str | None = None) -> Checkpoint:
    source = source or f"run-{step}"
    return Checkpoint(step, source, f"{source}, {size} bytes")


A, B, C = (checkpoint(step) for step in (100, 200, 300))
GROWS = [checkpoint(100, size=size) for size in (1, 5, 10)]
LAST, MOVED = checkpoint(101, source="last"), checkpoint(301, source="last")
SAVES = [checkpoint(step, size=step, source="last") for step in (100, 200, 300, 400)]
GONE = "was deleted before memwatch could read it"


@pytest.mark.parametrize(
    ("polls", "scanned", "skipped"),
    [
        # smallest step first, once it is the same as before; what was scanned may be deleted
        ([[B], [A, B], [A, B], [B], [B, C], [B, C], [B, C]], [None, None, A, B, None, C, None], []),
        # a file that grows is waited for, and so are those after it
        ([[size, B] for size in GROWS] + [[GROWS[-1], B]] * 2, [None, None, None, GROWS[-1], B], []),
        # a step that was passed is late
        ([[B], [B], [A, B], [A, B]], [None, B, None, None], [(A, "appeared after step 200 was scanned")]),
        ([[A, B], [B], [B]], [None, B, None], [(A, GONE)]),
        # a last file without a number is taken once, though it counts as one step after all others
        ([[A, LAST], [A, LAST], [A, LAST], [A, C, MOVED], [A, C, MOVED]], [None, A, LAST, None, C], []),
        # a file that is written over is new at each step
        (
            [*([save] for save in SAVES[:2] for _ in range(2)), [SAVES[2]], [SAVES[3]]],
            [None, SAVES[0], None, SAVES[1], None, None],
            [(SAVES[2], GONE)],
        ),
    ],
)
def test_which_checkpoint_is_next(polls, scanned, skipped):
    arrivals, took, said = Arrivals(), [], []
    for found in polls:
        ready, cannot = arrivals.poll(found)
        took.append(ready)
        said += cannot
        if ready is not None:
            arrivals.done(ready)
    assert (took, said) == (scanned, skipped)


def test_what_was_given_up_is_new_again_once_its_files_change():
    arrivals = Arrivals()
    arrivals.poll([A, B])
    arrivals.give_up(A)
    assert arrivals.poll([A, B])[0] == B
    longer = checkpoint(100, size=20)
    arrivals.poll([longer, B])
    assert arrivals.poll([longer, B])[0] == longer
