"""The observer: prompts and their generations, the model without the prompt, and text encoders that are trained."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from support.builders import CONFIG, SMALL, Loop, assert_same, moved, picture
from support.processes import new_process

import memwatch.measure.observer
import memwatch.measure.snapshots
from memwatch import MemWatch, Probe
from memwatch.measure.views import fixed_noise
from memwatch.measure.weights import trainable

CAT, POSTER = Probe("a cat", picture(0), name="cat"), Probe("a red poster", name="poster", seed=3)
CONTROLS = [Probe("a dog", picture(1), name="dog"), Probe("a car", name="car")]


def observed(watch):
    with watch.observer.borrowed():
        return watch.observer.observe(watch.observer.probes, watch.baselines, {})


def test_all_seeds_are_in_one_observation_and_equal_prompts_share_them(pretrained, tmp_path, monkeypatch):
    sampled, real = [], memwatch.measure.observer.generate
    monkeypatch.setattr(memwatch.measure.observer, "generate", lambda *a: sampled.append(list(a[3])) or real(*a))
    others = [replace(POSTER, name="same"), replace(POSTER, name="later", seed=4), Probe("a cat", name="cat", seed=3)]
    watch = Loop(pretrained, tmp_path).watch(pretrained, [POSTER, *others])
    one, same, later, cat = observed(watch)
    assert sampled == [[3, 4], [4, 5], [3, 4]]  # once, and for the pictures as well
    assert one.generations.shape == (2, 16, 16, 3)
    assert not np.array_equal(*one.generations)
    assert np.array_equal(one.image, one.generations[0])
    assert one.now.epsilon.shape == one.eps.shape == (2, 2, 4, 8, 8)
    assert_same(one.eps, fixed_noise("poster", (2, 2, 4, 8, 8), 0))
    assert [np.array_equal(one.generations, o.generations) for o in (same, later, cat)] == [True, False, False]
    assert not torch.equal(one.eps, same.eps)
    assert_same(observed(watch)[0].now.epsilon, one.now.epsilon)


def test_the_last_step_knows_no_noise(pretrained, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    last_step = {"look": "last_step", "seeds": 1, "num_inference_steps": 3, "guidance_scale": 3.0}
    (report,) = loop.run(
        loop.watch(pretrained, [POSTER], sampling=last_step, signals={"terms": "variance"}, strict=True), 2
    )
    (finding,) = report.findings
    o, maps = finding.observation, finding.signals.maps()
    assert (o.eps, o.timesteps, o.generations.shape) == (None, (1,), (1, 16, 16, 3))
    assert "collapse_null" in maps
    assert "loss_log_ratio" not in maps


def test_earlier_weights_are_read_and_swapped_in_once_for_all_prompts(pretrained, tmp_path, monkeypatch):
    reads, swaps = [], []
    load, swapped = memwatch.measure.snapshots.read_safetensors, memwatch.measure.observer.swapped
    monkeypatch.setattr(memwatch.measure.snapshots, "read_safetensors", lambda file: reads.append(file) or load(file))
    monkeypatch.setattr(memwatch.measure.observer, "swapped", lambda *a: swaps.append(a) or swapped(*a))
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    probes = [replace(POSTER, name=f"{i}", seed=i) for i in range(4)]
    watch = loop.watch(pretrained, probes, controls=["a cat", "a dog"], strict=True)
    loop.run(watch, 2)
    reads.clear()
    swaps.clear()
    found = observed(watch)
    assert [o.baseline_step for o in found] == [0] * 6
    assert len(reads) == len(swaps) == 1


def measurements(measurement):
    return None if measurement is None else (measurement.rho.samples, measurement.epsilon)


def test_it_is_measured_of_probes_and_controls_alike_now_and_then(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    signals = {"baseline": "previous"}
    watch = loop.watch(pipeline, [CAT, POSTER], controls=CONTROLS, config=SMALL, signals=signals)
    first = watch.begin()
    (second,) = loop.run(watch, 2)
    seen = observed(watch)
    assert [o.name for o in seen] == ["cat", "poster", "control/dog", "control/car"]
    assert not any(None in (o.unconditional, o.baseline, o.unconditional_baseline) for o in seen)
    for o, earlier, step in ((seen[0], second, 2), (second.findings[0].observation, first, 0)):
        assert o.baseline_step == step
        then = earlier.findings[0].observation.unconditional
        assert_same(measurements(o.unconditional_baseline), measurements(then))


@pytest.mark.parametrize("kind", ["base", "path"])
def test_baselines_from_outside_the_run(kind, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lora=True, lr=5e-2)
    save_file(trainable(loop.bare), file := tmp_path / "before.safetensors")
    signals = {"baseline": "base" if kind == "base" else f"path:{file}"}
    watch = loop.watch(pipeline, [CAT, POSTER], config=SMALL, signals=signals)
    first = [finding.observation for finding in watch.begin().findings]
    for o in first:  # before training it is the model itself
        assert_same(measurements(o.unconditional_baseline), measurements(o.unconditional))
        assert_same(measurements(o.baseline), measurements(o.now))
        assert o.baseline_step is None, o.name
    cat = loop.run(watch, 4)[-1].findings[0].observation
    assert_same(measurements(cat.unconditional_baseline), measurements(first[0].unconditional_baseline))
    assert not torch.equal(cat.unconditional_baseline.epsilon, cat.unconditional.epsilon)


def test_where_the_prompt_is_the_empty_one_nothing_is_measured_twice(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, [Probe("", picture(0), name="cat")], config=SMALL)
    views, real = [], watch.observer.measure
    monkeypatch.setattr(watch.observer, "measure", lambda view: views.append(view.key) or real(view))
    (report,) = loop.run(watch, 2)
    assert views == ["cat", "cat"]  # one per event
    o = report.findings[0].observation
    assert o.baseline is not None
    assert (o.unconditional, o.unconditional_baseline) == (None, None)


# --- text encoders that are trained -----------------------------------------------------------------------------------

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


def collapses(report) -> list[torch.Tensor]:
    return [finding.signals.snapshot.collapse.samples for finding in report.findings]


def test_a_textual_inversion_changes_the_maps_and_its_return_reads_exactly_zero(inversion, pretrained, tmp_path):
    embedding = inversion[1].get_input_embeddings().weight
    before = embedding.detach().clone()
    watch = watch_of(inversion, pretrained, tmp_path)
    first = watch.begin()
    moved(inversion[1])
    changed = watch.on_step_end(1)
    with torch.no_grad():
        embedding.copy_(before)
    returned = watch.on_step_end(2)
    for start, finding in zip(first.findings, changed.findings, strict=True):
        assert finding.signals.snapshot.collapse.mean.abs().max() > 0
        o = finding.observation
        if o.probe.is_reference:  # also without the prompt: what the text encoder said then
            assert_same(measurements(o.unconditional_baseline), measurements(start.observation.unconditional))
    for finding in returned.findings:  # also of the prompt probe: compared with what the text encoder said at step 0
        assert not finding.signals.snapshot.collapse.samples.any()
        assert not finding.signals.snapshot.score.samples.any()
    stored = load_file(tmp_path / "snapshots" / "step_0000000.safetensors")
    names = ("shown", "drawn", "/no prompt")  # and nothing else: the UNet is frozen
    assert set(stored) == {f"conditioning/{name}//encoder_hidden_states" for name in names}


def test_a_resume_and_a_path_baseline_bring_the_earlier_conditioning(inversion, pretrained, tmp_path):
    watch = watch_of(inversion, pretrained, tmp_path / "a")
    watch.begin()
    state = watch.state_dict()
    moved(inversion[1])
    unbroken = collapses(watch.on_step_end(1))
    again = watch_of(inversion, pretrained, tmp_path / "a")
    again.load_state_dict(state)
    assert_same(collapses(again.on_step_end(1)), unbroken)
    signals = {"baseline": f"path:{tmp_path / 'a' / 'snapshots' / 'step_0000000.safetensors'}"}
    assert_same(collapses(watch_of(inversion, pretrained, tmp_path / "path", signals=signals).begin()), unbroken)


def test_base_switches_the_text_encoders_adapters_off_as_well(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path / "first", lora=True)
    text_encoder = copy.deepcopy(pipeline.text_encoder).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]), text_encoder)
    arguments = {"text_encoder": text_encoder, "tokenizer": pipeline.tokenizer, "every_steps": 1, "strict": True}
    watch = loop.watch(pretrained, PROBES, **arguments)
    watch.begin()
    moved(text_encoder)
    moved(loop.bare)
    by_snapshot = collapses(watch.on_step_end(1))
    based = loop.watch(pretrained, PROBES, signals={"baseline": "base"}, output_dir=str(tmp_path / "base"), **arguments)
    assert all(collapse.any() for collapse in by_snapshot)
    assert_same(by_snapshot, collapses(based.begin()))  # before training, LoRA is the base model


def test_a_text_encoder_with_more_tokens_needs_its_own_tokenizer(inversion, pretrained, tmp_path):
    unet, text_encoder, tokenizer = inversion
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<toy>"])
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    message = rf"text_encoder has {len(tokenizer)} tokens, the tokenizer in pretrained .*pass tokenizer= as well"
    with pytest.raises(ValueError, match=message):
        watch_of((unet, text_encoder, None), pretrained, tmp_path)
    assert watch_of((unet, text_encoder, tokenizer), pretrained, tmp_path).begin() is not None
