"""Measurements and observations: their first draws, some of their levels, and to named tensors and back."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from support.builders import assert_same
from support.oracles import LEVELS, full_gaussian, generator, look_at, view_of

from memwatch import Probe
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import (
    Measurement,
    Observation,
    from_tensors,
    observation_from_tensors,
    observation_to_tensors,
    to_tensors,
)
from memwatch.measure.views import View


def measured(seed: int = 0, draws: int = 3) -> Measurement:
    """Two levels, two blocks of test vectors per draw."""
    g = generator(seed)
    rho = CurvatureMap(torch.rand(2, 2 * draws, 8, 8, generator=g))
    return Measurement(rho, torch.randn(2, draws, 4, 8, 8, generator=g))


@pytest.mark.parametrize(("tile", "replicates"), [(4, 2), (16, 1), (32, 1)])
@pytest.mark.parametrize("draws", [1, 2, 4])
def test_first_draws_are_what_looking_at_those_draws_alone_gives(draws, tile, replicates):
    oracle, view = full_gaussian(), view_of(LEVELS, draws=4, shape=(4, 4, 4))
    some = View(view.key, view.noisy_latents[:, :draws], view.timesteps, view.eps, view.conditioning)
    found, expected = look_at(oracle, view, tile=tile).first_draws(draws), look_at(oracle, some, tile=tile)
    assert found.draws == expected.draws == draws
    assert found.rho.samples.shape == expected.rho.samples.shape == (3, replicates * draws, 4, 4)
    torch.testing.assert_close(found.rho.samples, expected.rho.samples, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.epsilon, expected.epsilon, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("indices", [[0], [2, 0], [0, 1, 2]])
def test_at_levels_is_what_looking_at_those_levels_alone_gives(indices):
    oracle, view = full_gaussian(), view_of(LEVELS, draws=2, shape=(4, 4, 4))
    timesteps = tuple(LEVELS[i] for i in indices)
    some = View(view.key, view.noisy_latents[indices], timesteps, view.eps, view.conditioning)
    found, expected = look_at(oracle, view, tile=4).at_levels(indices), look_at(oracle, some, tile=4)
    assert found.rho.samples.shape == expected.rho.samples.shape == (len(indices), 4, 4, 4)
    torch.testing.assert_close(found.rho.samples, expected.rho.samples, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.epsilon, expected.epsilon, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_finite(bad):
    rho, epsilon = torch.ones(1, 2, 2, 2), torch.ones(1, 2, 4, 2, 2)
    assert Measurement(CurvatureMap(rho), epsilon).finite
    for tensor in (rho, epsilon):
        broken = tensor.clone()
        broken.view(-1)[0] = bad
        parts = (CurvatureMap(broken), epsilon) if tensor is rho else (CurvatureMap(rho), broken)
        assert not Measurement(*parts).finite


def test_an_observation_is_finite_when_all_of_it_is():
    good = measured()
    bad = Measurement(CurvatureMap(good.rho.samples * math.nan), good.epsilon)
    observation = Observation(Probe("a cat", name="cat"), (61.0, 301.0), good)
    assert observation.name == "cat"
    assert observation.finite
    for part in ("now", "unconditional", "baseline", "unconditional_baseline"):
        assert replace(observation, **{part: good}).finite
        assert not replace(observation, **{part: bad}).finite


def test_the_ledger_gives_back_what_was_measured():
    one, two = measured(0), measured(1)
    tensors = to_tensors({"cat": one, "control/cat": two})
    for name, expected in {"cat": one, "control/cat": two}.items():
        found = from_tensors(tensors, name)
        assert torch.equal(found.rho.samples, expected.rho.samples)
        assert torch.equal(found.epsilon, expected.epsilon)
    assert from_tensors(tensors, "dog") is None


def parts_of(observation: Observation) -> dict:
    parts = ("now", "unconditional", "baseline", "unconditional_baseline")
    measurements = [getattr(observation, part) for part in parts]
    return {
        "probe": observation.probe,
        "timesteps": observation.timesteps,
        "measured": [None if m is None else (m.rho.samples, m.epsilon) for m in measurements],
        "baseline_step": observation.baseline_step,
        "eps": observation.eps,
        "image": observation.image,
        "generations": observation.generations,
    }


@pytest.mark.parametrize(
    ("unconditional", "baseline", "step", "eps", "image"),
    [values for values in itertools.product([True, False], repeat=5) if values[1] or not values[2]],
)
def test_an_observation_comes_back_from_its_tensors(unconditional, baseline, step, eps, image):
    """Through the bytes of a safetensors file, with any part missing."""
    now = measured()
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    observation = Observation(
        Probe("a cat", name="cat", seed=3),
        (61.0, 301.5),
        now,
        unconditional=measured(1, draws=1) if unconditional else None,
        baseline=measured(2) if baseline else None,
        unconditional_baseline=measured(4, draws=1) if baseline and unconditional else None,
        baseline_step=40 if step else None,
        eps=torch.randn(now.epsilon.shape, generator=generator(3)) if eps else None,
        image=picture if image else None,
        generations=np.stack([picture, picture[::-1]]) if image and not eps else None,
    )
    found = observation_from_tensors(load(save(observation_to_tensors(observation))), observation.probe)
    assert_same(parts_of(found), parts_of(observation))


@pytest.mark.parametrize("missing", ["now/epsilon", "timesteps"])
def test_an_observation_without_its_measurement_is_no_observation(missing):
    observation = Observation(Probe("a cat", name="cat"), (61.0, 301.0), measured())
    tensors = observation_to_tensors(observation)
    del tensors[missing]
    with pytest.raises(KeyError, match=missing):
        observation_from_tensors(tensors, observation.probe)
