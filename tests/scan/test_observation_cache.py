"""The observation cache: what was measured is not measured again, unless something that it depends on is another."""

from __future__ import annotations

import json

import numpy as np
import torch
from support.builders import CONFIG, Loop, history, picture, without_time

from memwatch import Probe
from memwatch.scan.checkpoint_store import ObservationCache


def test_what_was_measured_is_not_measured_again(scan, trained, pretrained, images, tmp_path):
    arguments = (trained, "--images", images, "--pretrained", pretrained)
    assert scan(*arguments)[0] == 0
    before = without_time(history(tmp_path))
    gone, damaged = (
        next((tmp_path / "memwatch" / "observations" / f"step_000000{step}").glob("control1-*")) for step in (2, 4)
    )
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:500])
    code, measured = scan(*arguments)
    assert code == 0
    assert measured == ["control1"] * 4  # now and unconditional; the baseline comes from the earlier event
    assert without_time(history(tmp_path)) == before


def test_other_settings_measure_anew(scan, trained, pretrained, prompts, tmp_path):
    arguments = (trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    assert len(scan(*arguments)[1]) == 8
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(CONFIG | {"alerts": {"max_p": 0.5}, "signals": {"smooth": 1}}), encoding="utf-8")
    assert scan(*arguments, settings=str(other))[1] == []  # judged differently, measured the same
    other.write_text(json.dumps(CONFIG | {"seed": 3}), encoding="utf-8")
    assert len(scan(*arguments, settings=str(other))[1]) == 8


def test_observations_survive_the_disk(pretrained, tmp_path):
    watch = Loop(pretrained, tmp_path).watch(pretrained, [Probe("a poster", seed=1), Probe("a cat", picture(0))])
    observer, cache = watch.observer, ObservationCache(tmp_path / "cache", watch.config, [], list)
    with observer.borrowed():
        observations = observer.observe(observer.probes, watch.baselines, {})
    for observation, p in zip(observations, observer.probes, strict=True):
        assert cache.read(0, p) is None
        cache.write(0, p, observation)
        again = cache.read(0, p)
        assert (again.probe, again.timesteps, again.baseline_step) == (p.probe, observation.timesteps, None)
        assert again.baseline is None
        assert again.unconditional_baseline is None
        for ours, theirs in ((again.now, observation.now), (again.unconditional, observation.unconditional)):
            assert torch.equal(ours.rho.samples, theirs.rho.samples)
            assert torch.equal(ours.epsilon, theirs.epsilon)
        assert (again.image == observation.image).all()
        assert torch.equal(again.eps, observation.eps)
        assert (again.generations is None) == (observation.generations is None) == p.probe.is_reference
        assert np.array_equal(again.generations, observation.generations)


def test_the_name_of_a_cached_observation_stands_for_what_it_depends_on(pretrained, tmp_path):
    """Another checkpoint, another file, another model behind it: each is measured anew."""
    watch = Loop(pretrained, tmp_path).watch(pretrained, [Probe("a cat", picture(0))])
    (p,) = watch.observer.probes
    history = [[0, "a", "stamp"], [2, "b", "stamp"]]
    others = [history[1:], [[0, "other", "stamp"], history[1]], [[0, "a", "rewritten"], history[1]]]
    files = {ObservationCache(tmp_path, watch.config, ["sd-1-5"], lambda h=h: h).file(2, p) for h in (history, *others)}
    files.add(ObservationCache(tmp_path, watch.config, ["sd-2-1"], lambda: history).file(2, p))
    assert len(files) == 5
