"""Fixtures. What builds them lies in ``tests/support``."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from support import families as tiny
from support.builders import new_process, picture, save_pipeline


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="session")
def pipeline(pretrained) -> StableDiffusionPipeline:
    """The same, loaded once; tests must not change it."""
    return StableDiffusionPipeline.from_pretrained(pretrained)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder of three images with captions beside them."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        picture(10 + i).save(folder / f"control{i}.png")
        (folder / f"control{i}.txt").write_text(f"a photo of number {i}", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory) -> dict[str, Path]:
    """A saved pipeline of every family."""
    folder = tmp_path_factory.mktemp("families")
    paths = {name: build(folder) for name, build in tiny.BUILDERS.items()}
    paths["sd3-without-t5"] = tiny.sd3(folder, t5=False)
    paths["flux-schnell"] = tiny.flux(folder, guidance=False)
    paths["sd1"] = save_pipeline(folder / "sd1")
    return paths


@pytest.fixture(scope="session")
def families(family_folders) -> dict[str, DiffusionPipeline]:
    """The same, loaded once; tests must not change them."""
    loaded = {}
    for name, path in family_folders.items():
        without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
        loaded[name] = DiffusionPipeline.from_pretrained(path, **without)
    for pipe in loaded.values():
        tiny.network(pipe).eval()
    return loaded


@pytest.fixture(autouse=True)
def _fresh_process():
    yield
    new_process()
