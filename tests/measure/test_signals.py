"""The maps that decide: against a slow and obvious twin, and on laws whose answer is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from PIL import Image
from support.oracles import BOX, LEVELS, DiagonalGaussian, generator, look_at, mixture, pinned, spread, view_of
from torch import Tensor

from memwatch import Probe
from memwatch.config import AGAINST, COMBINATIONS, TERMS
from memwatch.judge.regions import box_of, components
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.signals import (
    BRANCH_QUANTILE,
    LOSS_FLOOR,
    RHO_FLOOR,
    SMALLEST_RHO,
    Signals,
    branch_quantile,
    compute_signals,
    factor,
)

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


SHIPPED = {"terms": "both", "against": "both", "combine": "mean", "smooth": 3}


def signals_of(
    now: Measurement,
    baseline: Measurement | None = None,
    unconditional: Measurement | None = None,
    eps: Tensor | None = None,
    *,
    unconditional_baseline: Measurement | None = None,
    **options,
) -> Signals:
    """Of one probe; there are no controls."""
    timesteps = tuple(float(level) for level in range(len(now.epsilon)))
    others = {"unconditional": unconditional, "unconditional_baseline": unconditional_baseline}
    observation = Observation(Probe("a cat", name="cat"), timesteps, now, baseline=baseline, eps=eps, **others)
    return compute_signals([observation], **(SHIPPED | options))["cat"]


# --- against a twin that does one pixel at a time ---------------------------------------------------------------------

PIXELS = list(itertools.product(range(2), range(3), range(4)))  # level, row, column


def smoothed(image: Tensor, size: int) -> Tensor:
    """The mean over the neighbours that lie inside the picture."""
    height, width = image.shape
    found, reach = torch.empty_like(image), size // 2
    for row, column in itertools.product(range(height), range(width)):
        rows = range(max(0, row - reach), min(height, row + reach + 1))
        columns = range(max(0, column - reach), min(width, column + reach + 1))
        found[row, column] = fmean(image[r, c].item() for r in rows for c in columns)
    return found


def fallen(b: list[float], a: list[float], floor: float) -> list[float]:
    """Log of the ratio of means, spread out over the replicates as the delta method has it."""
    floored = [max(fmean(values), 0) + floor for values in (b, a)]
    centre = math.log(floored[0] / floored[1])
    return [centre + (y - fmean(b)) / floored[0] - (x - fmean(a)) / floored[1] for y, x in zip(b, a, strict=True)]


def term(terms: str, earlier: Measurement, now: Measurement, eps: Tensor, size: int) -> dict[tuple, list[float]]:
    """By level and pixel, the replicates of one term in one comparison."""
    draws, blocks = now.draws, now.rho.samples.shape[1] // now.draws
    found = {}
    for level in range(2):
        freedom = [[smoothed(replicate, size) for replicate in m.rho.samples[level]] for m in (earlier, now)]
        losses = [
            [smoothed(((m.epsilon - eps)[level, draw] ** 2).mean(0), size) for draw in range(draws)]
            for m in (earlier, now)
        ]
        for row, column in itertools.product(range(3), range(4)):
            b, a = ([value[row, column].item() for value in values] for values in freedom)
            is_free = fmean(b) > max(2 * stdev(b) / len(b) ** 0.5, SMALLEST_RHO)
            variance = fallen(b, a, RHO_FLOOR) if is_free else [0.0] * len(b)
            loss = fallen(*([value[row, column].item() for value in values] for values in losses), LOSS_FLOOR)
            both = [(fmean(variance[draw * blocks : (draw + 1) * blocks]) + loss[draw]) / 2 for draw in range(draws)]
            found[level, row, column] = {"variance": variance, "loss": loss, "both": both}[terms]
    return found


def measured(draws: int, seed: int) -> Measurement:
    """Two levels of 3x4 pixels, two blocks of test vectors per draw; the left half has no freedom at all."""
    g = generator(seed)
    rho = 0.1 + 0.6 * torch.rand(2, 1, 3, 4, generator=g, dtype=torch.float64)
    rho[..., :2] = 0
    rho = rho + 0.1 * torch.randn(2, 2 * draws, 3, 4, generator=g, dtype=torch.float64)
    return Measurement(CurvatureMap(rho), torch.randn(2, draws, 3, 3, 4, generator=g, dtype=torch.float64))


def lost(k: dict[tuple, list[float]]) -> list[float]:
    """By level, the 0.9 quantile over pixels by linear interpolation."""
    found = []
    for level in range(2):
        means = sorted(fmean(k[at]) for at in PIXELS if at[0] == level)
        place = BRANCH_QUANTILE * (len(means) - 1)
        low = int(place)
        found.append(means[low] + (place - low) * (means[low + 1] - means[low]))
    return found


def observed(name: str, seed: int, *, is_control: bool = False) -> Observation:
    """All four measurements."""
    now, baseline, unconditional, unconditional_baseline = (measured(4, seed + i) for i in range(4))
    eps = torch.randn(now.epsilon.shape, generator=generator(seed + 4), dtype=torch.float64)
    probe = Probe("a cat", name=name, is_control=is_control)
    return Observation(
        probe,
        (0.0, 1.0),
        now,
        unconditional=unconditional,
        baseline=baseline,
        eps=eps,
        unconditional_baseline=unconditional_baseline,
    )


def twin(o: Observation, terms: str, against: str, size: int, k0: list[float]) -> tuple[dict, set[str]]:
    """The deciding replicates by level and pixel, and which cases occurred."""
    s = term(terms, o.baseline, o.now, o.eps, size)
    n = term(terms, o.unconditional, o.now, o.eps, size)
    k = term(terms, o.unconditional_baseline, o.unconditional, o.eps, size)
    found, cases = {}, set()
    for at in PIXELS:
        back = [0.0] * len(k[at])
        if fmean(k[at]) > k0[at[0]]:
            back = [value - k0[at[0]] for value in k[at]]
        given_back = [value + more for value, more in zip(n[at], back, strict=True)]
        smaller, name = (s[at], "S") if fmean(s[at]) <= fmean(given_back) else (given_back, "N")
        found[at] = {"snapshot": s[at], "unconditional": n[at], "both": smaller}[against]
        cases |= {name, "given back" if any(back) else "as it is"}
    return found, cases


@pytest.mark.parametrize("smooth", [1, 3])
@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("terms", TERMS)
def test_every_deciding_map_equals_a_slow_obvious_twin(terms, against, smooth):
    """k0 is the largest of two controls: for each of them, the other's alone."""
    observations = [
        observed("cat", 0),
        observed("first", 10, is_control=True),
        observed("second", 20, is_control=True),
    ]
    options = {"terms": terms, "against": against, "combine": "mean", "smooth": smooth}
    signals = compute_signals(observations, **options)
    losses = [lost(term(terms, o.unconditional_baseline, o.unconditional, o.eps, smooth)) for o in observations]
    largest = [max(pair) for pair in zip(losses[1], losses[2], strict=True)]
    cases = set()
    for o, k0 in zip(observations, [largest, losses[2], losses[1]], strict=True):
        expected, seen = twin(o, terms, against, smooth, k0)
        cases |= seen
        deciding, decisive = signals[o.name].deciding, signals[o.name].decisive
        for at, values in expected.items():
            assert deciding.mean[at].item() == pytest.approx(fmean(values))
            assert deciding.sem[at].item() == pytest.approx(stdev(values) / len(values) ** 0.5)
        for row, column in itertools.product(range(3), range(4)):
            means = [fmean(expected[level, row, column]) for level in range(2)]
            assert decisive.mean[row, column].item() == pytest.approx(fmean(means))
    assert cases == {"S", "N", "given back", "as it is"}  # all of them are in this example


# --- what the branch has lost -----------------------------------------------------------------------------------------


def branch_lost(name: str, log_factor: float, *, control: bool = True, reference: bool = False) -> Observation:
    """One level, 2x2 pixels. The unconditional branch has fallen by that log factor, the prompt's own by 2."""

    def rho(value: float) -> Measurement:
        samples = torch.full((1, 2, 2, 2), value) + torch.tensor([-1e-4, 1e-4]).reshape(1, 2, 1, 1)
        return Measurement(CurvatureMap(samples), torch.zeros(1, 2, 1, 2, 2))

    def after(start: float, log_factor: float) -> Measurement:
        return rho((start + RHO_FLOOR) / math.exp(log_factor) - RHO_FLOOR)

    image = Image.new("RGB", (2, 2)) if reference else None
    return Observation(
        Probe("a cat", image, name=name, is_control=control),
        (0.0,),
        now=after(0.9, 2.0),
        baseline=rho(0.9),
        unconditional=after(0.9, log_factor),
        unconditional_baseline=rho(0.9),
    )


def mean_of(signals: Signals) -> float:
    return signals.decisive.mean.mean().item()


def test_what_the_branch_has_stored_is_given_back():
    """S = 2; the branch has fallen by 1.5, so N = 0.5; of that the controls explain 0.3."""
    stored, kept = (
        branch_lost("stored", 1.5, control=False),
        [branch_lost(f"c{i}", x) for i, x in enumerate((0.1, 0.3))],
    )
    found = compute_signals([stored, *kept], **SHIPPED)
    assert mean_of(found["stored"]) == pytest.approx(0.5 + (1.5 - 0.3), abs=1e-3)
    alone = compute_signals([stored], **SHIPPED)["stored"]
    assert mean_of(alone) == pytest.approx(2.0, abs=1e-3)  # without controls k0 is 0, and S the limit
    blind = replace(stored, unconditional_baseline=None)
    assert mean_of(compute_signals([blind, *kept], **SHIPPED)["stored"]) == pytest.approx(0.5, abs=1e-3)
    assert branch_quantile(alone, "both").tolist() == pytest.approx([1.5], abs=1e-3)
    assert branch_quantile(found["c0"], "variance").tolist() == pytest.approx([0.1], abs=1e-3)


