"""What stays the same over a run: read off the observer, kept in the folder, and read back."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from support.builders import SMALL, Loop, picture

from memwatch import Probe
from memwatch.report.about import About, machine, processor


@pytest.fixture
def watch(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    held_out, ordinary = Probe("a dog", picture(5), name="dog"), Probe("a cow", picture(6), name="cow")
    made = loop.watch(pipeline, config=SMALL, controls=[held_out], peers=[ordinary], max_train_steps=4)
    made.loop = loop
    return made


def test_it_names_model_probes_settings_and_machine_and_is_read_back(watch, tmp_path):
    about, file = watch.about, tmp_path / "memwatch" / "about.json"
    assert about.model == "Stable Diffusion 1.x / 2.x, epsilon"
    assert about.probes == (
        {"name": "cat", "prompt": "a photo of a cat", "is_reference": True, "role": "probe"},
        {"name": "poster", "prompt": "a red poster", "is_reference": False, "role": "probe"},
        {"name": "control/dog", "prompt": "a dog", "is_reference": True, "role": "control"},
        {"name": "peer/cow", "prompt": "a cow", "is_reference": True, "role": "peer"},
    )
    assert (about.settings["every_steps"], about.settings["max_train_steps"]) == (2, 4)
    assert (about.machine, about.versions["torch"], about.training_rows) == (processor(), torch.__version__, None)
    assert not file.exists()
    watch.loop.run(watch, 2)
    back = About.read(file)
    assert back.to_dict() == json.loads(json.dumps(watch.about.to_dict())) | {"probes": about.probes}
    assert back.training_rows == 8
    watch.guard([1, 2, 3])  # a list of batches does not say
    assert watch.about.training_rows is None


def test_the_machines_line(monkeypatch):
    line = machine("torch", "no-such-package", device=torch.device("cpu"))
    assert line.startswith(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, ")
    assert line.endswith(f" CPU cores, {torch.get_num_threads()} of them used")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU of index {device.index}")
    on_gpu = machine(device=torch.device("cuda", 1))
    assert on_gpu == f"Python {platform.python_version()}, a GPU of index 1, {processor()}"
