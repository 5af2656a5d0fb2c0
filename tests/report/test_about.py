"""What stays the same over a run: read off the observer, kept in the folder, and said at construction."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from support.builders import SMALL, Loop, picture

from memwatch import Probe
from memwatch.judge.statistic import called_from
from memwatch.measure.probes import MIN_CONTROLS
from memwatch.report.about import About, machine, processor


def test_it_names_model_probes_settings_and_machine_and_is_read_back(pretrained, pipeline, tmp_path):
    loop, file = Loop(pretrained, tmp_path), tmp_path / "memwatch" / "about.json"
    held_out = Probe("a dog", picture(5), name="dog")
    watch = loop.watch(pipeline, config=SMALL, controls=[held_out], max_train_steps=4)
    about = watch.about
    assert about.model == "Stable Diffusion 1.x / 2.x, epsilon"
    assert about.probes == (
        {"name": "cat", "prompt": "a photo of a cat", "is_reference": True, "role": "probe"},
        {"name": "poster", "prompt": "a red poster", "is_reference": False, "role": "probe"},
        {"name": "control/dog", "prompt": "a dog", "is_reference": True, "role": "control"},
    )
    assert (about.settings["every_steps"], about.settings["max_train_steps"]) == (2, 4)
    assert (about.machine, about.versions["torch"], about.training_rows) == (processor(), torch.__version__, None)
    assert not file.exists()
    loop.run(watch, 2)
    back = About.read(file)
    assert asdict(back) == json.loads(json.dumps(asdict(watch.about))) | {"probes": about.probes}
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


# --- what is said at construction -------------------------------------------------------------------------------------


def images(num: int, caption: str = "a dog") -> list[Probe]:
    return [Probe(caption, picture(20 + i), name=f"i{i}") for i in range(num)]


def prompts(num: int) -> list[Probe]:
    return [Probe(f"a dog {i}", name=f"p{i}") for i in range(num)]


CAT, POSTER = Probe("a cat", picture(0), name="cat"), Probe("a red poster", name="poster")
FEW = "judging {kind} takes 11 controls that are {kind}, and there are {has}; "
FEW += "{watched} probes will be inconclusive"


@pytest.fixture
def said(pretrained, pipeline, tmp_path, caplog):
    """What it says of these probes, at this level."""

    def of(probes, level=logging.WARNING, **overrides) -> list[str]:
        caplog.clear()
        with caplog.at_level(level, "memwatch"):
            Loop(pretrained, tmp_path).watch(pipeline, probes, **overrides).close()
        return [r.getMessage() for r in caplog.records if r.name == "memwatch" and r.levelno == level]

    return of


@pytest.mark.parametrize(
    ("probes", "controls", "expected"),
    [
        pytest.param([CAT], images(MIN_CONTROLS), [], id="enough images"),
        pytest.param([POSTER], prompts(MIN_CONTROLS), [], id="enough prompts"),
        pytest.param([CAT], images(10), [("images", 10, 1)], id="too few images"),
        pytest.param(prompts(2), images(MIN_CONTROLS), [("prompts", 0, 2)], id="images for prompts"),
        pytest.param([CAT, POSTER], [*images(3), *prompts(1)], [("images", 3, 1), ("prompts", 1, 1)], id="few of both"),
    ],
)
def test_too_few_controls_of_a_kind_are_said_of_the_kind_that_is_watched(probes, controls, expected, said):
    wanted = [FEW.format(kind=kind, has=has, watched=watched) for kind, has, watched in expected]
    assert said(probes, controls=controls) == wanted


@pytest.mark.parametrize(("steps", "looks", "events"), [(8, 8, "4 events"), (None, 200, "100 events, as their number")])
def test_it_says_from_which_score_on_a_probe_is_called(steps, looks, events, said):
    """Of the kind that has enough controls: two probes at every event that is planned."""
    sentences = said([CAT, POSTER], logging.INFO, controls=images(11), max_train_steps=steps)
    (sentence,) = [s for s in sentences if "a mean score of" in s]
    score = called_from(0.05 / looks, 11)
    assert f"images are called memorized from a mean score of {score:.1f} on (11 controls, " in sentence
    assert f"{looks} verdicts in {events}" in sentence


def test_images_without_captions_are_said_in_one_sentence(said):
    probes = [CAT, *images(2, caption="")]
    sentence = "probes without a caption: 2 of 3; only snapshot baselines are used for them"
    assert sentence in said(probes, logging.INFO)
    assert sentence not in said([CAT, POSTER], logging.INFO, controls=images(2, caption=""))  # none of them is watched
    assert sentence not in said(probes, logging.INFO, signals={"against": "snapshot"})


def test_the_main_process_alone_speaks(said, monkeypatch):
    from accelerate import Accelerator

    (warning,) = said([CAT, POSTER])
    assert warning.startswith("there are no controls: ")
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    assert said([CAT, POSTER]) == said([CAT, POSTER], logging.INFO) == []


def test_a_plain_script_sees_information_and_warnings_once():
    """Whether it has set logging up or not; where it has, in its own format."""
    speak = "show_messages(); logger.info('told'); logger.warning('warned')"
    setting_up = "logging.basicConfig(format='%(name)s, %(levelname)s: %(message)s')"
    imports = "import logging; from memwatch.messages import logger, show_messages"
    code = "\n".join([imports, speak, setting_up, speak])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in run.stderr.splitlines() if "told" in line or "warned" in line] == [
        "memwatch: told",
        "memwatch: warning: warned",
        "memwatch, INFO: told",
        "memwatch, WARNING: warned",
    ]
