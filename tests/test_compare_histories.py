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
VALUES = [0.0, float("nan"), 1.0, 2.0]


def write(folder: Path, times: float = 1.0, p: float = 0.5, values=VALUES, pixel: int = 0) -> Path:
    """A folder that holds everything that is compared."""
    (folder / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    (folder / MAPS).parent.mkdir(exist_ok=True)
    scalars = {"memwatch/p": p, "memwatch/seconds": times, "memwatch/overhead": times}
    rows = [{"step": step, "seconds": times, "scalars": scalars} for step in (0, 2)]
    (folder / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    save_file({"cat/raw": torch.tensor(values)}, folder / MAPS)
    shutil.copy(folder / MAPS, folder / EVENT)
    (folder / "event_00002.json").write_text(json.dumps({"loss": {"cat": p}, "seconds": times}), encoding="utf-8")
    Image.fromarray(np.full((4, 4, 3), pixel, np.uint8)).save(folder / PICTURE)
    return folder


def test_folders_that_differ_in_times_only_are_the_same(tmp_path):
    folders = write(tmp_path / "before"), write(tmp_path / "after", times=7.0)
    done = subprocess.run([sys.executable, compare_histories.__file__, *folders], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "5 files compared, 0 differ\n")


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (
            {"p": 0.25},
            [
                "history.jsonl, line 1: 1 of 2 values differ, largest difference 0.25; "
                "first scalars/memwatch/p: 0.5 -> 0.25",
                "event_00002.json: 1 of 1 values differ, largest difference 0.25; first loss/cat: 0.5 -> 0.25",
            ],
        ),
        ({"values": [-0.0, *VALUES[1:]]}, [f"{MAPS}, cat/raw: 1 of 4 values differ, largest difference 0"]),
        ({"values": VALUES[:2]}, [f"{EVENT}, cat/raw: torch.float32 (4,) -> torch.float32 (2,)"]),
        ({"pixel": 9}, [f"{PICTURE}: 48 of 48 values differ, largest difference 9"]),
    ],
)
def test_a_difference_is_named(edit, lines, tmp_path, capsys):
    folders = write(tmp_path / "before"), write(tmp_path / "after", **edit)
    assert compare_histories.main([*map(str, folders)]) == 1
    assert set(lines) <= set(capsys.readouterr().out.splitlines())


def test_a_missing_file_and_nothing_to_compare_are_no_success(tmp_path, capsys):
    before, after = write(tmp_path / "before"), write(tmp_path / "after")
    (after / EVENT).unlink()
    assert compare_histories.main([str(before), str(after)]) == 1
    assert compare_histories.main([str(tmp_path), str(tmp_path / "none")]) == 2
    assert f"{EVENT}: not in AFTER" in (out := capsys.readouterr().out)
    assert "nothing to compare" in out
