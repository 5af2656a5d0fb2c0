"""The script that compares two output folders or two benchmark runs: blind to times only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import compare_histories

MAPS, PICTURE, EVENT = "maps/step_0000002.safetensors", "heatmaps/cat/step_0000002.png", "event_00002.safetensors"
VALUES = torch.tensor([[0.0, torch.nan], [1.0, 2.0]])


@pytest.fixture
def folders(tmp_path):
    """Two equal folders that hold everything that is compared, but for the times."""
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in ("maps", "heatmaps/cat"):
        (before / folder).mkdir(parents=True)
    times = {"memwatch/seconds": 1.0, "memwatch/overhead": 1.0}
    rows = [{"step": step, "seconds": 1.0, "scalars": {"memwatch/p": 0.5} | times} for step in (0, 2)]
    (before / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for file in (MAPS, EVENT):
        save_file({"cat/raw": VALUES, "step": torch.tensor(2)}, before / file)
    (before / "event_00002.json").write_text('{"loss": {"cat": 0.25}, "seconds": 3}', encoding="utf-8")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(before / PICTURE)
    shutil.copytree(before, after)
    edit_text(after / "history.jsonl", "1.0", "7.0")
    edit_text(after / "event_00002.json", "3", "4")
    return before, after


def edit_text(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def edit_tensor(file: Path, value: float) -> None:
    values = VALUES.clone()
    values[1, 0] = value
    save_file({"cat/raw": values, "step": torch.tensor(2)}, file)


def edit_pixel(file: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[1, 2] = (0, 3, 9)
    Image.fromarray(pixels).save(file)


def test_folders_that_differ_in_times_only_are_the_same(folders):
    command = [sys.executable, compare_histories.__file__, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "5 files compared, 0 differ\n")


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (
            lambda a: edit_text(a / "history.jsonl", '"memwatch/p": 0.5', '"memwatch/p": 0.25'),
            "history.jsonl, line 2: 1 of 2 values differ, largest difference 0.25; "
            "first scalars/memwatch/p: 0.5 -> 0.25",
        ),
        (
            lambda a: edit_text(a / "history.jsonl", '"step": 2', '"at": 2'),
            "history.jsonl, line 2: only in BEFORE: step",
        ),
        (
            lambda a: (a / "history.jsonl").write_text((a / "history.jsonl").read_text().splitlines()[0]),
            "history.jsonl: 2 lines -> 1 lines",
        ),
        (lambda a: edit_tensor(a / EVENT, -1), f"{EVENT}, cat/raw: 1 of 4 values differ, largest difference 2"),
        (lambda a: save_file({"step": torch.tensor(2)}, a / MAPS), f"{MAPS}: only in BEFORE: cat/raw"),
        (
            lambda a: save_file({"cat/raw": torch.zeros(4), "step": torch.tensor(2)}, a / MAPS),
            f"{MAPS}, cat/raw: torch.float32 (2, 2) -> torch.float32 (4,)",
        ),
        (lambda a: edit_pixel(a / PICTURE), f"{PICTURE}: 2 of 48 values differ, largest difference 9"),
        (lambda a: Image.new("RGB", (4, 5)).save(a / PICTURE), f"{PICTURE}: (4, 4, 3) -> (5, 4, 3)"),
        (
            lambda a: edit_text(a / "event_00002.json", "0.25", "null"),
            "event_00002.json: 1 of 1 values differ; first loss/cat: 0.25 -> None",
        ),
        (lambda a: (a / EVENT).unlink(), f"{EVENT}: not in AFTER"),
    ],
)
def test_a_difference_is_named(folders, capsys, edit, line):
    edit(folders[1])
    assert compare_histories.main([*map(str, folders)]) == 1
    assert line in capsys.readouterr().out.splitlines()


def test_zero_is_not_minus_zero_and_nothing_to_compare_is_no_success(tmp_path, capsys):
    (line,) = compare_histories.compare_two_tensors("here", torch.zeros(2), -torch.zeros(2))
    assert line == "here: 2 of 2 values differ, largest difference 0"
    assert compare_histories.main([str(tmp_path), str(tmp_path / "none")]) == 2
    assert "nothing to compare" in capsys.readouterr().out
