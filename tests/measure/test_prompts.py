"""Prompt probes: their generations are looked at as the images of reference probes are, or their last sampling step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.builders import CONFIG, Loop, assert_same

import memwatch.measure.observer
import memwatch.measure.snapshots
from memwatch import Probe
from memwatch.measure.images import decode_latents
from memwatch.measure.measure import Batches
from memwatch.measure.sampling import generate
from memwatch.measure.views import fixed_noise

LAST_STEP = {"look": "last_step", "seeds": 1, "num_inference_steps": 3, "guidance_scale": 3.0}
POSTER = Probe("a red poster", name="poster", seed=3)


def watch_of(pretrained, folder, **overrides):
    """A loop that moves its weights, and its watch of one prompt."""
    loop = Loop(pretrained, folder, lr=3e-2)
    return loop, loop.watch(pretrained, [POSTER], **overrides)


def observed(watch):
    with watch.observer.borrowed():
        (observation,) = watch.observer.observe(watch.observer.probes, watch.baselines, {})
    return observation


def test_generations_are_looked_at_as_known_images(pretrained, tmp_path):
    """The view of a prompt with one seed equals that of a reference probe whose latents are the generation."""
    _, watch = watch_of(pretrained, tmp_path, sampling=CONFIG["sampling"] | {"seeds": 1})
    observer, (p,) = watch.observer, watch.observer.probes
    where = (observer.denoiser, observer.parts.scheduler, watch.config.sampling)
    with observer.borrowed():
        latents = generate(*where, [3], p.conditioning, observer.unconditional, observer.side, Batches(1))
        view, generations = observer.view(p)
        known = replace(p, probe=replace(p.probe, image="known.png"), latents=latents[0])
        expected, nothing = observer.view(known)
        assert np.array_equal(generations[0], decode_latents(latents[0], observer.parts.vae))
        now, of_known = (observer.measure(v) for v in (view, expected))
        assert_same(now.epsilon, of_known.epsilon)
    assert nothing is None
    assert_same(view.noisy_latents, expected.noisy_latents)
    assert_same(view.eps, expected.eps)
    assert view.timesteps == watch.config.levels.timesteps


def test_all_seeds_are_in_one_observation(pretrained, tmp_path, monkeypatch):
    sampled = []
    real = memwatch.measure.observer.generate
    monkeypatch.setattr(memwatch.measure.observer, "generate", lambda *a: sampled.append(list(a[3])) or real(*a))
    _, watch = watch_of(pretrained, tmp_path)
    observation = observed(watch)
    assert watch.config.seeds == watch.config.levels.draws == 2
    assert sampled == [[3, 4]]  # once, and for the pictures as well
    assert observation.generations.shape == (2, 16, 16, 3)
    assert not np.array_equal(*observation.generations)
    assert np.array_equal(observation.image, observation.generations[0])
    assert observation.now.epsilon.shape == observation.eps.shape == (2, 2, 4, 8, 8)
    assert_same(observation.eps, fixed_noise("poster", (2, 2, 4, 8, 8), 0))
    again = observed(watch)
    assert_same(again.now.epsilon, observation.now.epsilon)
    assert np.array_equal(again.generations, observation.generations)


def test_prompts_with_one_seed_share_generations_under_noise_of_their_own(pretrained, tmp_path, monkeypatch):
    sampled = []
    real = memwatch.measure.observer.generate
    monkeypatch.setattr(memwatch.measure.observer, "generate", lambda *a: sampled.append(list(a[3])) or real(*a))
    loop = Loop(pretrained, tmp_path)
    others = [replace(POSTER, name="same"), replace(POSTER, name="later", seed=4), Probe("a cat", name="cat", seed=3)]
    watch = loop.watch(pretrained, [POSTER, *others])
    with watch.observer.borrowed():
        one, same, later, cat = watch.observer.observe(watch.observer.probes, watch.baselines, {})
    assert sampled == [[3, 4], [4, 5], [3, 4]]
    assert np.array_equal(one.generations, same.generations)
    assert not np.array_equal(one.generations, later.generations)
    assert not np.array_equal(one.generations, cat.generations)
    assert not torch.equal(one.eps, same.eps)


@pytest.mark.parametrize("terms", ["loss", "variance", "both"])
def test_all_terms_and_comparisons_exist(terms, pretrained, tmp_path):
    loop, watch = watch_of(pretrained, tmp_path, signals={"terms": terms}, strict=True)
    (report,) = loop.run(watch, 2)
    (finding,) = report.findings
    assert finding.signals.decisive.mean.abs().max() > 0
    assert finding.observation.baseline_step == 0
    assert finding.observation.unconditional_baseline is not None
    assert {"loss_log_ratio", "collapse", "collapse_null"} <= set(finding.signals.maps())
    assert not torch.equal(finding.observation.baseline.epsilon, finding.observation.now.epsilon)


def test_the_last_step_knows_no_noise(pretrained, tmp_path):
    loop, watch = watch_of(pretrained, tmp_path, sampling=LAST_STEP, strict=True)
    (report,) = loop.run(watch, 2)
    (finding,) = report.findings
    assert finding.observation.eps is None
    assert finding.observation.generations.shape == (1, 16, 16, 3)
    assert finding.observation.timesteps == (1,)
    assert "loss_log_ratio" not in finding.signals.maps()
    assert "collapse" in finding.signals.maps()


def test_earlier_weights_are_read_and_swapped_in_once_for_all_prompts(pretrained, tmp_path, monkeypatch):
    reads, swaps = [], []
    load, swapped = memwatch.measure.snapshots.read_safetensors, memwatch.measure.observer.swapped
    monkeypatch.setattr(memwatch.measure.snapshots, "read_safetensors", lambda file: reads.append(file) or load(file))
    monkeypatch.setattr(memwatch.measure.observer, "swapped", lambda *a: swaps.append(a) or swapped(*a))
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    probes = [replace(POSTER, name=f"{i}", seed=i) for i in range(4)]
    watch = loop.watch(pretrained, probes, controls=["a cat", "a dog"], strict=True, snapshots={"on_disk": True})
    loop.run(watch, 2)
    with watch.observer.borrowed():
        reads.clear()
        swaps.clear()
        found = watch.observer.observe(watch.observer.probes, watch.baselines, {})
    assert len(found) == 6
    assert {o.baseline_step for o in found} == {0}
    assert len(reads) == len(swaps) == 1
