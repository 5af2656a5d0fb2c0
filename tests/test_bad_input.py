"""Wrong input: refused at construction in words, or watched through without harm."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from support.builders import CONFIG, Loop, assert_same, history, picture

from memwatch import ConfigError, MemWatch, Probe, ProbeError
from memwatch.judge.verdict import Verdict


@pytest.fixture
def loop(pretrained, tmp_path) -> Loop:
    return Loop(pretrained, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"probes": []}, "probes"),
        ({"probes": ""}, "probes"),
        ({"controls": "nowhere"}, "'nowhere' is neither a folder nor a file"),
        ({"levels": {"timesteps": [61, 5000]}}, "levels.timesteps.*5000.*up to 999"),
        ({"resolution": 17}, "resolution.*17.*multiple of 2"),
        (
            {"signals": {"terms": "loss"}, "sampling": {"look": "last_step", "seeds": 1}},
            "signals.terms.*'loss'.*prompt probes and sampling.look: last_step",
        ),
        ({"signals": {"baseline": "base"}}, "signals.baseline.*'base'.*no LoRA layers"),
        (
            {"signals": {"baseline": "path:nowhere.safetensors"}},
            "signals.baseline.*'path:nowhere.safetensors'.*existing",
        ),
        ({"weights": "ema"}, "weights.*ema"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message, loop, pipeline):
    with pytest.raises((ProbeError, ConfigError), match=message):
        loop.watch(pipeline, **overrides)


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, "cut"])
def test_an_image_that_cannot_be_read_is_named(content, loop, pipeline, tmp_path):
    path = tmp_path / "broken.png"
    if content is not None:
        picture(0, size=64).save(path)
        path.write_bytes(path.read_bytes()[:2000] if content == "cut" else content)
    with pytest.raises(ProbeError, match=r"probe 'broken': cannot read image .*broken\.png"):
        loop.watch(pipeline, [Probe("a cat", path)])


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")  # diffusers' own
def test_what_cannot_be_watched_or_is_missing_is_refused(loop, pipeline, tmp_path):
    with pytest.raises(ConfigError, match="'probes'.*allowed: picked .of memwatch.pick., prompts, Probes"):
        MemWatch(loop.accelerator, loop.unet, pipeline, config=CONFIG)
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
    loop.ema = EMAModel([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ConfigError, match=r"'weights'.*'ema'.*averages 1 tensors"):
        loop.watch(pipeline, weights="ema")


def test_parts_that_are_passed_need_no_pretrained(pretrained, pipeline, tmp_path):
    vae, text_encoder = copy.deepcopy(pipeline.vae).train(), copy.deepcopy(pipeline.text_encoder).requires_grad_(False)
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": pipeline.tokenizer, "scheduler": pipeline.scheduler}
    report = Loop(pretrained, tmp_path).watch(None, **parts).begin()
    assert all(module.training for module in vae.modules())
    other = Loop(pretrained, tmp_path / "other").watch(pretrained).begin()
    for a, b in zip(report.findings, other.findings, strict=True):
        assert_same(a.signals.raw.samples, b.signals.raw.samples)


def test_nan_weights_are_inconclusive_and_a_model_that_recovers_is_judged_again(loop, pipeline, images, tmp_path):
    watch = loop.watch(pipeline, controls=images, signals={"baseline": "previous"})
    watch.begin()
    weight = loop.bare.conv_out.weight.detach().clone()
    loop.bare.conv_out.weight.data[0, 0, 0, 0] = torch.nan
    broken = [watch.on_step_end(step) for step in (2, 4)]
    for report in broken:
        assert [(f.verdict, f.signals) for f in report.findings] == [(Verdict.INCONCLUSIVE, None)] * 2
        assert (report.controls, report.errors, report.stop_reason) == ({}, 0, None)
    assert [{f.name for f in report.alerts} for report in broken] == [{"cat", "poster"}, set()]  # said once
    assert "non-finite" in broken[0].alert_text(broken[0].alerts[0])
    row = history(tmp_path)[1]
    assert (row["findings"][0]["z_score"], row["scalars"]["memwatch/num_inconclusive"]) == (None, 2)
    assert watch.baselines.ledger.steps == [0]  # never a baseline of later events
    loop.bare.conv_out.weight.data.copy_(weight)
    report = watch.on_step_end(6)
    assert [(f.verdict, f.observation.baseline_step) for f in report.findings] == [(Verdict.INCONCLUSIVE, 0)] * 2
    assert {f.reason.partition(" are usable")[0] for f in report.findings} == {
        "3 controls of its kind",
        "0 controls of its kind",
    }
