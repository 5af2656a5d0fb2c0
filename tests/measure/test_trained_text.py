"""A text encoder or a textual inversion that is trained: the conditioning is what changes, and is compared with."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from support import families as tiny
from support.builders import CONFIG, Loop, assert_same, picture
from support.processes import new_process

from memwatch import MemWatch, Probe
from memwatch.measure.measure import measure

PROBES = [Probe("a photo of a cat", picture(0), name="shown"), Probe("a photo of a cat", seed=3, name="drawn")]


@pytest.fixture
def inversion(pipeline):
    """Frozen UNet, text encoder with nothing but its token embedding trainable, tokenizer."""
    unet = copy.deepcopy(pipeline.unet).requires_grad_(False)
    text_encoder = copy.deepcopy(pipeline.text_encoder).requires_grad_(False).train()
    text_encoder.get_input_embeddings().requires_grad_(True)
    return unet, text_encoder, pipeline.tokenizer


def watch_of(inversion, pretrained, folder, **overrides):
    unet, text_encoder, tokenizer = inversion
    new_process()
    arguments = {"probes": PROBES, "config": CONFIG, "every_steps": 1, "strict": True, "output_dir": str(folder)}
    arguments |= {"text_encoder": text_encoder, "tokenizer": tokenizer} | overrides
    return MemWatch(Accelerator(cpu=True), unet, pretrained, **arguments)


def turned(text_encoder, seed: int = 0) -> None:
    with torch.no_grad():
        for parameter in text_encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_textual_inversion_changes_the_maps_and_its_return_reads_exactly_zero(
    inversion, pretrained, tmp_path, on_disk
):
    embedding = inversion[1].get_input_embeddings().weight
    before = embedding.detach().clone()
    watch = watch_of(inversion, pretrained, tmp_path, snapshots={"on_disk": on_disk})
    watch.begin()
    turned(inversion[1])
    changed = watch.on_step_end(1)
    with torch.no_grad():
        embedding.copy_(before)
    returned = watch.on_step_end(2)
    for finding in changed.findings:
        assert finding.signals.snapshot.collapse.mean.abs().max() > 0
        assert finding.signals.snapshot.score.mean.max() > 0
    for finding in returned.findings:  # also of the prompt probe: compared with what the text encoder said at step 0
        assert not finding.signals.snapshot.collapse.samples.any()
        assert not finding.signals.snapshot.score.samples.any()
    assert embedding.requires_grad
    assert embedding.grad is None
    if on_disk:
        stored = load_file(tmp_path / "snapshots" / "step_0000000.safetensors")
        names = ("shown", "drawn", "/no prompt")  # and nothing else: the UNet is frozen
        assert set(stored) == {f"conditioning/{name}//encoder_hidden_states" for name in names}


def test_the_baseline_of_a_prompt_probe_is_the_earlier_conditioning_at_todays_noisy_latents(
    inversion, pretrained, pipeline, tmp_path
):
    watch = watch_of(inversion, pretrained, tmp_path)
    watch.begin()
    observer, config = watch.observer, watch.config
    earlier = observer.probes[1].conditioning
    turned(inversion[1])
    found = watch.on_step_end(1).findings[1].signals.snapshot.collapse.samples

    with observer.borrowed():
        view, _ = observer.view(observer.probes[1])
    assert not torch.equal(view.conditioning["encoder_hidden_states"], earlier["encoder_hidden_states"])
    then = replace(view, conditioning=earlier)
    observer.model.eval()
    was, now = (measure(observer.denoiser, v, config.curvature, config.seed) for v in (then, view))
    smooth = config.signals.smooth
    assert_same(found, (was.rho.smooth(smooth) - now.rho.smooth(smooth)).samples)


def test_resume_goes_on_with_the_earlier_conditioning(inversion, pretrained, tmp_path):
    watch = watch_of(inversion, pretrained, tmp_path / "a")
    watch.begin()
    state = watch.state_dict()
    turned(inversion[1])
    unbroken = watch.on_step_end(1)
    again = watch_of(inversion, pretrained, tmp_path / "a")
    again.load_state_dict(state)
    resumed = again.on_step_end(1)
    for a, b in zip(unbroken.findings, resumed.findings, strict=True):
        assert_same(a.signals.snapshot.collapse.samples, b.signals.snapshot.collapse.samples)


def test_base_switches_the_text_encoders_adapters_off_as_well(pretrained, pipeline, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    loop = Loop(pretrained, tmp_path / "first", lora=True)
    text_encoder = copy.deepcopy(pipeline.text_encoder).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]), text_encoder)
    arguments = {"text_encoder": text_encoder, "tokenizer": pipeline.tokenizer, "every_steps": 1, "strict": True}
    watch = loop.watch(pretrained, PROBES, **arguments)
    watch.begin()
    turned(text_encoder)
    turned(loop.bare)
    by_snapshot = watch.on_step_end(1)
    based = loop.watch(pretrained, PROBES, signals={"baseline": "base"}, output_dir=str(tmp_path / "base"), **arguments)
    by_base = based.begin()
    for a, b in zip(by_snapshot.findings, by_base.findings, strict=True):  # before training, LoRA is the base model
        assert a.signals.snapshot.collapse.mean.abs().max() > 0
        assert_same(a.signals.snapshot.collapse.samples, b.signals.snapshot.collapse.samples)


def test_a_path_baseline_brings_its_conditioning(inversion, pretrained, tmp_path):
    watch = watch_of(inversion, pretrained, tmp_path / "first")
    watch.begin()
    turned(inversion[1])
    first = watch.on_step_end(1)
    file = tmp_path / "first" / "snapshots" / "step_0000000.safetensors"
    by_path = watch_of(inversion, pretrained, tmp_path / "path", signals={"baseline": f"path:{file}"}).begin()
    for a, b in zip(first.findings, by_path.findings, strict=True):
        assert_same(a.signals.snapshot.collapse.samples, b.signals.snapshot.collapse.samples)


def test_one_of_two_text_encoders_trained(tmp_path):
    folder = tiny.sdxl(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(folder)
    unet = pipe.unet.requires_grad_(False)
    second = pipe.text_encoder_2.requires_grad_(False)
    second.get_input_embeddings().requires_grad_(True)
    watch = watch_of((unet, [None, second], None), folder, tmp_path / "watch", resolution=tiny.SIZE)
    watch.begin()
    turned(second)
    changed = watch.on_step_end(1)
    for finding in changed.findings:
        assert finding.signals.snapshot.collapse.mean.abs().max() > 0
    keys = set(load_file(tmp_path / "watch" / "snapshots" / "step_0000000.safetensors"))
    assert {f"conditioning/drawn//{key}" for key in ("encoder_hidden_states", "text_embeds", "time_ids")} <= keys


def test_a_text_encoder_with_more_tokens_needs_its_own_tokenizer(inversion, pretrained, tmp_path):
    unet, text_encoder, tokenizer = inversion
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<toy>"])
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    message = rf"text_encoder has {len(tokenizer)} tokens, the tokenizer in pretrained .*pass tokenizer= as well"
    with pytest.raises(ValueError, match=message):
        watch_of((unet, text_encoder, None), pretrained, tmp_path)
    assert watch_of((unet, text_encoder, tokenizer), pretrained, tmp_path).begin() is not None


def test_nothing_trainable_is_said(inversion, pretrained, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "memwatch"):
        watch_of(inversion, pretrained, tmp_path / "a")
        assert "trainable" not in caplog.text
        watch = watch_of((inversion[0], None, None), pretrained, tmp_path / "b")
    assert "neither the model nor a text encoder passed to memwatch has trainable parameters" in caplog.text
    watch.begin()
    for finding in watch.on_step_end(1).findings:  # and it works all the same
        assert not finding.signals.snapshot.collapse.samples.any()
    assert load_file(tmp_path / "b" / "snapshots" / "step_0000000.safetensors") == {}
