"""What memwatch says at construction of the things that it will not be able to do."""

from __future__ import annotations

import logging

import pytest
from support.builders import Loop, picture

from memwatch import Probe
from memwatch.measure.probes import MIN_CONTROLS


def images(num: int, caption: str = "a dog") -> list[Probe]:
    return [Probe(caption, picture(20 + i), name=f"i{i}") for i in range(num)]


def prompts(num: int) -> list[Probe]:
    return [Probe(f"a dog {i}", name=f"p{i}") for i in range(num)]


CAT, POSTER = Probe("a cat", picture(0), name="cat"), Probe("a red poster", name="poster")
FEW = "memwatch takes 11 controls that are {kind} to judge probes that are {kind}, and there are {has}; "
FEW += "those probes ({watched}) are inconclusive"


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
    assert warning.startswith("memwatch has no controls: ")
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


def test_peers_are_neither_controls_nor_watched(said):
    assert said([CAT], controls=images(MIN_CONTROLS), peers=prompts(2)) == []
    (hello,) = said([CAT, POSTER], logging.INFO, controls=images(2), peers=images(3))
    assert "; 1 reference and 1 prompt probes, 2 controls, 3 peers; " in hello


def test_images_without_captions_are_said_in_one_sentence(said):
    probes = [CAT, *images(2, caption="")]
    sentence = "memwatch: probes without a caption: 2 of 3; only snapshot baselines are used for them"
    assert sentence in said(probes, logging.INFO)
    assert sentence not in said([CAT, POSTER], logging.INFO, controls=images(2, caption=""))  # none of them is watched
    for signals in ({"against": "snapshot"}, {"unconditional": False}):
        assert sentence not in said(probes, logging.INFO, signals=signals)


def test_the_main_process_alone_speaks(said, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    assert said([CAT, POSTER]) == said([CAT, POSTER], logging.INFO) == []
