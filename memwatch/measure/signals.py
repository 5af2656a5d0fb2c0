"""The signals: what has changed between a baseline and the model of now, per coordinate. Pure functions on maps.

Kim & Lee, ICML 2026 (arXiv 2605.26756), in retained variances ``rho = 1 - sigma * d eps_i / d x_i``: 1 is free, 0 is pinned.
Maps are means over channels. Shapes: retained variances ``(levels, n, h, w)``, epsilon ``(levels, draws, c, h, w)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memwatch.config import COMBINATIONS, DECIDING
from memwatch.curvature import CurvatureMap

SMALLEST_RHO = 1e-3  # below this no estimator of practical size tells a retained variance from zero
FLOOR = 0.05  # of retained variance: what is left below counts as none


@dataclass(frozen=True)
class Measurement:
    """What one denoiser says at fixed noisy latents.

    Attributes:
        rho: retained variance, mean over channels; samples of shape ``(levels, n, h, w)``, n independent replicates.
        epsilon: shape ``(levels, draws, c, h, w)``.
    """

    rho: CurvatureMap
    epsilon: Tensor

    @property
    def draws(self) -> int:
        return self.epsilon.shape[1]

    @property
    def finite(self) -> bool:
        return bool(self.rho.samples.isfinite().all() and self.epsilon.isfinite().all())

    def first(self, draws: int) -> Measurement:
        """The first noise draws (replicates come draw by draw)."""
        blocks = self.rho.samples.shape[-3] // self.draws
        return Measurement(self.rho.first(draws * blocks), self.epsilon[:, :draws])

    def smooth(self, size: int) -> Measurement:
        """``rho`` smoothed, see ``CurvatureMap.smooth``."""
        return Measurement(self.rho.smooth(size), self.epsilon)


def collapse(baseline: CurvatureMap, now: CurvatureMap) -> CurvatureMap:
    """Curvature difference ``C = rho_baseline - rho_now`` in [-1, 1]; the paper's ``sigma^2 * Delta h``. Paired error."""
    return baseline - now


def log_ratio(baseline: CurvatureMap, now: CurvatureMap) -> CurvatureMap:
    """Log variance reduction factor ``log((rho_baseline + FLOOR) / (rho_now + FLOOR))``: log 5 is "five times less freedom than before".

    The floor keeps ratios of next to nothing out: where a plain background had a hundredth of its freedom left, half of that says nothing.
    Replicates are averaged before the ratio; the error is the paired one, by linearization (delta method).
    """
    b, a = ((rho.mean.clamp(min=0) + FLOOR)[..., None, :, :] for rho in (baseline, now))
    deviation = (baseline.samples - baseline.mean[..., None, :, :]) / b - (now.samples - now.mean[..., None, :, :]) / a
    return CurvatureMap(torch.log(b / a) + deviation)


def score_difference(eps_now: Tensor, eps_baseline: Tensor) -> CurvatureMap:
    """``S = (eps_now - eps_baseline)^2``; the paper's ``sigma^2 * Delta s`` (unconditional baseline: Wen et al. 2024). Forward only."""
    return CurvatureMap((eps_now - eps_baseline).square().mean(-3))


def loss_log_ratio(eps: Tensor, eps_now: Tensor, eps_baseline: Tensor) -> CurvatureMap:
    """``L = log(|eps_baseline - eps|^2 / |eps_now - eps|^2)``, mean over channels before the ratio; needs the true noise ``eps``."""
    b, a = (eps_baseline - eps).square().mean(-3), (eps_now - eps).square().mean(-3)
    tiny = torch.finfo(a.dtype).tiny
    return CurvatureMap(torch.log(b.clamp(min=tiny) / a.clamp(min=tiny)))


def raw_curvature(now: CurvatureMap) -> CurvatureMap:
    """``1 - rho_now``: how pinned a coordinate is, whoever pinned it. Also high on plain backgrounds; a reference row, never a verdict."""
    return CurvatureMap(1 - now.samples)


def free(baseline: CurvatureMap, z: float = 2.0) -> Tensor:
    """Where the baseline still leaves freedom that the estimator can resolve (``rho > z * sem``); shape ``(levels, h, w)``, bool."""
    return (baseline.mean > z * baseline.sem) & (baseline.mean > SMALLEST_RHO)


def combine_levels(levels: CurvatureMap, is_free: Tensor, how: str = "adjacent_min") -> CurvatureMap:
    """Several noise levels -> one map.

    ``adjacent_min``: a coordinate counts only as far as *two neighbouring levels* agree (the smaller of the two), and the best such pair
    counts; one level alone stands for itself. ``mean`` and ``max`` are over levels. A level where the baseline is not free says 0.

    Args:
        levels: samples ``(levels, n, h, w)``.
        is_free: ``(levels, h, w)``, see ``free``.
        how: ``adjacent_min``, ``mean`` or ``max``.

    Returns:
        Samples ``(n, h, w)``, the chosen level's own replicates, so that the error is that of the level that decided.

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


@dataclass(frozen=True)
class Signals:
    """All signals of one probe at one event. Every map has samples ``(levels, n, h, w)``; ``None`` where it cannot be had.

    Attributes:
        collapse, log_ratio, score, loss_log_ratio: against the snapshot baseline.
        collapse_null, log_ratio_null, score_null: against the unconditional branch of the same model.
        raw: raw curvature of now.
        deciding: the map that decides, level by level; one of the above, or made of several.
        decisive: the one map that regions and alerts come from, levels combined; samples ``(n, h, w)``, natural log of a factor.
    """

    collapse: CurvatureMap | None
    log_ratio: CurvatureMap | None
    score: CurvatureMap | None
    loss_log_ratio: CurvatureMap | None
    collapse_null: CurvatureMap | None
    log_ratio_null: CurvatureMap | None
    score_null: CurvatureMap | None
    raw: CurvatureMap
    deciding: CurvatureMap | None
    decisive: CurvatureMap | None

    def maps(self) -> dict[str, CurvatureMap]:
        """Those that exist, by name; ``deciding`` only repeats them."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "deciding"}


