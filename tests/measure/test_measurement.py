"""Measurements and observations: to named tensors and back, and the fingerprint of what they depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from support.builders import assert_same
from support.oracles import generator

from memwatch import Probe
from memwatch.config_file import load_config
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import (
    SCREEN,
    UNCONDITIONAL,
    Measurement,
    Observation,
    fingerprint,
    fingerprints,
    observation_from_tensors,
    observation_to_tensors,
)
from memwatch.measure.prepare import PreparedProbe

PARTS = ("now", "unconditional", "baseline", "unconditional_baseline")


def measured(seed: int = 0, draws: int = 3) -> Measurement:
    """Two levels, two blocks of test vectors per draw."""
    g = generator(seed)
    rho = CurvatureMap(torch.rand(2, 2 * draws, 8, 8, generator=g))
    return Measurement(rho, torch.randn(2, draws, 4, 8, 8, generator=g))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_observation_is_finite_when_all_of_it_is(bad, part):
    good = measured()
    observation = Observation(Probe("a cat", name="cat"), (61.0, 301.0), good)
    assert replace(observation, **{part: good}).finite
    for broken in (replace(good, rho=CurvatureMap(good.rho.samples * bad)), replace(good, epsilon=bad / good.epsilon)):
        assert not replace(observation, **{part: broken}).finite


def parts_of(observation: Observation) -> dict:
    measurements = [getattr(observation, part) for part in PARTS]
    return vars(observation) | {
        part: None if m is None else (m.rho.samples, m.epsilon) for part, m in zip(PARTS, measurements, strict=True)
    }


@pytest.mark.parametrize(
    ("unconditional", "baseline", "step", "eps", "image"),
    [(True,) * 5, (True, False, False, True, False), (False, True, True, False, True), (False,) * 5],
)
def test_an_observation_comes_back_from_its_tensors(unconditional, baseline, step, eps, image):
    """Through the bytes of a safetensors file, with any part missing."""
    now = measured()
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    observation = Observation(
        Probe("a cat", name="cat", seed=3),
        (61.0, 301.5),
        now,
        unconditional=measured(1) if unconditional else None,
        baseline=measured(2) if baseline else None,
        unconditional_baseline=measured(4) if baseline and unconditional else None,
        baseline_step=40 if step else None,
        eps=torch.randn(now.epsilon.shape, generator=generator(3)) if eps else None,
        image=picture if image else None,
        generations=np.stack([picture, picture[::-1]]) if image and not eps else None,
    )
    tensors = load(save(observation_to_tensors(observation)))
    assert_same(parts_of(observation_from_tensors(tensors, observation.probe)), parts_of(observation))
    del tensors["now/epsilon"]
    with pytest.raises(KeyError, match="now/epsilon"):
        observation_from_tensors(tensors, observation.probe)


IMAGE = np.zeros((16, 16, 3), np.uint8)
SHOWN = PreparedProbe(Probe("a cat", "cat.png", name="shown"), {}, IMAGE, None)
DRAWN = PreparedProbe(Probe("a cat", name="drawn"), {}, None, None)


@pytest.mark.parametrize(
    ("overrides", "shown", "drawn"),
    [
        ({"seed": 1}, True, False),
        ({"levels": {"timesteps": [61, 141]}}, True, False),
        ({"curvature": {"vectors": 8}}, True, False),
        ({"weights": "ema"}, True, True),
        ({"precision": "loop"}, True, False),
        ({"curvature": {"batch_size": 2}}, False, False),
        ({"sampling": {"num_inference_steps": 25}}, False, False),
        ({"signals": {"smooth": 5}}, False, False),
        ({"alerts": {"max_p": 0.01}, "output_dir": "elsewhere", "every_steps": 7}, False, False),
    ],
)
def test_settings_that_change_a_measurement_change_its_fingerprint(overrides, shown, drawn):
    """Prompt probes are measured anew under earlier weights, so that only whose weights those are counts for them."""
    before, after = load_config(None), load_config(None, **overrides)
    assert (fingerprint(before, SHOWN) != fingerprint(after, SHOWN)) is shown
    assert (fingerprint(before, DRAWN) != fingerprint(after, DRAWN)) is drawn


def test_every_probe_and_each_of_its_measurements_has_a_fingerprint_of_its_own():
    config, pixel = load_config(None), IMAGE.copy()
    pixel[0, 0, 0] = 1
    dog = [replace(p, probe=replace(p.probe, prompt="a dog")) for p in (SHOWN, DRAWN)]
    images = [replace(SHOWN, image=image) for image in (pixel, IMAGE.reshape(8, 32, 3))]
    others = [*dog, *images, replace(SHOWN, probe=replace(SHOWN.probe, seed=1)), DRAWN]
    assert len({fingerprint(config, p) for p in (SHOWN, *others)}) == 7
    assert fingerprint(config, replace(SHOWN, image=IMAGE.copy())) == fingerprint(config, SHOWN)
    found = fingerprints(config, [SHOWN, DRAWN])
    ends = ("", UNCONDITIONAL, SCREEN, UNCONDITIONAL + SCREEN)
    assert set(found) == {name + end for name in ("shown", "drawn") for end in ends}
    assert len(set(found.values())) == 8