def test_a_branch_that_has_lost_less_than_the_controls_changes_nothing():
    probe, control = branch_lost("cat", 0.8, control=False), branch_lost("c", 1.0)
    assert mean_of(compute_signals([probe, control], **SHIPPED)["cat"]) == pytest.approx(2.0 - 0.8, abs=1e-3)


def test_what_a_control_has_lost_itself_is_no_excuse_for_it():
    """Its k0 is that of the others, as if it were a probe."""
    loud, quiet = branch_lost("loud", 1.5), branch_lost("quiet", 0.2)
    found = compute_signals([loud, quiet], **SHIPPED)
    assert mean_of(found["loud"]) == pytest.approx(0.5 + 1.3, abs=1e-3)
    assert mean_of(found["quiet"]) == pytest.approx(2.0 - 0.2, abs=1e-3)  # 0.2 lies below 1.5
    assert mean_of(compute_signals([loud], **SHIPPED)["loud"]) == pytest.approx(2.0, abs=1e-3)


def test_only_controls_of_its_kind_count():
    probe = branch_lost("cat", 1.5, control=False, reference=True)
    other, own = branch_lost("prompt", 1.2), branch_lost("image", 0.4, reference=True)
    watched = branch_lost("another probe", 1.4, control=False, reference=True)
    assert mean_of(compute_signals([probe, other, watched], **SHIPPED)["cat"]) == pytest.approx(2.0, abs=1e-3)
    assert mean_of(compute_signals([probe, other, own], **SHIPPED)["cat"]) == pytest.approx(0.5 + 1.1, abs=1e-3)


