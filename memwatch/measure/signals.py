"""Signals: what has changed between an earlier and a later measurement, per coordinate. Pure functions on maps.

Kim & Lee, ICML 2026 (arXiv 2605.26756), in retained variances ``rho = 1 - sigma * d eps_i / d x_i``: 1 is free, 0 is
pinned. Maps are means over channels. Shapes: retained variances ``(levels, n, h, w)``, epsilon ``(levels, draws, c, h,
w)``.

The map that decides is made of two *terms*, natural logs of a factor, in two *comparisons*, earlier -> now:

| | ``against: snapshot`` | ``against: unconditional`` |
|---|---|---|
| ``terms: variance`` | fallen freedom since the baseline | freedom that the prompt takes |
| ``terms: loss`` | fallen loss since the baseline | loss that the prompt saves |

``terms: both`` is the mean of the two terms, ``against: both`` the pointwise minimum of the two comparisons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memwatch.config import AGAINST, COMBINATIONS, TERMS
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation

SMALLEST_RHO = 1e-3  # below this no estimator of practical size tells a retained variance from zero
FLOOR = 0.05  # of retained variance: what is left below counts as none


def collapse(baseline: CurvatureMap, now: CurvatureMap) -> CurvatureMap:
    """Curvature difference ``C = rho_baseline - rho_now`` in [-1, 1]; the paper's ``sigma^2 * Delta h``."""
    return baseline - now


def log_ratio(baseline: CurvatureMap, now: CurvatureMap) -> CurvatureMap:
    """Log variance reduction factor ``log((rho_baseline + FLOOR) / (rho_now + FLOOR))``.

    log 5 is "five times less freedom than before". The floor keeps out ratios of next to nothing: where a plain
    background had a hundredth of its freedom left, half of that says nothing. Replicates are averaged before the ratio;
    the error is the paired one, by linearization (delta method).

    >>> before, now = (CurvatureMap(torch.full((1, 2, 1, 1), rho)) for rho in (0.95, 0.15))
    >>> round(factor(log_ratio(before, now).mean.item()), 4)
    5.0
    """
    b, a = ((rho.mean.clamp(min=0) + FLOOR)[..., None, :, :] for rho in (baseline, now))
    deviation = (baseline.samples - baseline.mean[..., None, :, :]) / b - (now.samples - now.mean[..., None, :, :]) / a
    return CurvatureMap(torch.log(b / a) + deviation)


def score_difference(eps_now: Tensor, eps_baseline: Tensor) -> CurvatureMap:
    """``S = (eps_now - eps_baseline)^2``; the paper's ``sigma^2 * Delta s``. Forward passes only.

    Against the unconditional branch it is the per-coordinate signal of Wen et al. 2024.
    """
    return CurvatureMap((eps_now - eps_baseline).square().mean(-3))


def loss_log_ratio(eps: Tensor, eps_now: Tensor, eps_baseline: Tensor) -> CurvatureMap:
    """``L = log(|eps_baseline - eps|^2 / |eps_now - eps|^2)``, mean over channels before the ratio.

    Args:
        eps: the true noise, shape of the others.
    """
    b, a = (eps_baseline - eps).square().mean(-3), (eps_now - eps).square().mean(-3)
    tiny = torch.finfo(a.dtype).tiny
    return CurvatureMap(torch.log(b.clamp(min=tiny) / a.clamp(min=tiny)))


def raw_curvature(now: CurvatureMap) -> CurvatureMap:
    """``1 - rho_now``: how pinned a coordinate is. Plain backgrounds are pinned as well, so it never decides."""
    return CurvatureMap(1 - now.samples)


def free(baseline: CurvatureMap, z: float = 2.0) -> Tensor:
    """Where the baseline leaves freedom that the estimator can resolve (``rho > z * sem``): bool ``(levels, h, w)``."""
    return (baseline.mean > z * baseline.sem) & (baseline.mean > SMALLEST_RHO)


