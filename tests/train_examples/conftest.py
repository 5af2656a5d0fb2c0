"""What the example scripts train on under test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.builders import SIZE


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Five random images as diffusers' scripts read them, one with a caption that is too long; not to be changed."""
    folder, rng, rows = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (SIZE + 8, SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"a photo of number {i}" + " and so on" * 30 * (i == 0)})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder
