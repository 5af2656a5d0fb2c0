"""Test vectors, Hutchinson's estimate of a diagonal, and maps that carry their error."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.oracles import generator
from torch import nn

from memwatch.measure import curvature
from memwatch.measure.curvature import CurvatureMap, value_and_diag_jacobian


def network(channels=2):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 3 * channels, 3, padding=1), nn.Tanh(), nn.Conv2d(3 * channels, channels, 3, padding=1)
    return nn.Sequential(*layers).double()


def cancels(v):
    """Whether a pair of coordinates cancels in the mean over the vectors, bool ``(n, n)``."""
    v = v.flatten(1)
    return v.T @ v == 0


@pytest.mark.parametrize("channels", [1, 3, 4, 16])
@pytest.mark.parametrize(("tile", "apart"), [(2, 2**0.5), (4, 2), (8, 8**0.5), (16, 4)])
def test_pixels_that_do_not_cancel_are_far_apart(tile, apart, channels):
    v = curvature.test_vectors(tile, (channels, 8, 8), generator(), tile=tile)
    pixels = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    distance = torch.cdist(pixels, pixels) + 100 * torch.eye(64)
    for channel in range(channels):
        assert distance[~cancels(v[:, channel])].min() == pytest.approx(apart)


@pytest.mark.parametrize(("channels", "tile"), [(2, 2), (3, 4), (4, 4), (4, 8), (16, 16), (16, 32)])
def test_channels_of_one_pixel_cancel(channels, tile):
    for pixel in curvature.test_vectors(tile, (channels, 8, 8), generator(), tile=tile).flatten(2).unbind(2):
        assert torch.equal(cancels(pixel), ~torch.eye(channels, dtype=torch.bool))


@pytest.mark.parametrize("half", [1, 2, 4, 8])
def test_the_first_vectors_of_a_block_are_a_smaller_block(half):
    """Up to signs, which are random: the same pairs cancel. So the first noise draws are as good as a look at them."""
    block = curvature.test_vectors(16, (4, 8, 8), generator(), tile=16)
    assert torch.equal(cancels(block[:half]), cancels(curvature.test_vectors(half, (4, 8, 8), generator(1), tile=half)))


@pytest.mark.parametrize("tile", [1, 8, 16])
def test_vectors_are_unbiased(tile):
    """E[v v^T] = 1: off-diagonal means of 16,000 products of signs are below 5 standard errors of that many blocks."""
    v = curvature.test_vectors(16_000, (4, 2, 4), generator(), tile=tile)
    assert torch.equal(v[:11], curvature.test_vectors(11, (4, 2, 4), generator(), tile=tile))  # the first ones of more
    v = v.flatten(1)
    second = v.T @ v / len(v)
    assert torch.equal(second.diagonal(), torch.ones(32))
    worst = (second - torch.eye(32)).abs().max()
    assert worst < 5 * (tile / len(v)) ** 0.5


@pytest.mark.parametrize(("channels", "tile", "times"), [(1, 8, 3), (4, 32, 1.5)])
def test_blocks_beat_independent_vectors_on_a_local_jacobian(channels, tile, times):
    """Variance of the estimated map at the same number of products; this network sees 5x5 pixels at a time."""
    fn, x = network(channels), torch.randn(1, channels, 8, 8, generator=generator(), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda flat: fn(flat.reshape(x.shape)).flatten(), x.flatten())
    variance = {}
    for size in (1, tile):
        draws = [curvature.test_vectors(tile, x.shape[1:], generator(seed), tile=size) for seed in range(100)]
        v = torch.stack(draws).flatten(2).double()
        error = (v * (v @ jacobian)).mean(1) - jacobian.diagonal()
        variance[size] = error.unflatten(1, x.shape[1:]).mean(1).square().mean()
    assert variance[tile] < variance[1] / times


def test_products_equal_an_obvious_slow_twin():
    fn, x = network(), torch.randn(3, 2, 4, 4, generator=generator(), dtype=torch.float64)
    v = torch.stack([curvature.test_vectors(5, (2, 4, 4), generator(i)) for i in range(3)], 1).double()
    value, products = value_and_diag_jacobian(fn, x, v)
    assert products.shape == v.shape
    torch.testing.assert_close(value, fn(x).detach(), rtol=0, atol=0)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(fn, x[i : i + 1]).reshape(32, 32)
        expected = v[:, i].flatten(1) * (v[:, i].flatten(1) @ jacobian)
        torch.testing.assert_close(products[:, i].flatten(1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_all_unit_sign_patterns_are_exact(mode):
    """The mean over every one of the 2^n sign vectors is the diagonal, whatever the (asymmetric) Jacobian."""
    matrix = torch.randn(4, 4, generator=generator(), dtype=torch.float64)
    v = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64).reshape(16, 1, 1, 2, 2)
    with mode():
        x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
        products = value_and_diag_jacobian(lambda x: (x.flatten(1) @ matrix.T).reshape(x.shape), x, v)[1]
    torch.testing.assert_close(products.mean(0).flatten(), matrix.diagonal())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="tile must be a power of two, got 6"):
        curvature.test_vectors(16, (4, 8, 8), generator(), tile=6)
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"vectors must have shape \(K, 1, 2, 4, 4\), got \(3, 2, 4, 4\)"):
        value_and_diag_jacobian(lambda x: x, x, torch.ones(3, 2, 4, 4))
    with pytest.raises(ValueError, match=r"fn must return the shape of its input \(1, 2, 4, 4\), got \(1, 1, 4, 4\)"):
        value_and_diag_jacobian(lambda x: x[:, :1], x, torch.ones(3, 1, 2, 4, 4))


def test_one_forward_pass_per_vector_gives_the_same_products():
    """As FSDP1 and ZeRO-3 need it."""
    calls = []

    def counted(x):
        calls.append(len(x))
        return fn(x)

    fn, x = network(), torch.randn(2, 2, 4, 4, generator=generator(), dtype=torch.float64)
    v = torch.stack([curvature.test_vectors(3, (2, 4, 4), generator(i)) for i in range(2)], 1).double()
    expected = value_and_diag_jacobian(counted, x, v)
    assert all(tensor.grad is None for tensor in (x, *fn.parameters()))
    found = value_and_diag_jacobian(counted, x, v, reuse_graph=False)
    assert calls == [2] * (1 + 3)
    assert all(map(torch.equal, found, expected))


def test_mean_and_sem_by_hand():
    values = CurvatureMap(torch.tensor([1.0, 2.0, 6.0]).reshape(3, 1, 1))
    assert values.sem.item() == pytest.approx((7 / 3) ** 0.5)  # variance (4 + 1 + 9) / 2 = 7, over n = 3
    assert CurvatureMap(torch.ones(1, 2, 2)).sem.isposinf().all()  # one replicate has no error bar


def test_smooth_by_hand():
    spike = torch.zeros(2, 3, 4)
    spike[0, 0, 0], spike[1, 1, 1] = 12.0, 18.0
    smooth = CurvatureMap(spike).smooth(3).samples
    torch.testing.assert_close(smooth[0], torch.tensor([[3.0, 2, 0, 0], [2, 12 / 9, 0, 0], [0, 0, 0, 0]]))
    torch.testing.assert_close(smooth[1], torch.tensor([[4.5, 3, 3, 0], [3, 2, 2, 0], [4.5, 3, 3, 0]]))
