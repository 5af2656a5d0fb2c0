"""The maps that decide: against a slow and obvious twin, on laws whose answer is known, and by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from operator import sub
from statistics import fmean, stdev

import pytest
import torch
from PIL import Image
from support.oracles import (
    BOX,
    LEVELS,
    DiagonalGaussian,
    full_gaussian,
    generator,
    look_at,
    mixture,
    pinned,
    spread,
    view_of,
)
from torch import Tensor

from memwatch import Probe
from memwatch.config import AGAINST, TERMS
from memwatch.measure.curvature import CurvatureMap, value_and_diag_jacobian
from memwatch.measure.curvature import test_vectors as vectors_of
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.regions import box_of
from memwatch.measure.signals import (
    BRANCH_QUANTILE,
    LOSS_FLOOR,
    RHO_FLOOR,
    SMALLEST_LOSS,
    SMALLEST_RHO,
    Signals,
    branch_quantile,
    compute_signals,
    factor,
    free,
    log_ratio,
    loss_floor,
)

BY_VARIANCE = {"terms": "variance", "against": "both", "smooth": 3}
SHIPPED = {"terms": "loss", "against": "both", "smooth": 3}


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
    parts = {"eps": eps, "unconditional_baseline": unconditional_baseline}
    observation = Observation(Probe("a cat", name="cat"), timesteps, now, unconditional, baseline, **parts)
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


def term(
    terms: str, earlier: Measurement, now: Measurement, eps: Tensor, size: int, floor: list[float]
) -> dict[tuple, list[float]]:
    """By level and pixel, the replicates of one term in one comparison; ``floor`` is of the loss, by level."""
    draws, found = now.draws, {}
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
            least = floor[level] + SMALLEST_LOSS
            loss = fallen(*([value[row, column].item() for value in values] for values in losses), least)
            found[level, row, column] = {"variance": variance, "loss": loss}[terms]
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
    now, baseline, unconditional, earlier = (measured(4, seed + i) for i in range(4))
    eps = torch.randn(now.epsilon.shape, generator=generator(seed + 4), dtype=torch.float64)
    probe = Probe("a cat", name=name, is_control=is_control)
    return Observation(probe, (0.0, 1.0), now, unconditional, baseline, eps=eps, unconditional_baseline=earlier)


def floor_of(observations: list[Observation]) -> list[float]:
    """By level, the mean squared error before training over observations, draws, channels and pixels."""
    levels = range(len(observations[0].eps))
    errors = [[((o.baseline.epsilon - o.eps)[level] ** 2).flatten().tolist() for o in observations] for level in levels]
    return [LOSS_FLOOR * fmean(value for one in of_level for value in one) for of_level in errors]


def twin(
    o: Observation, terms: str, against: str, size: int, k0: list[float], floor: list[float]
) -> tuple[dict, dict, set[str]]:
    """The deciding replicates by level and pixel, those of the heatmap, and which cases occurred."""
    s = term(terms, o.baseline, o.now, o.eps, size, floor)
    n = term(terms, o.unconditional, o.now, o.eps, size, floor)
    k = term(terms, o.unconditional_baseline, o.unconditional, o.eps, size, floor)
    found, cases = {}, set()
    for at in PIXELS:
        back = [0.0] * len(k[at])
        if fmean(k[at]) > k0[at[0]]:
            back = [value - k0[at[0]] for value in k[at]]
        given_back = [value + more for value, more in zip(n[at], back, strict=True)]
        smaller, name = (s[at], "S") if fmean(s[at]) <= fmean(given_back) else (given_back, "N")
        found[at] = {"snapshot": s[at], "unconditional": n[at], "both": smaller}[against]
        cases |= {name, "given back" if any(back) else "as it is"}
    return found, n if against == "unconditional" else s, cases


@pytest.mark.parametrize("smooth", [1, 3])
@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("terms", TERMS)
def test_every_deciding_map_equals_a_slow_obvious_twin(terms, against, smooth):
    """k0 is the largest of two controls: for each of them, the other's alone. What decides is never filtered."""
    controls = [observed(name, seed, is_control=True) for name, seed in (("first", 10), ("second", 20))]
    observations = [observed("cat", 0), *controls]
    options = {"terms": terms, "against": against, "smooth": smooth}
    signals = compute_signals(observations, **options)
    floor = floor_of(controls)

    def expected(size: int) -> list[tuple[dict, dict, set[str]]]:
        pairs = [(o.unconditional_baseline, o.unconditional, o.eps) for o in observations]
        losses = [lost(term(terms, *pair, size, floor)) for pair in pairs]
        largest = [max(pair) for pair in zip(losses[1], losses[2], strict=True)]
        k0s = [largest, losses[2], losses[1]]
        return [twin(o, terms, against, size, k0, floor) for o, k0 in zip(observations, k0s, strict=True)]

    cases = set()
    for o, (plain, _, seen), (filtered, since, _) in zip(observations, expected(1), expected(smooth), strict=True):
        cases |= seen
        found = signals[o.name]
        for at, values in plain.items():
            assert found.deciding.mean[at].item() == pytest.approx(fmean(values))
            assert found.deciding.sem[at].item() == pytest.approx(stdev(values) / len(values) ** 0.5)
        shown = ((found.decisive, plain), (found.heatmap, filtered), (found.fallen, since))
        for (row, column), (mapped, values) in itertools.product(itertools.product(range(3), range(4)), shown):
            means = [fmean(values[level, row, column]) for level in range(2)]
            assert mapped.mean[row, column].item() == pytest.approx(fmean(means))
    assert cases == {"S", "N", "given back", "as it is"}  # all of them are in this example


