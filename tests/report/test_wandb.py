"""W&B: what its own process has written, beside the rows of a script that logs without a step."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.builders import EAGER, Loop
from support.trackers import wandb_rows


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("eager")
def test_wandb_keeps_its_rows_and_the_scripts(pretrained, pipeline, tmp_path):
    import wandb

    loop = Loop(pretrained, tmp_path, log_with="wandb")
    run = loop.accelerator.get_tracker("wandb", unwrap=True)
    watch = loop.watch(pipeline, **EAGER | {"stop": {"enabled": False}})

    def log_without_a_step(running):
        for part in range(3):  # moves W&B's own step far ahead of the optimizer's
            run.log({"train_loss": running.step + part / 10})

    reports = loop.run(watch, 4, each=log_without_a_step)
    loop.accelerator.end_training()
    wandb.teardown()  # W&B's own process has written everything
    rows = wandb_rows(tmp_path)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses == [step + part / 10 for step in range(1, 5) for part in range(3)]
    ours = {row["memwatch/step"]: row for row in rows if "memwatch/step" in row}
    assert list(ours) == [0, 2, 4]
    for report in reports:
        for key, value in report.scalars().items():
            assert ours[report.step][key] == pytest.approx(value), key
        for name in ("cat", "poster"):
            shown = ours[report.step][f"memwatch/heatmap/{name}"]
            assert shown["_type"] == "image-file"
            (file,) = (tmp_path / "wandb").glob(f"offline-run-*/files/{shown['path']}")
            assert np.array_equal(np.asarray(Image.open(file)), np.asarray(report.pictures[name]))
    assert any(report.alerts for report in reports)
    assert any("memwatch/alert" in row for row in ours.values())
    steps = [row["_step"] for row in rows]
    assert steps == sorted(steps)