def compute_signals(
    now: Measurement,
    baseline: Measurement | None,
    null: Measurement | None,
    eps: Tensor | None,
    *,
    decide: str = "both_baselines",
    combine: str = "mean",
    smooth: int = 3,
) -> Signals:
    """Every signal of section 2 of the design that these measurements allow.

    Args:
        now: the current model, conditional.
        baseline: an earlier snapshot at the same noisy latents with the same test vectors.
        null: the current model's unconditional branch, likewise; maybe at the first few noise draws only.
        eps: the true noise of a reference probe, shape of ``now.epsilon``; ``None`` for a prompt probe.
        decide: ``log_ratio``, ``log_ratio_null``, ``loss_log_ratio``, ``both`` (mean of ``log_ratio`` and ``loss_log_ratio``) or
            ``both_baselines`` (``both`` against the snapshot or the unconditional branch, whichever is smaller: fallen since then, *and* not
            explained by a model that does not know the prompt). What cannot be had is left out: the loss of a prompt probe, the branch.
        combine: see ``combine_levels``.
        smooth: side of the mean filter on retained variances and losses, latent pixels, odd.

    Raises:
        ValueError: ``decide`` or ``combine`` is none of these.
    """
    if decide not in DECIDING:
        raise ValueError(f"decide: got {decide!r}, allowed {', '.join(DECIDING)}")
    now = now.smooth(smooth)
    baseline = baseline.smooth(smooth) if baseline else None
    null = null.smooth(smooth) if null else None
    beside = now.first(null.draws) if null else now  # the draws at which the unconditional branch was looked at
    loss_null = None
    if null is not None and eps is not None:
        loss_null = loss_log_ratio(eps[:, : null.draws], beside.epsilon, null.epsilon).smooth(smooth)
    found: dict[str, CurvatureMap | None] = {
        "collapse": collapse(baseline.rho, now.rho) if baseline else None,
        "log_ratio": log_ratio(baseline.rho, now.rho) if baseline else None,
        "score": score_difference(now.epsilon, baseline.epsilon) if baseline else None,
        "loss_log_ratio": loss_log_ratio(eps, now.epsilon, baseline.epsilon).smooth(smooth)
        if baseline and eps is not None
        else None,
        "collapse_null": collapse(null.rho, beside.rho) if null else None,
        "log_ratio_null": log_ratio(null.rho, beside.rho) if null else None,
        "score_null": score_difference(beside.epsilon, null.epsilon) if null else None,
    }
    if decide in ("both", "both_baselines"):
        deciding = mean_of_both(found["log_ratio"], found["loss_log_ratio"])
        against_null = mean_of_both(found["log_ratio_null"], loss_null)
        if decide == "both_baselines" and deciding is not None and against_null is not None:
            deciding = smaller(deciding, against_null)
    else:
        deciding = found[decide]
    reference = null if decide == "log_ratio_null" else baseline
    decisive = (
        combine_levels(deciding, free(reference.rho), combine)
        if deciding is not None and reference is not None
        else None
    )
    return Signals(raw=raw_curvature(now.rho), deciding=deciding, decisive=decisive, **found)


def mean_of_both(variance: CurvatureMap | None, loss: CurvatureMap | None) -> CurvatureMap | None:
    """Mean of two log ratios, one replicate a noise draw; the first alone where there is no loss."""
    if variance is None or loss is None:
        return variance
    return CurvatureMap((per_draw(variance, loss.samples.shape[-3]).samples + loss.samples) / 2)


def smaller(a: CurvatureMap, b: CurvatureMap) -> CurvatureMap:
    """The smaller of two maps, coordinate by coordinate, each with its own error."""
    n = max(a.samples.shape[-3], b.samples.shape[-3])
    a, b = a.repeated(n), b.repeated(n)
    return CurvatureMap(torch.where((a.mean <= b.mean)[..., None, :, :], a.samples, b.samples))


def per_draw(values: CurvatureMap, draws: int) -> CurvatureMap:
    """One replicate a noise draw: the mean over its blocks of test vectors (draws come first)."""
    *levels, blocks, h, w = values.samples.shape
    return CurvatureMap(values.samples.reshape(*levels, draws, blocks // draws, h, w).mean(-3))


def factor(log_value: float) -> float:
    """Variance reduction factor of a log ratio: exp, safely."""
    return math.exp(min(log_value, 50.0))