def with_loss(
    name: str, before: float, now: float, *, control: bool = False, reference: bool = True, first: bool = False
) -> Observation:
    """Two levels of 2x2 pixels. The squared error has fallen from ``before`` to ``now``, twice as much at the second.

    ``first``: nothing earlier is known.
    """

    def error(squared: float) -> Measurement:
        levels = torch.tensor([squared, 2 * squared]).sqrt()[:, None, None, None, None]
        return Measurement(None, levels.expand(2, 3, 1, 2, 2))

    probe = Probe("a cat", Image.new("RGB", (2, 2)) if reference else None, name=name, is_control=control)
    eps = torch.zeros(2, 3, 1, 2, 2)
    return Observation(probe, (0.0, 1.0), error(now), baseline=None if first else error(before), eps=eps)


def test_the_loss_is_floored_by_what_the_controls_of_its_kind_lose_before_training():
    """The log ratio by hand; it does not depend on the level, since the floor is as large as the losses there."""
    probe = with_loss("cat", 0.9, 0.1)
    controls = [with_loss("a", 0.2, 0.2, control=True), with_loss("b", 0.6, 0.1, control=True)]
    others = [with_loss("prompt", 7.0, 7.0, control=True, reference=False), with_loss("another", 5.0, 1.0)]
    observations = [probe, *controls, *others]
    assert loss_floor(observations, probe.probe).tolist() == pytest.approx([LOSS_FLOOR * 0.4, LOSS_FLOOR * 0.8])
    assert loss_floor(observations, others[0].probe).tolist() == pytest.approx([LOSS_FLOOR * 7, LOSS_FLOOR * 14])
    found = compute_signals(observations, **SHIPPED)["cat"]
    expected = math.log((0.9 + LOSS_FLOOR * 0.4) / (0.1 + LOSS_FLOOR * 0.4))
    for values in (found.decisive, found.fallen, *(CurvatureMap(level) for level in found.deciding.samples)):
        assert values.mean.tolist() == [pytest.approx([expected] * 2, rel=1e-4)] * 2


def test_without_controls_all_probes_of_its_kind_give_the_floor():
    probe, another = with_loss("cat", 0.9, 0.1), with_loss("another", 0.3, 0.1)
    prompt, broken = with_loss("prompt", 7.0, 7.0, reference=False), with_loss("broken", math.nan, 1.0)
    assert loss_floor([probe, another, prompt, broken], probe.probe).tolist() == pytest.approx([0.6, 1.2])
    new = with_loss("new", 0.0, 0.3, first=True)  # before training nothing is earlier: what is measured now counts
    assert loss_floor([new], new.probe).tolist() == pytest.approx([0.3, 0.6])
    assert loss_floor([replace(probe, eps=None), prompt], probe.probe) is None


