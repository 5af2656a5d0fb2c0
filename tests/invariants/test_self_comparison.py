"""A model compared with itself reads exactly 0, and how it is trained changes no number."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from support.builders import SMALL, SNAPSHOT_MAPS, Loop, assert_same, maps

from memwatch.judge.verdict import Verdict

BF16 = {"precision": "bf16"}


def watched(pretrained, pipeline, folder, steps: int = 2, told=None, **kind) -> list:
    """The reports of all events of a training; ``told`` are settings of the watch."""
    loop = Loop(pretrained, folder, **kind)
    watch = loop.watch(pipeline, config=SMALL, **(told or {}))
    return [watch.begin(), *loop.run(watch, steps)]


def assert_reads_zero(finding) -> None:
    """Every map against the snapshot, in value and in error."""
    found = {name: value for name, value in finding.signals.maps().items() if name in SNAPSHOT_MAPS}
    assert found.keys() == set(SNAPSHOT_MAPS)
    for name, value in found.items():
        assert not value.samples.any(), (finding.name, name)
        assert not value.sem.any(), (finding.name, name)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ({"ema": True}, {}),
        ({"lora": True, "checkpointing": True} | BF16, {"signals": {"baseline": "previous"}}),
        ({"adapt": lambda unet: unet.to(memory_format=torch.channels_last)}, {}),
        (BF16, {"precision": "loop"}),
        (BF16 | {"checkpointing": True}, {"precision": "loop"}),
    ],
    ids=["full", "lora", "channels-last", "loop's precision", "loop's precision, checkpointing"],
)
def test_unchanged_weights_read_exactly_zero(kind, overrides, pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path, **kind, lr=0.0)
    reports = loop.run(loop.watch(pipeline, controls=images, config=SMALL, **overrides), 4)
    assert [report.step for report in reports] == [2, 4]
    for report in reports:
        for finding in report.judgement.everything:
            assert_reads_zero(finding)
            assert finding.verdict is Verdict.INCONCLUSIVE  # there are three controls, and it takes eleven
            assert finding.severity == 1.0
            assert not finding.regions
            assert float(finding.signals.raw.mean.abs().max()) > 0
        assert list(report.controls.values()) == [1.0] * 3
        assert not report.alerts


@pytest.mark.parametrize(
    ("kind", "common", "step"),
    [
        (BF16, {}, 0),  # measured by the float32 weights
        ({"checkpointing": True}, {"lora": True, "lr": 3e-2}, 2),  # recomputed backward, under the weights of step 0
    ],
    ids=["mixed precision", "checkpointing"],
)
def test_how_a_model_is_trained_changes_no_number(kind, common, step, pretrained, pipeline, tmp_path):
    watched(pretrained, pipeline, tmp_path / "plain", step, **common)
    watched(pretrained, pipeline, tmp_path / "other", step, **common, **kind)
    plain = maps(tmp_path / "plain", step)
    assert step == 0 or plain["poster/collapse"].any()
    assert_same(plain, maps(tmp_path / "other", step))


@pytest.mark.parametrize(
    ("kind", "told"),
    [({"dtype": torch.bfloat16} | BF16, {}), ({"dtype": torch.float16}, {}), (BF16, {"precision": "loop"})],
    ids=["bfloat16", "float16", "loop's precision"],
)
def test_low_precision_reads_nearly_as_float32(kind, told, pretrained, pipeline, tmp_path):
    reports = watched(pretrained, pipeline, tmp_path / "low", told=told, lora=True, lr=5e-2, **kind)
    watched(pretrained, pipeline, tmp_path / "high", steps=0, lora=True)
    low, high = (maps(tmp_path / name, 0)["cat/raw"].float() for name in ("low", "high"))
    assert 0 < float((low - high).abs().mean()) < 0.1 * float(high.abs().mean())
    for finding in reports[-1].findings:
        assert finding.signals.snapshot.collapse.samples.any()
        now = finding.observation.now
        assert now.epsilon.dtype == now.rho.samples.dtype == torch.float32


@pytest.mark.parametrize("lora", [False, True])
def test_averaged_weights_are_watched_instead_of_the_live_ones(lora, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lora=lora, lr=3e-2)
    averaged = [p for p in loop.bare.parameters() if p.requires_grad or not lora]
    average = loop.ema = EMAModel(averaged, decay=0.9)
    watch = loop.watch(pipeline, weights="ema", config=SMALL)
    watch.begin()
    loop.ema = None  # live weights move on, the average stays
    for finding in loop.run(watch, 2)[-1].findings:
        assert_reads_zero(finding)
    average.step(averaged)
    report = loop.run(watch, 4)[-1]
    assert all(f.signals.snapshot.collapse.samples.any() for f in report.findings)
