"""Wrong input: refused at construction in words, or watched through without harm."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from support.builders import CONFIG, Loop, assert_same, history, picture

from memwatch import ConfigError, MemWatch, Probe, ProbeError
from memwatch.judge.verdict import Verdict


@pytest.fixture
def loop(pretrained, tmp_path) -> Loop:
    return Loop(pretrained, tmp_path)


def test_no_probes(loop, pipeline):
    for probes in ([], "", ()):
        with pytest.raises((ProbeError, ConfigError), match="probes"):
            loop.watch(pipeline, probes)
    allowed = "allowed: prompts, Probes, an image folder or a dataset"
    with pytest.raises(ConfigError, match=f"config key 'probes'.*{allowed}"):
        MemWatch(loop.accelerator, loop.unet, pipeline, config=CONFIG)


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, "cut"])
def test_an_image_that_cannot_be_read_is_named(content, loop, pipeline, tmp_path):
    path = tmp_path / "broken.png"
    if content is not None:
        picture(0, size=64).save(path)
        path.write_bytes(path.read_bytes()[:2000] if content == "cut" else content)
    with pytest.raises(ProbeError, match=r"probe 'broken': cannot read image .*broken\.png"):
        loop.watch(pipeline, [Probe("a cat", path)])


def test_nan_weights_are_inconclusive_and_training_goes_on(loop, pipeline, images, tmp_path):
    watch = loop.watch(pipeline, controls=images)

    def break_it(running):
        if running.step == 3:
            with torch.no_grad():
                running.bare.conv_out.weight[0, 0, 0, 0] = torch.nan

    reports = loop.run(watch, 6, each=break_it)
    assert [report.step for report in reports] == [2, 4, 6]
    assert reports[0].findings[0].signals is not None
    for report in reports[1:]:
        assert [(f.verdict, f.signals) for f in report.findings] == [(Verdict.INCONCLUSIVE, None)] * 2
        assert (report.controls, report.errors) == ({}, 0)
    assert {f.name for f in reports[1].alerts} == {"cat", "poster"}
    assert "non-finite" in reports[1].alert_text(reports[1].alerts[0])
    assert not reports[2].alerts  # said once
    assert not watch.should_stop
    row = history(tmp_path)[2]
    assert (row["findings"][0]["z_score"], row["scalars"]["memwatch/num_inconclusive"]) == (None, 2)
    assert watch.baselines.ledger.steps == [0]  # never a baseline of later events


def test_a_model_that_recovers_is_judged_again(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=0.0)
    watch = loop.watch(pipeline, signals={"baseline": "previous"})
    watch.begin()
    weight = loop.bare.conv_out.weight.detach().clone()
    loop.bare.conv_out.weight.data.fill_(torch.nan)
    watch.on_step_end(2)
    loop.bare.conv_out.weight.data.copy_(weight)
    report = watch.on_step_end(4)
    assert [(f.verdict, f.observation.baseline_step) for f in report.findings] == [(Verdict.NO_EVIDENCE, 0)] * 2


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")  # diffusers' own
def test_an_unknown_family_and_a_missing_path_are_refused(loop, pipeline, tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    small = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 8}
    for model in (UNet2DModel(**small, **blocks, in_channels=4, out_channels=4), torch.nn.Linear(2, 2)):
        message = f"model {type(model).__name__} .*is of no family that memwatch knows: Stable Diffusion"
        with pytest.raises(ValueError, match=message):
            MemWatch(loop.accelerator, model, pipeline, config=CONFIG, probes=["a cat"])
    for missing in (tmp_path / "no-such-model", "nobody/no-such-model"):
        with pytest.raises(ValueError, match=r"pretrained .*no-such-model.* cannot be loaded"):
            loop.watch(missing)
    with pytest.raises(ValueError, match="pass scheduler=, vae=, text_encoder=, tokenizer= or a pretrained path"):
        loop.watch(None)


def test_parts_that_are_passed_need_no_pretrained(pretrained, pipeline, tmp_path):
    loop, vae = Loop(pretrained, tmp_path), pipeline.vae.train()
    parts = {name: getattr(pipeline, name) for name in ("text_encoder", "tokenizer", "scheduler")}
    frozen = [p.requires_grad for p in pipeline.text_encoder.parameters()]
    pipeline.text_encoder.requires_grad_(False)
    try:
        report = loop.watch(None, vae=vae, **parts).begin()
        assert all(module.training for module in vae.modules())
    finally:
        vae.eval()
        for p, requires_grad in zip(pipeline.text_encoder.parameters(), frozen, strict=True):
            p.requires_grad_(requires_grad)
    other = Loop(pretrained, tmp_path / "other").watch(pretrained).begin()
    for a, b in zip(report.findings, other.findings, strict=True):
        assert_same(a.signals.raw.samples, b.signals.raw.samples)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"levels": {"timesteps": [61, 5000]}}, "levels.timesteps.*5000.*up to 999"),
        ({"resolution": 17}, "resolution.*17.*multiple of 2"),
        (
            {"signals": {"terms": "loss"}, "sampling": {"look": "last_step", "seeds": 1}},
            "signals.terms.*'loss'.*prompt probes and sampling.look: last_step",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(overrides, message, loop, pipeline):
    with pytest.raises(ConfigError, match=message):
        loop.watch(pipeline, **overrides)