def test_probes_are_told_apart_and_what_is_not_finite_is_none():
    probe, control = branch_lost("cat", 0.5, control=False), branch_lost("c", 0.1)
    broken = replace(branch_lost("broken", 9.0), unconditional=replace(control.now, epsilon=torch.tensor(math.nan)))
    found = compute_signals([broken, control, probe], **SHIPPED)
    assert list(found) == ["broken", "c", "cat"]
    assert found["broken"] is None
    alone = compute_signals([control, probe], **SHIPPED)
    assert all(torch.equal(found[name].decisive.samples, alone[name].decisive.samples) for name in ("c", "cat"))
    assert compute_signals([], **SHIPPED) == {}


def two_pixels(first: float, second: float, *, epsilon: float) -> Measurement:
    """One level, two replicates, one channel."""
    samples = torch.tensor([first, second]).reshape(1, 1, 1, 2).expand(1, 2, 1, 2)
    return Measurement(CurvatureMap(samples), torch.full((1, 2, 1, 1, 2), epsilon))


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_variance_is_gated_by_the_freedom_of_what_it_is_compared_with(combine):
    """The baseline is free at the first pixel only, the branch at the second, the branch's baseline at neither."""
    now = two_pixels(0.5, 0.5, epsilon=1.0)
    baseline, unconditional = two_pixels(1.0, 0.0, epsilon=2.0), two_pixels(0.0, 1.0, epsilon=3.0)
    nothing = two_pixels(0.0, 0.0, epsilon=4.0)
    parts = {"combine": combine, "smooth": 1, "unconditional_baseline": nothing, "eps": torch.zeros(1, 2, 1, 1, 2)}
    signals = signals_of(now, baseline, unconditional, **parts)
    is_free = [c.is_free.flatten().tolist() for c in (signals.snapshot, signals.unconditional, signals.branch)]
    assert is_free == [[True, False], [False, True], [False, False]]
    v = math.log(1.05 / 0.55)
    s, n, k = [
        c.term("variance").mean.flatten().tolist() for c in (signals.snapshot, signals.unconditional, signals.branch)
    ]
    assert [*s, *n, *k] == pytest.approx([v, 0, 0, v, 0, 0])
    # the loss knows no such gate
    losses = [math.log((b + 0.01) / (a + 0.01)) for b, a in ((4, 1), (9, 1), (16, 9))]
    for found, expected in zip((signals.snapshot, signals.unconditional, signals.branch), losses, strict=True):
        assert found.term("loss").mean.flatten().tolist() == pytest.approx([expected] * 2)
    ls, ln, lk = losses
    expected = [min((v + ls) / 2, ln / 2 + lk / 2), min(ls / 2, (v + ln) / 2 + lk / 2)]
    assert signals.decisive.mean.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("terms", TERMS)
def test_self_comparison_is_exactly_zero(terms, against):
    oracle, view = mixture(pinned(spread())), view_of(LEVELS, 2)
    now, baseline, unconditional, earlier = (look_at(oracle, view) for _ in range(4))
    parts = {"unconditional_baseline": earlier, "terms": terms, "against": against}
    found = signals_of(now, baseline, unconditional, view.eps, **parts).maps()
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
    mean = signals.decisive.mean.numpy()
    (inside,) = components(mean, 1.8, 0.0, 0.01)
    assert box_of(inside, 8) == BOX
    assert factor(mean.max()) > 3  # pinned altogether, up to the floor
    assert signals.snapshot.collapse.mean[:, 3:5, 4:8].min() > 0.5


@pytest.mark.parametrize("make", [DiagonalGaussian, mixture])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_broad_model_shows_no_region(make, combine):
    view = view_of(LEVELS, 4)
    baseline, now = look_at(DiagonalGaussian(torch.ones(4, 8, 8)), view), look_at(make(0.9 * torch.ones(4, 8, 8)), view)
    for signals in (
        signals_of(now, baseline, eps=view.eps, combine=combine),
        signals_of(baseline, now, eps=view.eps),
    ):
        assert list(components(signals.decisive.mean.numpy(), 2.0, 0.0)) == []
