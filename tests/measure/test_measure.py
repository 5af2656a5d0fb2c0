"""Measuring a view: the true retained variance of known laws, whatever the prediction type, the batch or the memory."""

from __future__ import annotations

import pytest
import torch
from support.oracles import (
    BLOCK,
    LEVELS,
    DiagonalGaussian,
    full_gaussian,
    look_at,
    mixture,
    pinned,
    spread,
    view_of,
)


def test_diagonal_gaussian_is_exact_with_one_vector():
    oracle, view = DiagonalGaussian(spread(), mean=spread(seed=1)), view_of(LEVELS, draws=2)
    found = look_at(oracle, view, vectors=1, tile=1)
    assert found.rho.samples.shape == (3, 2, 8, 8)
    for level, timestep in enumerate(LEVELS):
        expected = oracle.rho(timestep).mean(0).float()
        for draw in range(2):
            torch.testing.assert_close(found.rho.samples[level, draw], expected, rtol=1e-4, atol=1e-5)


def test_oracle_obeys_second_order_tweedie():
    """Without the estimator: the Jacobian of epsilon and the posterior covariance agree."""
    oracle, view = full_gaussian(), view_of((141,), shape=(4, 4, 4))
    alpha, sigma = oracle.alpha_sigma(torch.tensor([141]))
    x = view.noisy_latents[0].double()
    jacobian = torch.autograd.functional.jacobian(lambda x: oracle.eps(x, alpha, sigma).flatten(), x).reshape(64, 64)
    torch.testing.assert_close((1 - sigma.item() * jacobian.diagonal()).reshape(4, 4, 4), oracle.rho(141))


@pytest.mark.parametrize("tile", [1, 16])
def test_rotated_gaussian_within_four_standard_errors(tile):
    oracle = full_gaussian()
    rho = look_at(oracle, view_of(LEVELS, shape=(4, 4, 4)), vectors=1024, tile=tile).rho
    assert rho.samples.shape[1] == 1024 // tile
    for level, timestep in enumerate(LEVELS):
        away = (rho.mean[level] - oracle.rho(timestep).mean(0)).abs()
        assert (away <= 4 * rho.sem[level]).all()
        assert rho.sem[level].max() < 0.02


def test_mixture_within_four_standard_errors():
    oracle, view = mixture(pinned(spread())), view_of((301,))
    rho = look_at(oracle, view, vectors=1024, tile=8).rho
    expected = oracle.rho(301, view.noisy_latents[0, 0]).mean(0)
    away = (rho.mean[0] - expected).abs()
    assert (away <= 4 * rho.sem[0] + 1e-6).all()
    assert rho.mean[0][BLOCK[1:]].abs().max() < 1e-5  # pinned
    assert expected.max() > 0.5


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "flow"])
def test_one_map_whatever_the_prediction_type(prediction_type):
    variance, mean = spread(), spread(seed=1)
    expected = look_at(DiagonalGaussian(variance, mean), view_of(LEVELS, 2))
    view = view_of(LEVELS, 2, flow=prediction_type == "flow")
    found = look_at(DiagonalGaussian(variance, mean, prediction_type), view)
    torch.testing.assert_close(found.rho.samples, expected.rho.samples, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.epsilon, expected.epsilon, rtol=1e-4, atol=1e-4)


def test_a_block_spans_the_noise_draws_of_a_level():
    """The Jacobian of a Gaussian law is the same at every draw: 4 draws of 16 vectors are exact on 64 coordinates.

    The error bar does not know: it is that of independent draws, which is more.
    """
    oracle, view = full_gaussian(), view_of(LEVELS, draws=4, shape=(4, 4, 4))
    block, independent = (look_at(oracle, view, vectors=16, tile=tile).rho for tile in (64, 1))
    assert block.samples.shape == (3, 4, 4, 4)
    for level, timestep in enumerate(LEVELS):
        expected = oracle.rho(timestep).mean(0).float()
        torch.testing.assert_close(block.mean[level], expected, rtol=1e-4, atol=1e-4)
    assert (independent.mean - block.mean).abs().max() > 1e-3
    assert block.sem.mean() > 0.5 * independent.sem.mean()


def test_batching_changes_nothing():
    oracle, view = mixture(spread()), view_of(LEVELS, 3)
    one, many = (look_at(oracle, view, vectors=4, tile=4, batch_size=size) for size in (1, 5))
    torch.testing.assert_close(one.rho.samples, many.rho.samples, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.epsilon, many.epsilon, rtol=1e-5, atol=1e-6)


class Small(DiagonalGaussian):
    """Memory runs out above ``limit`` noisy latents; ``calls`` are the sizes of the batches that it was asked for."""

    def __init__(self, limit: int) -> None:
        super().__init__(spread())
        self.limit, self.calls = limit, []

    def forward(self, sample, *args, **kwargs):
        self.calls.append(len(sample))
        if len(sample) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(sample, *args, **kwargs)


def test_when_memory_runs_out_the_batch_is_halved():
    view, oracle = view_of(LEVELS, 3), Small(limit=2)
    found = look_at(oracle, view, batch_size=8)
    assert oracle.calls == [8, 4, 2, 2, 2, 2, 1]
    expected = look_at(DiagonalGaussian(spread()), view, batch_size=2)
    assert torch.equal(found.rho.samples, expected.rho.samples)
    assert torch.equal(found.epsilon, expected.epsilon)
    with pytest.raises(torch.OutOfMemoryError):
        look_at(Small(limit=0), view)


def test_measuring_leaves_no_gradient():
    oracle = mixture(spread())
    look_at(oracle, view_of((61,)), vectors=2, tile=2)
    assert all(p.grad is None for p in oracle.parameters())
    assert all(p.requires_grad for p in oracle.parameters())
