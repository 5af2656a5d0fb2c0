import math

import pytest
import torch
from support.oracles import DiagonalGaussian, FullGaussian, GaussianMixture, look_at, view_of

from memwatch import curvature
from memwatch.judge.regions import find_regions
from memwatch.measure.curvature import CurvatureMap, diag_jacobian
from memwatch.measure.signals import (
    FLOOR,
    Measurement,
    collapse,
    combine_levels,
    compute_signals,
    factor,
    free,
    log_ratio,
    loss_log_ratio,
    per_draw,
    raw_curvature,
    score_difference,
    smaller,
)

LEVELS = (61, 141, 301)
BLOCK = (slice(None), slice(2, 6), slice(3, 8))  # rows 2..5, columns 3..7
BOX = (24, 16, 64, 48)  # the same in pixels, 8 a latent pixel


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spread(shape=(4, 8, 8), seed=0):
    return 0.2 + torch.rand(shape, generator=generator(seed))


def pinned(variance):
    variance = variance.clone()
    variance[..., *BLOCK] = 0
    return variance


def full_gaussian(seed=0, spread=0.6):
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator(seed), dtype=torch.float64))[0]
    eigenvalues = spread * torch.rand(64, generator=generator(seed + 1), dtype=torch.float64)
    return FullGaussian(basis @ eigenvalues.diag() @ basis.T, (4, 4, 4))


def mixture(variance, seed=0):
    """Two equally likely kinds of data that differ outside the block."""
    means = 0.3 * torch.randn(2, *variance.shape, generator=generator(seed))
    means[..., *BLOCK] = 0.7
    return GaussianMixture(means, torch.stack([variance, variance]), torch.tensor([0.5, 0.5]))


# --- oracles


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


def test_batching_changes_nothing():
    oracle, view = mixture(spread()), view_of(LEVELS, 3)
    one, many = (look_at(oracle, view, vectors=4, tile=4, batch_size=size) for size in (1, 5))
    torch.testing.assert_close(one.rho.samples, many.rho.samples, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.epsilon, many.epsilon, rtol=1e-5, atol=1e-6)


def test_measuring_leaves_no_gradient():
    oracle = mixture(spread())
    look_at(oracle, view_of((61,)), vectors=2, tile=2)
    assert all(p.grad is None for p in oracle.parameters())
    assert all(p.requires_grad for p in oracle.parameters())


@pytest.mark.parametrize("make", [DiagonalGaussian, mixture])
@pytest.mark.parametrize("combine", ["adjacent_min", "mean", "max"])
def test_a_pinned_block_is_found_where_it_is(make, combine):
    """3x3 smoothing leaves 1/3 of the freedom on the block's edges and takes 1/3 next to it: a threshold between finds the block."""
    view = view_of(LEVELS, 4)
    baseline, now = (
        look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view),
        look_at(make(pinned(torch.ones(4, 8, 8))), view),
    )
    signals = compute_signals(now, baseline, None, view.eps, decide="log_ratio", combine=combine)
    regions, _ = find_regions(signals.decisive, math.log(1.8), min_area=0.01, scale=8)
    assert [region.box for region in regions] == [BOX]
    assert factor(regions[0].peak) > 3  # pinned altogether, up to the floor
    assert signals.collapse.mean[:, 3:5, 4:8].min() > 0.5


@pytest.mark.parametrize("make", [DiagonalGaussian, mixture])
@pytest.mark.parametrize("combine", ["adjacent_min", "mean", "max"])
def test_a_broad_model_shows_no_region(make, combine):
    view = view_of(LEVELS, 4)
    baseline, now = look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view), look_at(make(0.9 * torch.ones(4, 8, 8)), view)
    signals = compute_signals(now, baseline, None, view.eps, combine=combine)
    assert find_regions(signals.decisive, math.log(2), min_area=0.0, scale=8)[0] == ()
    assert find_regions(compute_signals(baseline, now, None, view.eps).decisive, math.log(2))[0] == ()


def test_collapse_is_in_range_and_signed():
    view = view_of((141,), 2)
    baseline, now = (
        look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view),
        look_at(DiagonalGaussian(pinned(torch.ones(4, 8, 8))), view),
    )
    assert collapse(baseline.rho, now.rho).mean.min() >= -1e-5
    assert collapse(now.rho, baseline.rho).mean.max() <= 1e-5
    assert collapse(baseline.rho, now.rho).mean.max() <= 1


def test_self_comparison_is_exactly_zero():
    oracle, view = mixture(pinned(spread())), view_of(LEVELS, 2)
    a, b, null = (look_at(oracle, view) for _ in range(3))
    for decide in ("log_ratio", "log_ratio_null", "loss_log_ratio", "both", "both_baselines"):
        signals = compute_signals(a, b, null, view.eps, decide=decide).maps()
        assert set(signals) == {
            "collapse",
            "log_ratio",
            "score",
            "loss_log_ratio",
            "collapse_null",
            "log_ratio_null",
            "score_null",
            "raw",
            "decisive",
        }
        for name, found in signals.items():
            if name != "raw":
                assert torch.equal(found.samples, torch.zeros_like(found.samples)), name


