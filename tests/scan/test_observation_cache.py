"""Kept observations: what was measured is not measured again, unless something that it depends on is another."""

from __future__ import annotations

import json

import torch
from support.builders import CONFIG, Loop, history, picture, without_time

from memwatch import Probe
from memwatch.scan.observation_cache import KeptObservations


def test_what_was_measured_is_not_measured_again(scan, trained, pretrained, images, tmp_path):
    arguments = (trained, "--images", images, "--pretrained", pretrained)
    assert scan(*arguments)[0] == 0
    before = without_time(history(tmp_path))
    gone = next((tmp_path / "memwatch" / "observations" / "step_0000002").glob("control1-*"))
    gone.unlink()
    code, measured = scan(*arguments)
    assert code == 0
    assert measured == ["control1", "control1"]  # now and unconditional; the baseline comes from the earlier event
    assert without_time(history(tmp_path)) == before


def test_other_settings_measure_anew(scan, trained, pretrained, prompts, tmp_path):
    arguments = (trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    assert len(scan(*arguments)[1]) == 8
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(CONFIG | {"alerts": {"max_p": 0.5}, "signals": {"smooth": 1}}), encoding="utf-8")
    assert scan(*arguments, settings=str(other))[1] == []  # judged differently, measured the same
    other.write_text(json.dumps(CONFIG | {"seed": 3}), encoding="utf-8")
    assert len(scan(*arguments, settings=str(other))[1]) == 8


def test_a_damaged_observation_is_measured_again(scan, trained, pretrained, prompts, tmp_path):
    arguments = (trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    scan(*arguments)
    file = next((tmp_path / "memwatch" / "observations").rglob("a-red-poster-*.safetensors"))
    file.write_bytes(file.read_bytes()[:500])
    assert scan(*arguments)[1] == ["a-red-poster"] * 4


def test_observations_survive_the_disk(pretrained, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pretrained, [Probe("a poster", name="p", seed=1), Probe("a cat", picture(0), name="c")])
    observer, sources = watch.observer, [(0, "here")]
    kept = KeptObservations(tmp_path / "kept", watch.config, [], {0: []})
    with observer.borrowed():
        observations = observer.observe(observer.probes, watch.baselines, {})
    for observation, p in zip(observations, observer.probes, strict=True):
        assert not kept.has(0, p, sources)
        assert kept.read(0, p, sources) is None
        kept.write(0, p, sources, observation)
        assert kept.has(0, p, sources)
        again = kept.read(0, p, sources)
        assert again.probe is p.probe
        assert again.timesteps == observation.timesteps
        assert (again.baseline, again.baseline_step) == (None, None)
        assert torch.equal(again.now.rho.samples, observation.now.rho.samples)
        assert torch.equal(again.now.epsilon, observation.now.epsilon)
        assert torch.equal(again.unconditional.rho.samples, observation.unconditional.rho.samples)
        assert torch.equal(again.unconditional.epsilon, observation.unconditional.epsilon)
        assert again.unconditional_baseline is None
        assert (again.image == observation.image).all()
        assert torch.equal(again.eps, observation.eps)
        assert (again.generations is None) == (observation.generations is None) == p.probe.is_reference
        if again.generations is not None:
            assert (again.generations == observation.generations).all()


def test_the_name_of_a_kept_observation_stands_for_what_it_depends_on(pretrained, tmp_path):
    """Another checkpoint, another file, another model behind it: each is measured anew."""
    watch = Loop(pretrained, tmp_path).watch(pretrained, [Probe("a cat", picture(0), name="c")])
    (p,) = watch.observer.probes
    with watch.observer.borrowed():
        (observation,) = watch.observer.observe([p], watch.baselines, {})
    stamps = {0: [("a.safetensors", 10, 1)], 2: [("b.safetensors", 10, 1)]}
    kept = KeptObservations(tmp_path / "kept", watch.config, ["sd-1-5"], stamps)
    kept.write(2, p, [(0, "a"), (2, "b")], observation)
    assert kept.has(2, p, [(0, "a"), (2, "b")])
    assert not kept.has(2, p, [(2, "b")])
    assert not kept.has(2, p, [(0, "other"), (2, "b")])
    rewritten = stamps | {0: [("a.safetensors", 10, 2)]}
    for depends, found in ((["sd-1-5"], rewritten), (["sd-2-1"], stamps)):
        other = KeptObservations(tmp_path / "kept", watch.config, depends, found)
        assert not other.has(2, p, [(0, "a"), (2, "b")])