def mean_log_ratio(variance: CurvatureMap, loss: CurvatureMap) -> CurvatureMap:
    """Mean of two log ratios, one replicate per noise draw."""
    return CurvatureMap((per_draw(variance, loss.samples.shape[-3]).samples + loss.samples) / 2)


def pointwise_min(a: CurvatureMap, b: CurvatureMap) -> CurvatureMap:
    """The smaller of two maps, coordinate by coordinate, each with its own error."""
    n = max(a.samples.shape[-3], b.samples.shape[-3])
    a, b = a.repeated(n), b.repeated(n)
    return CurvatureMap(torch.where((a.mean <= b.mean)[..., None, :, :], a.samples, b.samples))


def per_draw(values: CurvatureMap, draws: int) -> CurvatureMap:
    """One replicate per noise draw: the mean over its blocks of test vectors (draws come first)."""
    *levels, blocks, h, w = values.samples.shape
    return CurvatureMap(values.samples.reshape(*levels, draws, blocks // draws, h, w).mean(-3))


@dataclass(frozen=True)
class Comparison:
    """Two measurements at the same noisy latents with the same test vectors: every signal of the step earlier -> now.

    Attributes:
        collapse, variance, score: samples ``(levels, n, h, w)``, see ``collapse``, ``log_ratio``, ``score_difference``.
        loss: see ``loss_log_ratio``; ``None`` for a prompt probe, whose true noise is unknown.
        is_free: see ``free``.
    """

    collapse: CurvatureMap
    variance: CurvatureMap
    score: CurvatureMap
    loss: CurvatureMap | None
    is_free: Tensor

    @classmethod
    def of(cls, earlier: Measurement, now: Measurement, eps: Tensor | None, smooth: int) -> Comparison:
        """Compare.

        Args:
            earlier: may hold fewer noise draws than ``now``; the common first ones count.
            eps: the true noise, shape of ``now.epsilon``.
            smooth: side of the mean filter on retained variances and losses, latent pixels, odd.
        """
        now = now.first_draws(earlier.draws)
        rho_earlier, rho_now = earlier.rho.smooth(smooth), now.rho.smooth(smooth)
        loss = None
        if eps is not None:
            loss = loss_log_ratio(eps[:, : earlier.draws], now.epsilon, earlier.epsilon).smooth(smooth)
        return cls(
            collapse=collapse(rho_earlier, rho_now),
            variance=log_ratio(rho_earlier, rho_now),
            score=score_difference(now.epsilon, earlier.epsilon),
            loss=loss,
            is_free=free(rho_earlier),
        )

    def term(self, terms: str) -> CurvatureMap | None:
        """``variance``, ``loss``, or the mean of ``both``; of both the variance alone where there is no loss."""
        if terms == "loss":
            return self.loss
        return self.variance if terms == "variance" or self.loss is None else mean_log_ratio(self.variance, self.loss)


@dataclass(frozen=True)
class Signals:
    """All signals of one probe at one event.

    Attributes:
        snapshot: against the baseline; ``None`` where there is nothing earlier.
        unconditional: against the same model without the prompt; ``None`` where that was not looked at.
        raw: raw curvature of now, samples ``(levels, n, h, w)``.
        deciding: the map that decides, level by level, samples ``(levels, n, h, w)``; ``None`` where nothing can be
            compared.
        decisive: the same with the levels combined, samples ``(n, h, w)``, natural log of a factor. Regions and alerts
            come from it.
    """

    snapshot: Comparison | None
    unconditional: Comparison | None
    raw: CurvatureMap
    deciding: CurvatureMap | None
    decisive: CurvatureMap | None

    def maps(self) -> dict[str, CurvatureMap]:
        """Those that exist, by the name that files and logged keys use."""
        found: dict[str, CurvatureMap | None] = {"raw": self.raw, "decisive": self.decisive}
        if (s := self.snapshot) is not None:
            found |= {"collapse": s.collapse, "log_ratio": s.variance, "score": s.score, "loss_log_ratio": s.loss}
        if (u := self.unconditional) is not None:
            found |= {"collapse_null": u.collapse, "log_ratio_null": u.variance, "score_null": u.score}
        return {name: value for name, value in found.items() if value is not None}


def compute_signals(
    observation: Observation, *, terms: str = "both", against: str = "both", combine: str = "mean", smooth: int = 3
) -> Signals:
    """Every signal that an observation allows.

    Args:
        terms: ``variance``, ``loss`` or ``both``, see ``Comparison.term``.
        against: ``snapshot``, ``unconditional`` or ``both``, see ``decide``.
        combine: see ``combine_levels``.
        smooth: see ``Comparison.of``.

    Raises:
        ValueError: ``terms``, ``against`` or ``combine`` is none of the three.
    """
    o = observation
    snapshot = Comparison.of(o.baseline, o.now, o.eps, smooth) if o.baseline is not None else None
    unconditional = Comparison.of(o.unconditional, o.now, o.eps, smooth) if o.unconditional is not None else None
    deciding, is_free = decide(snapshot, unconditional, terms, against)
    decisive = combine_levels(deciding, is_free, combine) if deciding is not None and is_free is not None else None
    return Signals(snapshot, unconditional, raw_curvature(o.now.rho.smooth(smooth)), deciding, decisive)


def decide(
    snapshot: Comparison | None, unconditional: Comparison | None, terms: str, against: str
) -> tuple[CurvatureMap | None, Tensor | None]:
    """The map that decides, samples ``(levels, n, h, w)``, and where it may, bool ``(levels, h, w)``.

    ``both`` is the pointwise minimum of the two comparisons: fallen since the baseline *and* not explained by a model
    that does not know the prompt. Where the unconditional branch was not looked at, the snapshot alone decides. The
    freedom of the baseline gates ``both``; each other comparison is gated by its own.

    Raises:
        ValueError: ``terms`` or ``against`` is none of the three.
    """
    if terms not in TERMS or against not in AGAINST:
        raise ValueError(f"got terms {terms!r}, against {against!r}; allowed: {TERMS} and {AGAINST}")
    chosen = unconditional if against == "unconditional" else snapshot
    if chosen is None or (value := chosen.term(terms)) is None:
        return None, None
    if against == "both" and unconditional is not None and (other := unconditional.term(terms)) is not None:
        value = pointwise_min(value, other)
    return value, chosen.is_free


def combine_levels(levels: CurvatureMap, is_free: Tensor, how: str = "adjacent_min") -> CurvatureMap:
    """Several noise levels -> one map.

    ``adjacent_min``: a coordinate counts only as far as *two neighbouring levels* agree (the smaller of the two), and
    the best such pair counts; one level alone stands for itself. ``mean`` and ``max`` are over levels. A level where
    the baseline is not free says 0.

    Args:
        levels: samples ``(levels, n, h, w)``.
        is_free: ``(levels, h, w)``, see ``free``.
        how: ``adjacent_min``, ``mean`` or ``max``.

    Returns:
        Samples ``(n, h, w)``: the chosen level's own replicates, so that the error is that of the level that decided.

    Raises:
        ValueError: ``how`` is none of the three.
    """
    if how not in COMBINATIONS:
        raise ValueError(f"how: got {how!r}, allowed {', '.join(COMBINATIONS)}")
    samples = levels.samples.where(is_free[:, None], 0.0)
    if how == "mean":
        return CurvatureMap(samples.mean(0))
    means = samples.mean(1)
    index = torch.arange(len(means), device=means.device)[:, None, None].expand(means.shape)
    if how == "adjacent_min" and len(means) > 1:
        index = torch.where(means[1:] < means[:-1], index[1:], index[:-1])
        means = torch.minimum(means[1:], means[:-1])
    chosen = index.gather(0, means.argmax(0, keepdim=True))  # (1, h, w)
    return CurvatureMap(samples.gather(0, chosen[:, None].expand(1, *samples.shape[1:]))[0])


def factor(log_value: float) -> float:
    """The factor whose natural log is given: exp, kept finite."""
    return math.exp(min(log_value, 50.0))