def test_what_decides_and_is_shown_is_the_smaller_and_what_has_fallen_is_the_snapshot():
    """Half of what has fallen since the baseline is there without the prompt as well."""
    probe = with_loss("cat", 1.0, 0.1)
    probe = replace(probe, unconditional=with_loss("", 1.0, 0.4).now)
    found = compute_signals([probe, with_loss("a", 1.0, 1.0, control=True)], **SHIPPED)["cat"]
    snapshot, prompt = (math.log((x + LOSS_FLOOR) / (0.1 + LOSS_FLOOR)) for x in (1.0, 0.4))
    assert found.decisive.mean.tolist() == [pytest.approx([prompt] * 2, rel=1e-4)] * 2
    assert found.heatmap.mean.tolist() == found.decisive.mean.tolist()
    assert found.fallen.mean.tolist() == [pytest.approx([snapshot] * 2, rel=1e-4)] * 2


def branch_lost(name: str, log_factor: float, *, control: bool = True, reference: bool = False) -> Observation:
    """One level, 2x2 pixels. The unconditional branch has fallen by that log factor, the prompt's own by 2."""

    def rho(value: float) -> Measurement:
        samples = torch.full((1, 2, 2, 2), value) + torch.tensor([-1e-4, 1e-4]).reshape(1, 2, 1, 1)
        return Measurement(CurvatureMap(samples), torch.zeros(1, 2, 1, 2, 2))

    def after(start: float, log_factor: float) -> Measurement:
        return rho((start + RHO_FLOOR) / math.exp(log_factor) - RHO_FLOOR)

    probe = Probe("a cat", Image.new("RGB", (2, 2)) if reference else None, name=name, is_control=control)
    now, without = after(0.9, 2.0), after(0.9, log_factor)
    return Observation(probe, (0.0,), now, without, baseline=rho(0.9), unconditional_baseline=rho(0.9))


def mean_of(signals: Signals) -> float:
    return signals.decisive.mean.mean().item()


@pytest.mark.parametrize(
    ("lost", "controls", "expected"),
    [
        (1.5, {}, 2.0),  # without controls k0 is 0, and S the limit
        (1.5, {"a": 0.1, "b": 0.3}, 0.5 + (1.5 - 0.3)),  # of what the branch has lost the controls explain 0.3
        (0.8, {"a": 1.0}, 2.0 - 0.8),  # less than a control: nothing is given back
        (1.5, {"prompt": 1.2}, 2.0),  # a control of another kind does not count
        (1.5, {"prompt": 1.2, "a": 0.4}, 0.5 + (1.5 - 0.4)),
    ],
)
def test_what_the_branch_has_stored_is_given_back(lost, controls, expected):
    """S = 2, N = 2 less what the branch has lost."""
    probe = branch_lost("cat", lost, control=False, reference=True)
    others = [branch_lost(name, x, reference=name != "prompt") for name, x in controls.items()]
    others.append(branch_lost("another probe", 1.4, control=False, reference=True))
    found = compute_signals([probe, *others], **BY_VARIANCE)
    assert mean_of(found["cat"]) == pytest.approx(expected, abs=1e-3)
    assert found["cat"].fallen.mean.tolist() == [pytest.approx([2.0, 2.0], abs=1e-3)] * 2  # S, whatever decides
    assert branch_quantile(found["cat"], "variance").tolist() == pytest.approx([lost], abs=1e-3)
    blind = replace(probe, unconditional_baseline=None)
    assert mean_of(compute_signals([blind, *others], **BY_VARIANCE)["cat"]) == pytest.approx(2.0 - lost, abs=1e-3)


