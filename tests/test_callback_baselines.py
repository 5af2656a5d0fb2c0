"""Which earlier model the callback compares with, and that it is the right one."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from support.builders import Loop, history, maps

from memwatch.config import ConfigError
from memwatch.measure.weights import trainable


def baseline_steps(report) -> set[int | None]:
    """The steps that the probes were compared with."""
    return {finding.observation.baseline_step for finding in report.findings}


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("first", [None, 0, 0, 0, 0]),
        ("previous", [None, 0, 2, 4, 6]),
        ("lag:2", [None, 0, 0, 2, 4]),
        ("last_clean", [None, 0, 2, 4, 6]),
    ],
)
def test_baseline_steps(baseline, expected, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    loop.run(loop.watch(pipeline, signals={"baseline": baseline}, alerts={"min_severity": 1e6}), 8)
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    for index, name in enumerate(("cat", "poster")):
        assert [row["findings"][index]["name"] for row in rows] == [name] * 5
        assert [row["findings"][index]["baseline_step"] for row in rows] == expected
        for row in rows[1:]:
            value = maps(tmp_path, row["step"])[f"{name}/log_ratio"]
            assert value.isfinite().all()
            assert value.any()


def test_last_clean_stays_where_suspicion_began(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    watch = loop.watch(pipeline, signals={"baseline": "last_clean"}, alerts={"min_severity": 1e6})
    loop.run(watch, 4)
    state = watch.state_dict()
    for probe in state["states"].values():  # as if suspicion had begun at step 4
        probe.update(streak=1, since=4, last_clean=2, verdict="suspicious")
    watch.load_state_dict(state)
    assert baseline_steps(loop.run(watch, 6)[-1]) == {2}


@pytest.mark.parametrize("kind", [{"lora": True}, {"lora": True, "checkpointing": True, "precision": "bf16"}])
def test_lora_off_is_the_model_before_training(kind, pretrained, pipeline, tmp_path):
    found = {}
    for baseline in ("first", "base"):
        loop = Loop(pretrained, tmp_path / baseline, **kind, lr=5e-2)
        reports = loop.run(loop.watch(pipeline, signals={"baseline": baseline}), 4)
        found[baseline] = maps(tmp_path / baseline, 4)
        assert baseline_steps(reports[-1]) == {0 if baseline == "first" else None}
    assert found["first"].keys() == found["base"].keys()
    assert found["first"]["cat/collapse"].any()
    for name, value in found["first"].items():
        torch.testing.assert_close(value, found["base"][name], rtol=1e-4, atol=1e-5, msg=name)


def test_base_without_lora_is_refused_clearly(pretrained, pipeline, tmp_path):
    with pytest.raises(ConfigError, match=r"signals.baseline.*'base'.*no LoRA layers"):
        Loop(pretrained, tmp_path).watch(pipeline, signals={"baseline": "base"})


def test_a_path_that_is_not_there_is_refused_clearly(pretrained, pipeline, tmp_path):
    with pytest.raises(ConfigError, match=r"signals.baseline.*nowhere.safetensors.*existing"):
        Loop(pretrained, tmp_path).watch(pipeline, signals={"baseline": "path:nowhere.safetensors"})


def test_an_average_of_another_model_is_refused_clearly(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    loop.ema = EMAModel([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ConfigError, match=r"'weights'.*'ema'.*averages 1 tensors"):
        loop.watch(pipeline, weights="ema")


@pytest.mark.parametrize("kind", [{}, {"lora": True}])
def test_weights_from_a_file_are_the_model_they_came_from(kind, pretrained, pipeline, tmp_path):
    path = tmp_path / "before.safetensors"
    save_file(trainable(Loop(pretrained, **kind).bare), path)
    found = {}
    for name, baseline in {"first": "first", "path": f"path:{path}"}.items():
        loop = Loop(pretrained, tmp_path / name, **kind)
        reports = loop.run(loop.watch(pipeline, signals={"baseline": baseline}), 4)
        found[name] = maps(tmp_path / name, 4)
    assert baseline_steps(reports[-1]) == {None}
    assert found["first"]["poster/collapse"].any()
    for name, value in found["first"].items():
        torch.testing.assert_close(value, found["path"][name], rtol=1e-4, atol=1e-5, msg=name)


def test_ema_needs_an_ema(pretrained, pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"weights.*ema"):
        Loop(pretrained, tmp_path).watch(pipeline, weights="ema")
