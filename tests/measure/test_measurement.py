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
    OPTIONAL,
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


def parts_of(o: Observation) -> dict:
    return vars(o) | {name: (m.rho.samples, m.epsilon) for name, m in o.measurements.items()}


@pytest.mark.parametrize(
    "missing",
    [(), ("unconditional_baseline", "baseline_step", "image"), ("baseline", "eps", "generations"), OPTIONAL],
)
def test_an_observation_comes_back_from_its_tensors(missing):
    """Through the bytes of a safetensors file, with any part missing."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    whole = Observation(
        Probe("a cat", name="cat", seed=3),
        (61.0, 301.5),
        **{part: measured(seed) for seed, part in enumerate(PARTS)},
        baseline_step=40,
        eps=torch.randn(2, 3, 4, 8, 8, generator=generator(3)),
        image=picture,
        generations=np.stack([picture, picture[::-1]]),
    )
    observation = replace(whole, **dict.fromkeys(missing))
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
