"""Every family through MemWatch: events, LoRA, what is loaded and freed, and what cannot be watched says why."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from support import families as tiny
from support.builders import CONFIG, assert_same, moved, picture
from support.families import PROMPT, adapted, network, size_of

import memwatch.measure.prepare
from memwatch import ConfigError, MemWatch, Probe
from memwatch.denoiser import Components, StableDiffusion3, family_of, load_components
from memwatch.judge.verdict import Verdict


def watch_of(model, pretrained, folder, *, size=tiny.SIZE, **overrides):
    probes = [Probe(PROMPT, picture(0, size), name="cat"), Probe(PROMPT, seed=3, name="drawn")]
    arguments = {"probes": probes, "config": CONFIG, "every_steps": 1, "strict": True, "output_dir": str(folder)}
    return MemWatch(Accelerator(cpu=True), model, pretrained, **(arguments | {"resolution": size} | overrides))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "unconditional"])
def test_an_event_of_every_family(name, family_folders, families, tmp_path, caplog):
    """From the folder; unchanged weights read exactly 0, changed ones do not."""
    model = copy.deepcopy(network(families[name])).train()
    watch = watch_of(model, family_folders[name], tmp_path, size=size_of(name))
    watch.observer.denoiser.warn_if_cut("a photo of a cat " * 20, adapted(families[name])[1])
    assert ("cut: " in caplog.text) == (name in ("sdxl", "sd3"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = watch.begin()
    unchanged = watch.on_step_end(1)
    assert_same(before, dict(model.state_dict()))
    assert all(module.training for module in model.modules())
    for finding in unchanged.findings:
        assert finding.verdict is Verdict.NO_EVIDENCE
        assert finding.observation.image.shape == (size_of(name), size_of(name), 3)
        assert not finding.signals.snapshot.variance.samples.any()
        assert finding.signals.snapshot.variance.mean.shape[-2:] == (8, 8)
        assert (finding.signals.unconditional is None) == (name == "unconditional")
    moved(model, 0.05)
    changed = watch.on_step_end(2)
    for finding in changed.findings:
        assert finding.signals.snapshot.variance.mean.abs().max() > 0
        assert finding.signals.raw.mean.isfinite().all()
    for found, names in ((first, set()), (changed, {"loss_log_ratio"})):  # at first there is nothing earlier
        assert all(names == finding.signals.maps().keys() & {"loss_log_ratio"} for finding in found.findings)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_lora_keeps_its_own_tensors_only_and_the_base_model_is_a_baseline(name, family_folders, families, tmp_path):
    from peft import LoraConfig

    def with_lora():
        model = copy.deepcopy(network(families[name])).requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
        model.enable_gradient_checkpointing()  # it computes activations again, under the weights that are swapped in
        return model

    model = with_lora()
    watch = watch_of(model, family_folders[name], tmp_path / "first")
    watch.begin()
    stored = load_file(tmp_path / "first" / "snapshots" / "step_0000000.safetensors")
    assert stored
    assert all("lora_" in key for key in stored)
    moved(model, 0.05)
    changed = watch.on_step_end(1)
    based = watch_of(model, family_folders[name], tmp_path / "base", signals={"baseline": "base"}).begin()
    assert not (tmp_path / "base" / "snapshots").exists()
    for a, b in zip(changed.findings, based.findings, strict=True):  # before training, LoRA is the base model
        assert a.signals.snapshot.variance.mean.abs().max() > 0
        assert_same(a.signals.snapshot.variance.samples, b.signals.snapshot.variance.samples)


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_what_was_loaded_is_freed(name, family_folders, families, tmp_path, monkeypatch):
    loaded = []

    def recording(*args, **kwargs):
        parts = load_components(*args, **kwargs)
        loaded.extend(weakref.ref(part) for part in (*parts.text_encoders, parts.vae))
        return parts

    monkeypatch.setattr(memwatch.measure.prepare, "load_components", recording)
    model = network(families[name])
    probes, off = [Probe(PROMPT, picture(0), name="cat")], {"enabled": False}
    watch = watch_of(model, family_folders[name], tmp_path, probes=probes, proof=off)
    gc.collect()
    assert len(loaded) == {"sd1": 2, "sd3": 4}[name]
    assert [reference() for reference in loaded] == [None] * len(loaded)
    assert watch.begin() is not None


def test_lists_of_text_encoders_are_used_and_the_rest_is_loaded(family_folders, families, tmp_path):
    pipe = families["sdxl"]
    model = copy.deepcopy(pipe.unet)
    mine = copy.deepcopy(pipe.text_encoder_2).requires_grad_(False)
    with torch.no_grad():
        mine.text_projection.weight.mul_(2)
    plain = watch_of(model, family_folders["sdxl"], tmp_path / "a")
    passed = watch_of(model, family_folders["sdxl"], tmp_path / "b", text_encoder=[None, mine])
    theirs, ours = (w.observer.probes[0].conditioning for w in (plain, passed))
    assert_same(theirs["encoder_hidden_states"], ours["encoder_hidden_states"])
    torch.testing.assert_close(2 * theirs["text_embeds"], ours["text_embeds"])
    encoders, tokenizers = [pipe.text_encoder, pipe.text_encoder_2], (pipe.tokenizer, pipe.tokenizer_2)
    everything = {"text_encoder": encoders, "tokenizer": tokenizers, "vae": pipe.vae, "scheduler": pipe.scheduler}
    watch = watch_of(model, None, tmp_path / "c", **everything)
    assert_same(dict(theirs), dict(watch.observer.probes[0].conditioning))
    with pytest.raises(
        ValueError, match=r"pass text_encoder=, tokenizer= \(lists, for text_encoder, text_encoder_2\) or"
    ):
        watch_of(model, None, tmp_path / "d", scheduler=pipe.scheduler, vae=pipe.vae)
    with pytest.raises(ValueError, match="got 3 text encoders or tokenizers, this model has 2: text_encoder, text_e"):
        watch_of(model, family_folders["sdxl"], tmp_path / "d", text_encoder=[None, None, mine])


def test_text_encoders_are_loaded_in_the_networks_dtype_and_the_vae_in_float32(family_folders):
    how = {"needs_vae": True, "text_encoders": StableDiffusion3.text_encoders, "dtype": torch.bfloat16}
    parts = load_components(family_folders["sd3"], Components(None), device=torch.device("cpu"), **how)
    assert [encoder.dtype for encoder in parts.text_encoders] == [torch.bfloat16] * 3
    assert parts.vae.dtype == torch.float32
    assert not any(p.requires_grad for part in (*parts.text_encoders, parts.vae) for p in part.parameters())


def test_what_a_model_needs_and_what_it_cannot_do_is_named(families, family_folders, tmp_path):
    model = families["unconditional"].unet
    scheduler = DDPMScheduler(prediction_type="sample")
    report = watch_of(model, None, tmp_path, size=8, scheduler=scheduler).begin()
    assert report.findings[0].signals.raw.mean.isfinite().all()
    with pytest.raises(ValueError, match="pass scheduler= or a pretrained path"):
        watch_of(model, None, tmp_path, size=8)
    with pytest.raises(ConfigError, match=r"resolution.*18.*a multiple of 4"):  # 2 pixels per latent, 2 of a patch
        watch_of(families["sd3"].transformer, family_folders["sd3"], tmp_path, size=18)
    with pytest.raises(ConfigError, match=r"signals.against.*unconditional.*no unconditional branch"):
        watch_of(model, None, tmp_path, size=8, scheduler=scheduler, signals={"against": "unconditional"})


BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
TEXT = {"cross_attention_dim": 8, "attention_head_dim": 4, "down_block_types": DOWN}


PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ControlNetModel, TEXT, "ControlNetModel is no denoiser: a probe would need a control image"),
        (UNet2DConditionModel, TEXT | UP | {"in_channels": 8}, "8 channels: a probe would need the image to be edited"),
        (UNet2DConditionModel, TEXT | UP | {"in_channels": 9}, "9 channels: a probe would need a mask and the masked"),
        (UNet2DModel, PLAIN | {"num_class_embeds": 3}, "class labels"),
    ],
)
def test_what_cannot_be_watched_says_what_is_missing(kind, options, message):
    with pytest.raises(ValueError, match=f"model {kind.__name__} .*no family that memwatch knows.*{message}"):
        family_of(kind(**BLOCKS, **options))
