"""The maps that decide: against a slow and obvious twin, and on laws whose answer is known."""

from __future__ import annotations

import itertools
import math
from statistics import fmean, stdev

import pytest
import torch
from support.oracles import BOX, LEVELS, DiagonalGaussian, generator, look_at, mixture, pinned, spread, view_of
from torch import Tensor

from memwatch import Probe
from memwatch.config import AGAINST, COMBINATIONS, TERMS
from memwatch.judge.regions import find_regions
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.signals import FLOOR, SMALLEST_RHO, Signals, compute_signals, factor

ALL_MAPS = {
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


def signals_of(
    now: Measurement,
    baseline: Measurement | None = None,
    unconditional: Measurement | None = None,
    eps: Tensor | None = None,
    **options,
) -> Signals:
    timesteps = tuple(float(level) for level in range(len(now.epsilon)))
    probe = Probe("a cat", name="cat")
    observation = Observation(probe, timesteps, now, unconditional=unconditional, baseline=baseline, eps=eps)
    return compute_signals(observation, **options)


# --- against a twin that does one pixel at a time ---------------------------------------------------------------------


def smoothed(image: Tensor, size: int) -> Tensor:
    """The mean over the neighbours that lie inside the picture."""
    height, width = image.shape
    found, reach = torch.empty_like(image), size // 2
    for row, column in itertools.product(range(height), range(width)):
        rows = range(max(0, row - reach), min(height, row + reach + 1))
        columns = range(max(0, column - reach), min(width, column + reach + 1))
        found[row, column] = fmean(image[r, c].item() for r in rows for c in columns)
    return found


def rho_of(m: Measurement, level: int, size: int) -> list[Tensor]:
    return [smoothed(replicate, size) for replicate in m.rho.samples[level]]


def variance_term(b: list[float], a: list[float]) -> list[float]:
    """Log of the ratio of means, spread out over the replicates as the delta method has it."""
    floored = [max(fmean(values), 0) + FLOOR for values in (b, a)]
    centre = math.log(floored[0] / floored[1])
    return [centre + (y - fmean(b)) / floored[0] - (x - fmean(a)) / floored[1] for y, x in zip(b, a, strict=True)]


def loss_term(earlier: Measurement, now: Measurement, eps: Tensor, level: int, draw: int, size: int) -> Tensor:
    losses = [((m.epsilon - eps[:, : m.draws])[level, draw] ** 2).mean(0) for m in (earlier, now)]
    return smoothed((losses[0] / losses[1]).log(), size)


def term(terms: str, earlier: Measurement, now: Measurement, eps: Tensor, level: int, size: int):
    """By pixel, the replicates of one term in one comparison; and whether the earlier model is free there."""
    draws = earlier.draws
    blocks = now.rho.samples.shape[1] // now.draws
    b, a = rho_of(earlier, level, size), rho_of(now, level, size)[: draws * blocks]
    losses = [loss_term(earlier, now, eps, level, draw, size) for draw in range(draws)]
    found, is_free = {}, {}
    for at in itertools.product(range(b[0].shape[0]), range(b[0].shape[1])):
        freedom = [value[at].item() for value in b]
        sem = stdev(freedom) / len(freedom) ** 0.5
        is_free[at] = fmean(freedom) > max(2 * sem, SMALLEST_RHO)
        variance = variance_term(freedom, [value[at].item() for value in a])
        loss = [value[at].item() for value in losses]
        both = [(fmean(variance[draw * blocks : (draw + 1) * blocks]) + loss[draw]) / 2 for draw in range(draws)]
        found[at] = {"variance": variance, "loss": loss, "both": both}[terms]
    return found, is_free


def measured(draws: int, seed: int) -> Measurement:
    """Two levels of 3x4 pixels, two blocks of test vectors per draw; the left half has no freedom at all."""
    g = generator(seed)
    rho = 0.1 + 0.6 * torch.rand(2, 1, 3, 4, generator=g, dtype=torch.float64)
    rho[..., :2] = 0
    rho = rho + 0.1 * torch.randn(2, 2 * draws, 3, 4, generator=g, dtype=torch.float64)
    return Measurement(CurvatureMap(rho), torch.randn(2, draws, 3, 3, 4, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("smooth", [1, 3])
@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("terms", TERMS)
def test_every_deciding_map_equals_a_slow_obvious_twin(terms, against, smooth):
    now, baseline, unconditional = measured(4, seed=0), measured(4, seed=1), measured(2, seed=2)
    eps = torch.randn(now.epsilon.shape, generator=generator(3), dtype=torch.float64)
    signals = signals_of(now, baseline, unconditional, eps, terms=terms, against=against, smooth=smooth)
    gated = torch.zeros(2, 3, 4, dtype=torch.float64)
    chosen_from = set()
    for level in range(2):
        snapshot, is_free = term(terms, baseline, now, eps, level, smooth)
        branch, branch_is_free = term(terms, unconditional, now, eps, level, smooth)
        is_free = branch_is_free if against == "unconditional" else is_free
        for at in snapshot:
            candidates = {"snapshot": [snapshot[at]], "unconditional": [branch[at]], "both": [snapshot[at], branch[at]]}
            values = min(candidates[against], key=fmean)
            chosen_from.add(values is snapshot[at])
            assert signals.deciding.mean[level][at].item() == pytest.approx(fmean(values))
            assert signals.deciding.sem[level][at].item() == pytest.approx(stdev(values) / len(values) ** 0.5)
            gated[level][at] = fmean(values) if is_free[at] else 0.0
    assert chosen_from == {"snapshot": {True}, "unconditional": {False}, "both": {True, False}}[against]
    assert 0 < (gated == 0).sum() < gated.numel()
    torch.testing.assert_close(signals.decisive.mean, gated.mean(0))


def two_pixels(first: float, second: float, *, epsilon: float) -> Measurement:
    """One level, two replicates, one channel."""
    samples = torch.tensor([first, second]).reshape(1, 1, 1, 2).expand(1, 2, 1, 2)
    return Measurement(CurvatureMap(samples), torch.full((1, 2, 1, 1, 2), epsilon))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize(
    ("against", "decides"), [("snapshot", [True, False]), ("unconditional", [False, True]), ("both", [True, False])]
)
def test_a_map_is_gated_by_the_freedom_of_what_it_compares_with(terms, combine, against, decides):
    """The baseline is free at the first pixel only, the branch at the second only."""
    now = two_pixels(0.5, 0.5, epsilon=1.0)
    baseline, unconditional = two_pixels(1.0, 0.0, epsilon=2.0), two_pixels(0.0, 1.0, epsilon=3.0)
    eps = torch.zeros(1, 2, 1, 1, 2)
    signals = signals_of(now, baseline, unconditional, eps, terms=terms, against=against, combine=combine, smooth=1)
    assert signals.snapshot.is_free.flatten().tolist() == [True, False]
    assert signals.unconditional.is_free.flatten().tolist() == [False, True]
    assert (signals.deciding.mean != 0).all()
    shown = signals.decisive.mean.flatten()
    expected = signals.deciding.mean.flatten().where(torch.tensor(decides), 0.0)
    assert torch.equal(shown, expected)


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("terms", TERMS)
def test_self_comparison_is_exactly_zero(terms, against):
    oracle, view = mixture(pinned(spread())), view_of(LEVELS, 2)
    now, baseline, unconditional = (look_at(oracle, view) for _ in range(3))
    found = signals_of(now, baseline, unconditional, view.eps, terms=terms, against=against).maps()
    assert set(found) == ALL_MAPS
    for name, values in found.items():
        if name != "raw":
            assert torch.equal(values.samples, torch.zeros_like(values.samples)), name


def test_unknown_names_are_refused():
    now = look_at(DiagonalGaussian(spread()), view_of(LEVELS, 2))
    with pytest.raises(ValueError, match="got terms 'log_ratio', .*allowed: .*'variance', 'loss', 'both'"):
        signals_of(now, now, terms="log_ratio")
    with pytest.raises(ValueError, match="against 'first'; allowed: .*'snapshot', 'unconditional', 'both'"):
        signals_of(now, now, against="first")
    with pytest.raises(ValueError, match="'median'.*adjacent_min"):
        signals_of(now, now, combine="median")


def test_what_cannot_be_had_is_none():
    view = view_of(LEVELS, 2)
    now = look_at(DiagonalGaussian(spread()), view)
    assert set(signals_of(now).maps()) == {"raw"}
    assert set(signals_of(now, now).maps()) == {"collapse", "log_ratio", "score", "raw", "decisive"}
    assert signals_of(now, now, terms="variance", against="unconditional").decisive is None
    assert signals_of(now, now, terms="loss", against="snapshot").decisive is None
    found = signals_of(now, None, now, view.eps, terms="variance", against="unconditional").maps()
    assert set(found) == {"collapse_null", "log_ratio_null", "score_null", "raw", "decisive"}


def test_both_terms_are_the_mean_of_the_two():
    view = view_of(LEVELS, 2)
    baseline = look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view)
    now = look_at(DiagonalGaussian(0.3 * torch.ones(4, 8, 8)), view)
    decisive = {
        terms: signals_of(now, baseline, eps=view.eps, terms=terms, against="snapshot").decisive for terms in TERMS
    }
    expected = (decisive["variance"].mean + decisive["loss"].mean) / 2
    torch.testing.assert_close(decisive["both"].mean, expected)
    # both terms of a prompt probe, whose true noise is unknown, are the variance alone
    alone = signals_of(now, baseline, terms="both", against="snapshot")
    assert torch.equal(alone.decisive.samples, decisive["variance"].samples)


def test_against_both_is_the_smaller_of_the_two():
    view = view_of(LEVELS, 4)
    variances = torch.ones(4, 8, 8), torch.full((4, 8, 8), 0.3), torch.ones(4, 8, 8)
    variances[2][..., :4] = 0.3  # the unconditional branch has fallen as well, on the left
    baseline, now, unconditional = (look_at(DiagonalGaussian(v), view) for v in variances)
    found = signals_of(now, baseline, unconditional, view.eps, against="both", smooth=1).deciding.mean
    snapshot = signals_of(now, baseline, eps=view.eps, against="snapshot", smooth=1).deciding.mean
    torch.testing.assert_close(found[..., :4], snapshot[..., :4].clamp(max=0))  # explained without the prompt
    assert (snapshot[..., :4] > 0).any()
    torch.testing.assert_close(found[..., 4:], snapshot[..., 4:])
    # without the branch it is the snapshot alone, and there is nothing before there is a baseline
    assert torch.equal(signals_of(now, baseline, eps=view.eps, smooth=1).deciding.mean, snapshot)
    assert signals_of(now, None, unconditional, view.eps).decisive is None


def test_the_unconditional_branch_at_its_first_draws_only():
    """Paired with the same draws of the conditional branch: equal models stay exactly equal."""
    view = view_of(LEVELS, 4)
    baseline, now = look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view), look_at(mixture(pinned(spread())), view)
    signals = signals_of(now, baseline, now.first_draws(2), view.eps)
    branch = signals.unconditional
    assert branch.collapse.samples.shape[1] == 2
    for found in (branch.collapse, branch.variance, branch.score, branch.loss):
        assert not found.samples.any()
    assert (signals.deciding.mean <= 0).all()
    assert signals.decisive.samples.shape == (4, 8, 8)


# --- known laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [DiagonalGaussian, mixture])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_pinned_block_is_found_where_it_is(make, combine):
    """A threshold between what smoothing leaves and what it takes finds the block.

    3x3 smoothing leaves 1/3 of the freedom on the block's edges and takes 1/3 next to it.
    """
    view = view_of(LEVELS, 4)
    baseline, now = (
        look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view),
        look_at(make(pinned(torch.ones(4, 8, 8))), view),
    )
    signals = signals_of(now, baseline, eps=view.eps, terms="variance", against="snapshot", combine=combine)
    regions, _ = find_regions(signals.decisive, math.log(1.8), min_area=0.01, scale=8)
    assert [region.box for region in regions] == [BOX]
    assert factor(regions[0].peak) > 3  # pinned altogether, up to the floor
    assert signals.snapshot.collapse.mean[:, 3:5, 4:8].min() > 0.5


@pytest.mark.parametrize("make", [DiagonalGaussian, mixture])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_broad_model_shows_no_region(make, combine):
    view = view_of(LEVELS, 4)
    baseline, now = look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view), look_at(make(0.9 * torch.ones(4, 8, 8)), view)
    signals = signals_of(now, baseline, eps=view.eps, combine=combine)
    assert find_regions(signals.decisive, math.log(2), min_area=0.0, scale=8)[0] == ()
    assert find_regions(signals_of(baseline, now, eps=view.eps).decisive, math.log(2))[0] == ()
