"""Fixtures. What builds them lies in ``tests/support``."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tensors this small, threads wait for each other
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="memwatch-tests-")  # surveys of training sets

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from support import families as tiny
from support.builders import CONFIG, SCREENS, call_every_change, picture
from support.families import save_pipeline
from support.processes import new_process
from support.scans import scan_into, train_watched

from memwatch.config import MemWatchConfig


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


@pytest.fixture(scope="session")
def trained(pretrained, images, tmp_path_factory) -> Path:
    """See ``train_watched``; tests must not change it."""
    return train_watched(pretrained, images, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def config(tmp_path) -> str:
    """``CONFIG`` as a file."""
    file = tmp_path / "config.json"  # JSON is YAML
    file.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(file)


@pytest.fixture
def prompts(tmp_path) -> str:
    """A text file of two prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("a red poster\na cat on a sofa\n", encoding="utf-8")
    return str(file)


@pytest.fixture
def screened(monkeypatch) -> None:
    """Events are screened, as they are for users; ``support.builders`` switches that off for the other tests."""
    monkeypatch.setattr(MemWatchConfig, "screens", SCREENS)


@pytest.fixture
def eager(monkeypatch) -> None:
    """See ``call_every_change``."""
    call_every_change(monkeypatch)


@pytest.fixture
def scan(tmp_path, config):
    """Runs ``memwatch scan`` into ``tmp_path/memwatch``; see ``scan_into``."""
    return functools.partial(scan_into, tmp_path / "memwatch", settings=config)


@pytest.fixture(autouse=True)
def _fresh_process():
    yield
    new_process()