@pytest.mark.parametrize("signal", [collapse, log_ratio])
@pytest.mark.parametrize("smooth", [1, 3])
def test_paired_error_is_the_spread_over_seeds(signal, smooth):
    """200 independent sets of Rademacher vectors on two models that are nearly one: the reported error is the true one, and small."""
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


# --- by hand


def flat(*values):
    """A map of one pixel whose replicates are given."""
    return CurvatureMap(torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1))


def test_log_ratio_by_hand():
    found = log_ratio(flat(0.7, 0.9), flat(0.15, 0.25))
    assert FLOOR == 0.05
    assert found.mean.item() == pytest.approx(math.log(0.85 / 0.25))
    # deviations: +-(0.1 / 0.85) and +-(0.05 / 0.25), paired
    assert found.sem.item() == pytest.approx(0.2 - 0.1 / 0.85)


def test_log_ratio_of_next_to_nothing_is_next_to_nothing():
    assert log_ratio(flat(0.01, 0.01), flat(0.001, 0.001)).mean.item() == pytest.approx(math.log(0.06 / 0.051))
    assert log_ratio(flat(1.0, 1.0), flat(0.0, 0.0)).mean.item() == pytest.approx(math.log(21))
    assert log_ratio(flat(0.75, 0.75), flat(-0.2, 0.1)).mean.item() == pytest.approx(
        math.log(16)
    )  # a negative estimate is no freedom


def test_score_difference_by_hand():
    now, baseline = torch.zeros(1, 2, 2, 1, 1), torch.zeros(1, 2, 2, 1, 1)
    now[0, 0, :, 0, 0], baseline[0, 1, :, 0, 0] = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0])
    found = score_difference(now, baseline)
    assert found.samples.shape == (1, 2, 1, 1)
    assert found.samples.flatten().tolist() == [5.0, 2.0]
    assert found.mean.item() == 3.5


def test_loss_log_ratio_by_hand():
    eps = torch.zeros(1, 1, 2, 1, 1)
    found = loss_log_ratio(eps, torch.full_like(eps, 1.0), torch.tensor([1.0, 3.0]).reshape(eps.shape))
    assert found.samples.item() == pytest.approx(math.log(5))
    assert loss_log_ratio(eps, eps, eps).samples.item() == 0
    assert loss_log_ratio(eps, eps, eps + 1).samples.isfinite().all()


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
    found = combine_levels(levels, torch.ones(3, 1, 4, dtype=torch.bool), how)
    assert found.samples.shape == (2, 1, 4)
    torch.testing.assert_close(found.mean[0], torch.tensor(expected))
    torch.testing.assert_close(found.sem[0], torch.tensor(sems))


@pytest.mark.parametrize(
    ("how", "expected"),
    [("adjacent_min", [0.0, 0.0, 0.0, -1.0]), ("max", [5.0, 3.0, 3.0, 0.0]), ("mean", [2.0, 5 / 3, 1.0, -4 / 3])],
)
def test_a_level_that_is_not_free_says_nothing(how, expected):
    is_free = torch.ones(3, 1, 4, dtype=torch.bool)
    is_free[1] = False
    found = combine_levels(levels_of(ROWS), is_free, how)
    torch.testing.assert_close(found.mean[0], torch.tensor(expected))


def test_nothing_free_nothing_found():
    for how in ("adjacent_min", "mean", "max"):
        found = combine_levels(levels_of(ROWS), torch.zeros(3, 1, 4, dtype=torch.bool), how)
        assert torch.equal(found.samples, torch.zeros(2, 1, 4))


@pytest.mark.parametrize("how", ["adjacent_min", "mean", "max"])
def test_one_level_stands_for_itself(how):
    levels = levels_of(ROWS[:1])
    assert torch.equal(combine_levels(levels, torch.ones(1, 1, 4, dtype=torch.bool), how).samples, levels.samples[0])


def test_per_draw_is_the_mean_over_a_draws_blocks():
    many = CurvatureMap(torch.tensor([1.0, 2.0, 3.0, 7.0, 8.0, 9.0]).reshape(1, 6, 1, 1))
    assert per_draw(many, 2).samples.flatten().tolist() == [2, 8]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'median'.*adjacent_min"):
        combine_levels(CurvatureMap(torch.zeros(2, 2, 1, 1)), torch.ones(2, 1, 1, dtype=torch.bool), "median")
    now = look_at(DiagonalGaussian(spread()), view_of(LEVELS, 2))
    with pytest.raises(ValueError, match="'log_ration'.*log_ratio"):
        compute_signals(now, now, None, None, decide="log_ration")


