"""The functions that signals are made of, each against numbers by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.oracles import DiagonalGaussian, full_gaussian, generator, look_at, pinned, view_of

from memwatch.measure import curvature
from memwatch.measure.curvature import CurvatureMap, diag_jacobian
from memwatch.measure.signals import (
    LOSS_FLOOR,
    RHO_FLOOR,
    collapse,
    combine_levels,
    denoising_loss,
    factor,
    free,
    log_ratio,
    mean_log_ratio,
    per_draw,
    pointwise_min,
    raw_curvature,
    score_difference,
)


def flat(*values):
    """A map of one pixel whose replicates are given."""
    return CurvatureMap(torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1))


def test_log_ratio_by_hand():
    found = log_ratio(flat(0.7, 0.9), flat(0.15, 0.25), RHO_FLOOR)
    assert (RHO_FLOOR, LOSS_FLOOR) == (0.05, 0.01)
    assert found.mean.item() == pytest.approx(math.log(0.85 / 0.25))
    # deviations: +-(0.1 / 0.85) and +-(0.05 / 0.25), paired
    assert found.sem.item() == pytest.approx(0.2 - 0.1 / 0.85)


@pytest.mark.parametrize("floor", [RHO_FLOOR, LOSS_FLOOR])
def test_log_ratio_of_next_to_nothing_is_next_to_nothing(floor):
    found = log_ratio(flat(0.2 * floor, 0.2 * floor), flat(0.0, 0.0), floor)
    assert found.mean.item() == pytest.approx(math.log(1.2))  # and not infinite
    assert log_ratio(flat(1.0, 1.0), flat(0.0, 0.0), floor).mean.item() == pytest.approx(math.log(1 + 1 / floor))
    negative = log_ratio(flat(15 * floor, 15 * floor), flat(-0.2, 0.1), floor)  # a negative estimate is no freedom
    assert negative.mean.item() == pytest.approx(math.log(16))


def test_score_difference_by_hand():
    now, baseline = torch.zeros(1, 2, 2, 1, 1), torch.zeros(1, 2, 2, 1, 1)
    now[0, 0, :, 0, 0], baseline[0, 1, :, 0, 0] = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0])
    found = score_difference(now, baseline)
    assert found.samples.shape == (1, 2, 1, 1)
    assert found.samples.flatten().tolist() == [5.0, 2.0]
    assert found.mean.item() == 3.5


def test_denoising_loss_by_hand():
    """The mean over channels of the squared error, one replicate per draw."""
    eps = torch.tensor([1.0, -1.0]).reshape(1, 1, 2, 1, 1).expand(1, 2, 2, 1, 1)
    epsilon = torch.stack([eps[:, 0], eps[:, 0] + torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)], 1)
    found = denoising_loss(eps, epsilon)
    assert found.samples.shape == (1, 2, 1, 1)
    assert found.samples.flatten().tolist() == [0.0, 5.0]


def test_raw_curvature_and_factor():
    assert raw_curvature(flat(0.25, 0.75)).samples.flatten().tolist() == [0.75, 0.25]
    assert factor(math.log(5)) == pytest.approx(5)
    assert math.isfinite(factor(1e9))


def test_free_by_hand():
    assert free(flat(0.3, 0.5)).item()  # 0.4 against 2 * 0.1
    assert not free(flat(0.0, 0.4)).item()  # 0.2 against 2 * 0.2
    assert not free(flat(0.0005, 0.0005)).item()
    assert not free(flat(0.5)).item()  # no error bar, no judgement
    assert free(flat(0.0, 0.4), z=0.9).item()


def levels_of(rows):
    """``rows[level][pixel]`` -> three levels, two replicates that differ by +-(level + 1) / 10."""
    means = torch.tensor(rows)
    wiggle = torch.arange(1, len(rows) + 1)[:, None] / 10
    return CurvatureMap(torch.stack([means - wiggle, means + wiggle], 1)[:, :, None, :])


ROWS = [[1.0, 3.0, 0.0, -1.0], [2.0, 0.0, 4.0, -2.0], [5.0, 2.0, 3.0, -3.0]]


@pytest.mark.parametrize(
    ("how", "expected", "sems"),
    [
        ("adjacent_min", [2.0, 0.0, 3.0, -2.0], [0.2, 0.2, 0.3, 0.2]),
        ("max", [5.0, 3.0, 4.0, -1.0], [0.3, 0.1, 0.2, 0.1]),
        ("mean", [8 / 3, 5 / 3, 7 / 3, -2.0], [0.2, 0.2, 0.2, 0.2]),
    ],
)
def test_combine_levels_by_hand(how, expected, sems):
    levels = levels_of(ROWS)
    found = combine_levels(levels, how)
    assert found.samples.shape == (2, 1, 4)
    torch.testing.assert_close(found.mean[0], torch.tensor(expected))
    torch.testing.assert_close(found.sem[0], torch.tensor(sems))


@pytest.mark.parametrize("how", ["adjacent_min", "mean", "max"])
def test_one_level_stands_for_itself(how):
    levels = levels_of(ROWS[:1])
    assert torch.equal(combine_levels(levels, how).samples, levels.samples[0])


def test_per_draw_is_the_mean_over_a_draws_blocks():
    many = CurvatureMap(torch.tensor([1.0, 2.0, 3.0, 7.0, 8.0, 9.0]).reshape(1, 6, 1, 1))
    assert per_draw(many, 2).samples.flatten().tolist() == [2, 8]


def test_an_unknown_way_to_combine_is_refused():
    with pytest.raises(ValueError, match="'median'.*adjacent_min"):
        combine_levels(CurvatureMap(torch.zeros(2, 2, 1, 1)), "median")


def test_mean_log_ratio_has_one_replicate_per_draw():
    found = mean_log_ratio(flat(1.0, 2.0, 3.0, 7.0), flat(0.5, 3.0))
    assert found.samples.flatten().tolist() == [1.0, 4.0]


def test_the_smaller_of_maps_with_unlike_replicates_keeps_its_own_error():
    a, b = flat(1.0, 2.0, 3.0, 4.0), flat(0.5, 1.5)
    found = pointwise_min(a, b)
    assert found.samples.shape == (1, 4, 1, 1)
    assert (found.mean.item(), found.sem.item()) == pytest.approx((1.0, b.sem.item()))
    found = pointwise_min(a, flat(8.0, 9.0))
    assert (found.mean.item(), found.sem.item()) == pytest.approx((2.5, a.sem.item()))


# --- errors


def test_collapse_is_in_range_and_signed():
    view = view_of((141,), 2)
    baseline, now = (
        look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view),
        look_at(DiagonalGaussian(pinned(torch.ones(4, 8, 8))), view),
    )
    assert collapse(baseline.rho, now.rho).mean.min() >= -1e-5
    assert collapse(now.rho, baseline.rho).mean.max() <= 1e-5
    assert collapse(baseline.rho, now.rho).mean.max() <= 1


@pytest.mark.parametrize("signal", [collapse, partial(log_ratio, floor=RHO_FLOOR)], ids=["collapse", "log_ratio"])
@pytest.mark.parametrize("smooth", [1, 3])
def test_paired_error_is_the_spread_over_seeds(signal, smooth):
    """200 independent sets of Rademacher vectors on two models that are nearly one.

    The reported error is the true one, and of the collapse it is small.
    """
    timestep, view = 301, view_of((301,), shape=(4, 4, 4))
    baseline, now = full_gaussian(), full_gaussian()
    with torch.no_grad():
        now.covariance.mul_(0.8)
    alpha, sigma = baseline.alpha_sigma(torch.tensor([timestep]))
    x = view.noisy_latents[0].double()
    v = curvature.test_vectors(200 * 16, (4, 4, 4), generator(5))[:, None].double()
    rho = []
    for oracle in (baseline, now):
        products = diag_jacobian(lambda x, oracle=oracle: oracle.eps(x, alpha, sigma), x, v)
        rho.append((1 - sigma * products)[:, 0].mean(1).reshape(200, 16, 4, 4))
    pairs = [(CurvatureMap(b).smooth(smooth), CurvatureMap(a).smooth(smooth)) for b, a in zip(*rho, strict=True)]
    found = [signal(b, a) for b, a in pairs]
    true = torch.stack([m.mean for m in found]).std(0)
    reported = torch.stack([m.sem for m in found]).square().mean(0).sqrt()
    ratio = reported / true
    assert ratio.min() > 0.7
    assert ratio.max() < 1.4
    if signal is collapse:
        unpaired = torch.stack([(b.sem**2 + a.sem**2) for b, a in pairs]).mean(0).sqrt()
        assert (reported < 0.5 * unpaired).all()
