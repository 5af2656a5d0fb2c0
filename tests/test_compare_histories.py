"""The script that compares two output folders or two benchmark runs: blind to times only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.compare_histories import main

MAPS, PICTURE, EVENT = "maps/step_0000002.safetensors", "heatmaps/cat/step_0000002.png", "event_00002.safetensors"
VALUES = [0.0, float("nan"), 1.0, 2.0]


def write(folder: Path, times: float = 1.0, p: float = 0.5, values=VALUES, pixel: int = 0) -> Path:
    """A folder that holds everything that is compared."""
    for file in (PICTURE, MAPS):
        (folder / file).parent.mkdir(parents=True)
    row = {"seconds": times, "scalars": {"memwatch/p": p, "memwatch/overhead": times}}
    (folder / "history.jsonl").write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    save_file({"cat/raw": torch.tensor(values)}, folder / MAPS)
    shutil.copy(folder / MAPS, folder / EVENT)
    Image.fromarray(np.full((4, 4, 3), pixel, np.uint8)).save(folder / PICTURE)
    return folder


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        ({"times": 7.0}, None),
        ({"p": 0.25}, "history.jsonl, line/0/scalars/memwatch/p: 0.5 -> 0.25"),
        ({"values": [-0.0, *VALUES[1:]]}, f"{MAPS}, cat/raw: 1 of 4 values differ, largest difference 0"),
        ({"values": VALUES[:2]}, f"{EVENT}, cat/raw: float32 (4,) -> float32 (2,)"),
        ({"pixel": 9}, f"{PICTURE}, pixels: 48 of 48 values differ, largest difference 9"),
    ],
)
def test_a_difference_is_named(edit, line, tmp_path, capsys):
    folders = write(tmp_path / "before"), write(tmp_path / "after", **edit)
    assert main(*map(str, folders)) == (line is not None)
    printed = capsys.readouterr().out.splitlines()
    assert line in printed if line else printed == ["4 files compared, 0 differ"]


def test_a_missing_file_and_nothing_to_compare_are_no_success(tmp_path, capsys):
    before, after = write(tmp_path / "before"), write(tmp_path / "after")
    (after / EVENT).unlink()
    assert main(str(before), str(after)) == 1
    assert f"{EVENT}, cat/raw: only in BEFORE" in capsys.readouterr().out
    assert main(str(tmp_path), str(tmp_path / "none")) == 2