def test_what_cannot_be_had_is_none():
    view = view_of(LEVELS, 2)
    now = look_at(DiagonalGaussian(spread()), view)
    assert set(compute_signals(now, None, None, None).maps()) == {"raw"}
    assert set(compute_signals(now, now, None, None).maps()) == {"collapse", "log_ratio", "score", "raw", "decisive"}
    assert compute_signals(now, now, None, None, decide="log_ratio_null").decisive is None
    assert compute_signals(now, now, None, None, decide="loss_log_ratio").decisive is None
    assert set(compute_signals(now, None, now, view.eps, decide="log_ratio_null").maps()) == {
        "collapse_null",
        "log_ratio_null",
        "score_null",
        "raw",
        "decisive",
    }


def test_both_is_the_mean_of_the_two():
    view = view_of(LEVELS, 2)
    baseline, now = (
        look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view),
        look_at(DiagonalGaussian(0.3 * torch.ones(4, 8, 8)), view),
    )
    signals = {
        d: compute_signals(now, baseline, None, view.eps, decide=d, combine="mean")
        for d in ("log_ratio", "loss_log_ratio", "both")
    }
    expected = (signals["log_ratio"].decisive.mean + signals["loss_log_ratio"].decisive.mean) / 2
    torch.testing.assert_close(signals["both"].decisive.mean, expected)
    # ``both`` of a prompt probe, where the true noise is unknown, is the log ratio alone
    alone = compute_signals(now, baseline, None, None, decide="both", combine="mean")
    assert torch.equal(alone.decisive.samples, signals["log_ratio"].decisive.samples)


def test_both_baselines_is_the_smaller_of_the_two():
    view = view_of(LEVELS, 4)
    variances = torch.ones(4, 8, 8), torch.full((4, 8, 8), 0.3), torch.ones(4, 8, 8)
    variances[2][..., :4] = 0.3  # the unconditional branch has fallen as well, on the left
    baseline, now, null = (look_at(DiagonalGaussian(v), view) for v in variances)
    found = compute_signals(now, baseline, null, view.eps, decide="both_baselines", smooth=1).deciding.mean
    both = compute_signals(now, baseline, None, view.eps, decide="both", smooth=1).deciding.mean
    torch.testing.assert_close(found[..., :4], both[..., :4].clamp(max=0))  # explained without the prompt
    assert (both[..., :4] > 0).any()
    torch.testing.assert_close(found[..., 4:], both[..., 4:])
    # without the branch it is ``both``, and nothing before there is a baseline
    assert torch.equal(compute_signals(now, baseline, None, view.eps, smooth=1).deciding.mean, both)
    assert compute_signals(now, None, null, view.eps).decisive is None


def test_the_unconditional_branch_at_its_first_draws_only():
    """Paired with the same draws of the conditional branch: equal models stay exactly equal."""
    view = view_of(LEVELS, 4)
    baseline, now = look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view), look_at(mixture(pinned(spread())), view)
    few = Measurement(now.rho.first(2), now.epsilon[:, :2])
    signals = compute_signals(now, baseline, few, view.eps)
    assert signals.collapse_null.samples.shape[1] == 2
    for found in (signals.collapse_null, signals.log_ratio_null, signals.score_null):
        assert not found.samples.any()
    assert (signals.deciding.mean <= 0).all()
    assert signals.decisive.samples.shape == (4, 8, 8)


def test_the_smaller_of_maps_with_unlike_replicates_keeps_its_own_error():
    a, b = flat(1.0, 2.0, 3.0, 4.0), flat(0.5, 1.5)
    found = smaller(a, b)
    assert found.samples.shape == (1, 4, 1, 1)
    assert (found.mean.item(), found.sem.item()) == pytest.approx((1.0, b.sem.item()))
    found = smaller(a, flat(8.0, 9.0))
    assert (found.mean.item(), found.sem.item()) == pytest.approx((2.5, a.sem.item()))
    for n in (3, 1):
        with pytest.raises(ValueError, match=f"2 replicates cannot be repeated to {n}"):
            b.repeated(n)
    with pytest.raises(ValueError, match="1 replicates cannot be repeated"):
        flat(1.0).repeated(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_finite(bad):
    rho, epsilon = torch.ones(1, 2, 2, 2), torch.ones(1, 2, 4, 2, 2)
    assert Measurement(CurvatureMap(rho), epsilon).finite
    for tensor in (rho, epsilon):
        broken = tensor.clone()
        broken.view(-1)[0] = bad
        parts = (CurvatureMap(broken), epsilon) if tensor is rho else (CurvatureMap(rho), broken)
        assert not Measurement(*parts).finite
