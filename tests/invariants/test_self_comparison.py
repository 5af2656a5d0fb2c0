"""A model compared with itself reads exactly 0, and how it is trained changes no number."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from support.builders import SMALL, SNAPSHOT_MAPS, Loop, assert_same, maps

from memwatch.judge.verdict import Verdict


def watched(pretrained, pipeline, folder, steps: int = 2, **kind) -> list:
    """The reports of all events of a training."""
    loop = Loop(pretrained, folder, **kind)
    watch = loop.watch(pipeline, config=SMALL)
    return [watch.begin(), *loop.run(watch, steps)]


def assert_reads_zero(finding) -> None:
    """Every map against the snapshot, in value and in error."""
    found = {name: value for name, value in finding.signals.maps().items() if name in SNAPSHOT_MAPS}
    assert found.keys() == set(SNAPSHOT_MAPS)
    for name, value in found.items():
        assert not value.samples.any(), (finding.name, name)
        assert not value.sem.any(), (finding.name, name)


def channels_last(unet):
    return unet.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("kind", "baseline"),
    [
        ({"ema": True}, "first"),
        ({"lora": True, "checkpointing": True, "precision": "bf16"}, "previous"),
        ({"adapt": channels_last}, "first"),
    ],
    ids=["full", "lora", "channels-last"],
)
def test_unchanged_weights_read_exactly_zero(kind, baseline, pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path, **kind, lr=0.0)
    watch = loop.watch(pipeline, controls=images, config=SMALL, signals={"baseline": baseline})
    reports = loop.run(watch, 4)
    assert [report.step for report in reports] == [2, 4]
    for report in reports:
        for finding in report.findings:
            assert_reads_zero(finding)
            assert finding.verdict is Verdict.NO_EVIDENCE
            assert finding.severity == 1.0
            assert not finding.regions
            assert float(finding.signals.raw.mean.abs().max()) > 0
        for control in report.judgement.controls:
            assert_reads_zero(control)
        assert list(report.controls.values()) == [1.0] * 3
        assert not report.alerts


def test_mixed_precision_is_looked_through_to_the_float32_weights(pretrained, pipeline, tmp_path):
    watched(pretrained, pipeline, tmp_path / "whole", steps=0)
    watched(pretrained, pipeline, tmp_path / "mixed", steps=0, precision="bf16")
    assert_same(maps(tmp_path / "whole", 0), maps(tmp_path / "mixed", 0))


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "no")], ids=str)
def test_a_low_precision_base_reads_nearly_as_the_float32_one(dtype, precision, pretrained, pipeline, tmp_path):
    kind = {"lora": True, "dtype": dtype, "precision": precision}
    reports = watched(pretrained, pipeline, tmp_path / "low", lr=5e-2, **kind)
    watched(pretrained, pipeline, tmp_path / "high", steps=0, lora=True)
    low, high = (maps(tmp_path / name, 0)["cat/raw"].float() for name in ("low", "high"))
    assert float((low - high).abs().mean()) < 0.1 * float(high.abs().mean())
    assert all(f.signals.snapshot.collapse.samples.any() for f in reports[-1].findings)


def test_gradient_checkpointing_changes_no_number(pretrained, pipeline, tmp_path):
    """Activations are computed again inside the backward pass: with the live weights, were the swap over by then."""
    for name, checkpointing in {"plain": False, "checkpointing": True}.items():
        watched(pretrained, pipeline, tmp_path / name, checkpointing=checkpointing, lr=3e-2, lora=True)
    plain, checkpointed = maps(tmp_path / "plain", 2), maps(tmp_path / "checkpointing", 2)
    assert plain["poster/collapse"].any()
    assert_same(plain, checkpointed)


@pytest.mark.parametrize("lora", [False, True])
def test_averaged_weights_are_watched_instead_of_the_live_ones(lora, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lora=lora, lr=3e-2)
    averaged = [p for p in loop.bare.parameters() if p.requires_grad or not lora]
    loop.ema = EMAModel(averaged, decay=0.9)
    watch = loop.watch(pipeline, weights="ema", config=SMALL)
    watch.begin()
    average = loop.ema
    loop.ema = None  # live weights move on, the average stays
    report = loop.run(watch, 2)[-1]
    for finding in report.findings:
        assert_reads_zero(finding)
    loop.ema = average
    loop.ema.step(averaged)
    loop.ema = None
    report = loop.run(watch, 4)[-1]
    assert all(f.signals.snapshot.collapse.samples.any() for f in report.findings)
