"""What stays the same over a run: read off the observer, kept in the folder, and read back."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from support.builders import SMALL, Loop, picture

from memwatch import Probe
from memwatch.report.about import About, machine, processor, versions


@pytest.fixture
def watch(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    held_out, ordinary = Probe("a dog", picture(5), name="dog"), Probe("a cow", picture(6), name="cow")
    made = loop.watch(pipeline, config=SMALL, controls=[held_out], peers=[ordinary], max_train_steps=4)
    made.loop = loop
    return made


def test_it_names_model_probes_settings_and_machine(watch):
    about = watch.about
    assert about.model == "Stable Diffusion 1.x / 2.x, epsilon"
    assert about.probes == (
        {"name": "cat", "prompt": "a photo of a cat", "is_reference": True, "role": "probe"},
        {"name": "poster", "prompt": "a red poster", "is_reference": False, "role": "probe"},
        {"name": "control/dog", "prompt": "a dog", "is_reference": True, "role": "control"},
        {"name": "peer/cow", "prompt": "a cow", "is_reference": True, "role": "peer"},
    )
    assert about.settings["every_steps"] == 2
    assert about.settings["max_train_steps"] == 4
    assert about.settings["levels"]["timesteps"] == (61,)
    assert about.machine == processor()
    assert about.versions["torch"] == torch.__version__
    assert about.training_rows is None


def test_the_guarded_dataloader_tells_the_number_of_rows(watch):
    watch.guard(watch.loop.loader)
    assert watch.about.training_rows == 8
    watch.guard([1, 2, 3])  # a list of batches does not say
    assert watch.about.training_rows is None


def test_it_lies_in_the_folder_from_the_first_event_on(watch, tmp_path):
    file = tmp_path / "memwatch" / "about.json"
    assert not file.exists()
    watch.loop.run(watch, 2)
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(watch.about.to_dict()))
    assert saved["training_rows"] == 8
    assert saved["probes"][2]["role"] == "control"
    back = About.from_dict(saved)
    assert (back.model, back.probes, back.versions) == (watch.about.model, watch.about.probes, watch.about.versions)


def test_keys_of_other_versions_are_passed_over():
    assert About.from_dict({"model": "SD", "of tomorrow": 1}) == About(model="SD")
    assert About.from_dict({}) == About()
    assert About.from_dict(About(probes=({"name": "a"},)).to_dict()) == About(probes=({"name": "a"},))


def test_versions_of_packages_that_are_not_installed_are_left_out():
    found = versions(["torch", "memwatch-of-another-name", "numpy"])
    assert list(found) == ["torch", "numpy"]
    assert found["torch"] == torch.__version__


def test_the_machines_line():
    line = machine("torch", "no-such-package", device=torch.device("cpu"))
    assert line.startswith(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, ")
    assert line.endswith(f" CPU cores, {torch.get_num_threads()} of them used")
    assert machine() == f"Python {platform.python_version()}, {processor()}"


def test_a_gpu_is_named_before_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU of index {device.index}")
    assert processor(torch.device("cuda", 1)) == f"a GPU of index 1, {processor()}"
    assert " of them used" not in machine(device=torch.device("cuda", 0))
