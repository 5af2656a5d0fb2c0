"""How example scripts run under test, and what they train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.families import SIZE
from support.processes import new_process

CHEAP = {"every_steps": 2, "strict": True, "levels": {"timesteps": [141], "draws": 2}}
CHEAP |= {"curvature": {"vectors": 2, "tile": 2}, "sampling": {"num_inference_steps": 2}}


@pytest.fixture(scope="session")
def train() -> Callable[..., None]:
    """Runs a script as in a process of its own; ``settings`` of memwatch differ from a cheap watch."""

    def train(script, pretrained: Path, output_dir: Path, flags: str, **settings: object) -> None:
        config = output_dir.parent / f"{output_dir.name}.yaml"
        config.write_text(json.dumps(CHEAP | settings), encoding="utf-8")  # JSON is YAML
        own = f"--pretrained_model_name_or_path {pretrained} --output_dir {output_dir} --memwatch_config {config}"
        try:
            script.main(f"{own} --resolution {SIZE} --mixed_precision no --learning_rate 1e-2 {flags}".split())
        finally:
            new_process()

    return train


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Five random images as diffusers' scripts read them, one with a caption that is too long; not to be changed."""
    folder, rng, rows = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (SIZE + 8, SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"a photo of number {i}" + " and so on" * 30 * (i == 0)})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder
