"""What memwatch says at construction of the things that it will not be able to do."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from support.builders import Loop, picture

from memwatch import Probe
from memwatch.measure.probes import MIN_CONTROLS


def images(num: int, caption: str = "a dog") -> list[Probe]:
    return [Probe(caption, picture(20 + i), name=f"i{i}") for i in range(num)]


def prompts(num: int) -> list[Probe]:
    return [Probe(f"a dog {i}", name=f"p{i}") for i in range(num)]


CAT, POSTER = Probe("a cat", picture(0), name="cat"), Probe("a red poster", name="poster")
FEW = "there are {has} controls that are {kind}, and judging {kind} takes 11; "
FEW += "the {watched} probes that are {kind} will be inconclusive"


@pytest.fixture
def said(pretrained, pipeline, tmp_path, caplog):
    """What it says of these probes, at this level."""

    def of(probes, level=logging.WARNING, **overrides) -> list[str]:
        loop = Loop(pretrained, tmp_path)
        caplog.clear()
        with caplog.at_level(level, "memwatch"):
            loop.watch(pipeline, probes, **overrides).close()
        return [r.getMessage() for r in caplog.records if r.name == "memwatch" and r.levelno == level]

    return of


def test_without_controls_nothing_can_be_called_memorized(said):
    (warning,) = said([CAT, POSTER])
    assert warning.startswith("there are no controls: ")
    assert warning.endswith("alerts are uncalibrated and nothing is called memorized")


@pytest.mark.parametrize(
    ("probes", "controls", "expected"),
    [
        pytest.param([CAT], images(MIN_CONTROLS), [], id="enough images"),
        pytest.param([POSTER], prompts(MIN_CONTROLS), [], id="enough prompts"),
        pytest.param([CAT], images(10), [("images", 10, 1)], id="too few images"),
        pytest.param([CAT, POSTER], images(MIN_CONTROLS), [("prompts", 0, 1)], id="images for prompts"),
        pytest.param(prompts(2), images(MIN_CONTROLS), [("prompts", 0, 2)], id="images for prompts alone"),
        pytest.param([CAT], prompts(MIN_CONTROLS), [("images", 0, 1)], id="prompts for images"),
        pytest.param([CAT, POSTER], [*images(3), *prompts(1)], [("images", 3, 1), ("prompts", 1, 1)], id="few of both"),
    ],
)
def test_too_few_controls_of_a_kind_are_said_of_the_kind_that_is_watched(probes, controls, expected, said):
    wanted = [FEW.format(kind=kind, has=has, watched=watched) for kind, has, watched in expected]
    assert said(probes, controls=controls) == wanted


def test_images_without_captions_are_said_in_one_sentence(said):
    probes = [CAT, *images(2, caption="")]
    sentence = "probes without a caption: 2 of 3; only snapshot baselines are used for them"
    assert sentence in said(probes, logging.INFO)
    assert sentence not in said([CAT, POSTER], logging.INFO, controls=images(2, caption=""))  # none of them is watched
    assert sentence not in said(probes, logging.INFO, signals={"against": "snapshot"})


def test_the_main_process_alone_speaks(said, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    assert said([CAT, POSTER]) == said([CAT, POSTER], logging.INFO) == []


def test_a_plain_script_sees_information_and_warnings_once():
    """Whether it has set logging up or not; where it has, in its own format."""
    speak = "show_messages(); logger.info('told'); logger.warning('warned')"
    setting_up = "logging.basicConfig(format='%(name)s, %(levelname)s: %(message)s')"
    imports = "import logging; from memwatch.messages import logger, show_messages"
    code = "\n".join([imports, speak, setting_up, speak])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in run.stderr.splitlines() if "told" in line or "warned" in line]
    assert said == [
        "memwatch: told",
        "memwatch: warning: warned",
        "memwatch, INFO: told",
        "memwatch, WARNING: warned",
    ]
