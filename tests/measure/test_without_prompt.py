"""The model without the prompt: of every probe alike, now and then, and only where it says something else."""

from __future__ import annotations

import copy

import pytest
import torch
from support.builders import SMALL, TOKENS, Loop, assert_same, picture

from memwatch import Probe
from memwatch.measure.weights import trainable

CAT, POSTER = Probe("a cat", picture(0), name="cat"), Probe("a poster", name="poster")
CONTROLS = [Probe("a dog", picture(1), name="dog"), Probe("a car", name="car")]
BOTH = {"unconditional": True, "against": "both"}


def measurements(measurement):
    return None if measurement is None else (measurement.rho.samples, measurement.epsilon)


def seen_by(watch, monkeypatch) -> dict:
    """The latest observations by name, of controls as well."""
    seen, real = {}, watch.observer.observe

    def observing(*args, **kwargs):
        found = real(*args, **kwargs)
        seen.update({o.name: o for o in found})
        return found

    monkeypatch.setattr(watch.observer, "observe", observing)
    return seen


@pytest.mark.parametrize("against", ["snapshot", "unconditional", "both"])
def test_controls_are_measured_like_probes(against, pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    signals = BOTH | {"against": against}
    watch = loop.watch(pipeline, [CAT, POSTER], controls=CONTROLS, config=SMALL, signals=signals)
    seen = seen_by(watch, monkeypatch)
    loop.run(watch, 2)
    assert set(seen) == {"cat", "poster", "control/dog", "control/car"}
    for o in seen.values():
        assert None not in (o.unconditional, o.baseline, o.unconditional_baseline), o.name


@pytest.mark.parametrize("baseline", ["first", "previous"])
def test_the_earlier_model_without_the_prompt_is_what_it_was(baseline, pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, [CAT, POSTER], config=SMALL, signals=BOTH | {"baseline": baseline})
    seen, then = seen_by(watch, monkeypatch), {}
    watch.begin()
    then[0] = dict(seen)
    for step in (2, 4):
        loop.run(watch, step)
        then[step] = dict(seen)
        o, step_then = seen["cat"], seen["cat"].baseline_step
        assert step_then == (0 if baseline == "first" else step - 2)
        assert_same(measurements(o.unconditional_baseline), measurements(then[step_then]["cat"].unconditional))
        assert not torch.equal(o.unconditional_baseline.epsilon, o.unconditional.epsilon)


def test_a_model_that_stood_still_reads_the_same_without_the_prompt(pretrained, pipeline, tmp_path, monkeypatch):
    """Also of prompt probes, for which the earlier weights are put in place again."""
    loop = Loop(pretrained, tmp_path, lr=0.0)
    watch = loop.watch(pipeline, [CAT, POSTER], config=SMALL, signals=BOTH)
    seen = seen_by(watch, monkeypatch)
    loop.run(watch, 2)
    for o in seen.values():
        assert_same(measurements(o.unconditional_baseline), measurements(o.unconditional))
        assert o.unconditional.draws == o.now.draws


@pytest.mark.parametrize("kind", ["base", "path"])
def test_baselines_from_outside_the_run(kind, pretrained, pipeline, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    loop = Loop(pretrained, tmp_path, lora=True, lr=5e-2)
    file = tmp_path / "before.safetensors"
    save_file(trainable(loop.bare), file)
    signals = BOTH | {"baseline": "base" if kind == "base" else f"path:{file}"}
    watch = loop.watch(pipeline, [CAT, POSTER], config=SMALL, signals=signals)
    seen = seen_by(watch, monkeypatch)
    watch.begin()
    first = dict(seen)
    for name, o in first.items():  # before training it is the model itself
        assert_same(measurements(o.unconditional_baseline), measurements(o.unconditional))
        assert_same(measurements(o.baseline), measurements(o.now))
        assert o.baseline_step is None, name
    loop.run(watch, 4)
    assert_same(measurements(seen["cat"].unconditional_baseline), measurements(first["cat"].unconditional_baseline))
    assert not torch.equal(seen["cat"].unconditional_baseline.epsilon, seen["cat"].unconditional.epsilon)


@pytest.mark.parametrize("signals", [BOTH, {"unconditional": False, "against": "snapshot"}], ids=["no-caption", "off"])
def test_where_the_prompt_is_the_empty_one_nothing_is_measured_twice(
    signals, pretrained, pipeline, tmp_path, monkeypatch
):
    caption = "" if signals is BOTH else "a cat"
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, [Probe(caption, picture(0), name="cat")], config=SMALL, signals=signals)
    seen, views, real = seen_by(watch, monkeypatch), [], watch.observer.measure

    def counting(view):
        views.append(view.key)
        return real(view)

    monkeypatch.setattr(watch.observer, "measure", counting)
    loop.run(watch, 2)
    assert views == ["cat", "cat"]  # one per event
    o = seen["cat"]
    assert o.baseline is not None
    assert (o.unconditional, o.unconditional_baseline) == (None, None)


def test_a_trained_text_encoder_is_compared_with_what_it_said_without_a_prompt(
    pretrained, pipeline, tmp_path, monkeypatch
):
    text_encoder = copy.deepcopy(pipeline.text_encoder).train()
    loop = Loop(pretrained, tmp_path, lr=0.0)
    tokenizer = pipeline.tokenizer
    watch = loop.watch(
        pretrained, [CAT, POSTER], text_encoder=text_encoder, tokenizer=tokenizer, config=SMALL, signals=BOTH
    )
    seen = seen_by(watch, monkeypatch)
    watch.begin()
    first = dict(seen)
    before = watch.observer.unconditional["encoder_hidden_states"].clone()
    with torch.no_grad():
        for parameter in text_encoder.parameters():
            parameter.mul_(1.5)
    watch.on_step_end(2)
    assert before.shape == (TOKENS, 16)
    assert not torch.equal(before, watch.observer.unconditional["encoder_hidden_states"])
    assert_same(measurements(seen["cat"].unconditional_baseline), measurements(first["cat"].unconditional))
    stored = watch.baselines.weights_at(0)["conditioning//no prompt//encoder_hidden_states"]
    assert torch.equal(stored, before)
    poster = seen["poster"]
    assert not torch.equal(poster.unconditional_baseline.epsilon, poster.unconditional.epsilon)