def test_what_is_not_finite_is_none_and_changes_no_other_probe():
    probe, control = branch_lost("cat", 0.5, control=False), branch_lost("c", 0.1)
    broken = replace(branch_lost("broken", 9.0), unconditional=replace(control.now, epsilon=torch.tensor(math.nan)))
    found, alone = (compute_signals(seen, **BY_VARIANCE) for seen in ([broken, control, probe], [control, probe]))
    assert found["broken"] is None
    assert all(torch.equal(found[name].decisive.samples, alone[name].decisive.samples) for name in ("c", "cat"))


def test_what_cannot_be_had_is_none_and_the_same_is_zero():
    view = view_of(LEVELS, 2)
    now = look_at(DiagonalGaussian(spread()), view)
    assert set(signals_of(now).maps()) == {"raw"}
    maps = {"collapse", "log_ratio", "score", "raw"}
    assert set(signals_of(now, now).maps()) == maps  # without true noise there is no loss
    assert set(signals_of(now, now, terms="variance").maps()) == {*maps, "decisive", "heatmap"}
    assert signals_of(now, now, terms="variance", against="unconditional").decisive is None
    assert signals_of(now, now, terms="loss", against="snapshot").decisive is None
    for terms, against in itertools.product(TERMS, AGAINST):  # a model compared with itself reads exactly 0
        same = signals_of(now, now, now, view.eps, unconditional_baseline=now, terms=terms, against=against)
        assert not any(values.samples.any() for name, values in same.maps().items() if name != "raw")
    found = signals_of(now, None, now, view.eps, terms="variance", against="unconditional").maps()
    assert set(found) == {"collapse_null", "log_ratio_null", "score_null", "raw", "decisive", "heatmap"}


@pytest.mark.parametrize("make", [DiagonalGaussian, mixture])
def test_a_pinned_block_is_found_where_it_is(make):
    """A threshold between what smoothing leaves and what it takes finds the block.

    3x3 smoothing leaves 1/3 of the freedom on the block's edges and takes 1/3 next to it.
    """
    view, wide = view_of(LEVELS, 4), torch.ones(4, 8, 8)
    baseline, now, broad = (
        look_at(law, view) for law in (DiagonalGaussian(wide), make(pinned(wide)), make(0.9 * wide))
    )
    signals = signals_of(now, baseline, eps=view.eps, terms="variance", against="snapshot")
    mean = signals.decisive.mean.numpy()
    assert box_of(mean > math.log(1.8), 8) == BOX
    assert factor(mean.max()) > 3  # pinned altogether, up to the floor
    broadly = signals_of(broad, baseline, eps=view.eps, terms="variance")
    assert factor(broadly.decisive.mean.max()) < 2  # there is no region


def flat(*values):
    """A map of one pixel whose replicates are given."""
    return CurvatureMap(torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1))


def test_free_by_hand():
    assert free(flat(0.3, 0.5)).item()  # 0.4 against 2 * 0.1
    assert not free(flat(0.0, 0.4)).item()  # 0.2 against 2 * 0.2
    assert not free(flat(0.0005, 0.0005)).item()
    assert not free(flat(0.5)).item()  # no error bar, no judgement


@pytest.mark.parametrize("signal", [sub, partial(log_ratio, floor=RHO_FLOOR)], ids=["collapse", "log_ratio"])
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
    v = vectors_of(200 * 16, (4, 4, 4), generator(5))[:, None].double()
    rho = []
    for oracle in (baseline, now):
        products = value_and_diag_jacobian(lambda x, oracle=oracle: oracle.eps(x, alpha, sigma), x, v)[1]
        rho.append((1 - sigma * products)[:, 0].mean(1).reshape(200, 16, 4, 4))
    before, after = (CurvatureMap(samples).smooth(smooth) for samples in rho)
    found = signal(before, after)
    reported = found.sem.square().mean(0).sqrt()
    ratio = reported / found.mean.std(0)
    assert ratio.min() > 0.7
    assert ratio.max() < 1.4
    if signal is sub:
        assert (reported < 0.5 * (before.sem**2 + after.sem**2).mean(0).sqrt()).all()
