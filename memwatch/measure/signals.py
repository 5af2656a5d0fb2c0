"""Signals: what has changed between an earlier and a later measurement, per coordinate. Pure functions on maps.

Kim & Lee, ICML 2026 (arXiv 2605.26756), in retained variances ``rho = 1 - sigma * d eps_i / d x_i``: 1 is free, 0 is
pinned. Maps are means over channels. Shapes: retained variances ``(levels, n, h, w)``, epsilon ``(levels, draws, c, h,
w)``.

The map that decides is made of one *term*, the natural log of a factor (see ``log_ratio``) by which the denoising loss
or the retained variance has fallen, in three *comparisons*:

| | earlier -> now | asks |
|---|---|---|
| ``S`` snapshot | baseline with the prompt -> now with the prompt | what has this model begun to store? |
| ``N`` unconditional | now without the prompt -> now with the prompt | is it the prompt that brings it? |
| ``K`` branch | baseline without the prompt -> now without | what has the unconditional branch itself begun to store? |

``against: both`` is ``min(S, N + relu(K - k0))``, see ``decide``. It tells whether something is stored and, after a
mean filter, where; S alone says by how much it has fallen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.probes import Probe

SMALLEST_RHO = 1e-3  # below this no estimator of practical size tells a retained variance from zero
RHO_FLOOR = 0.05  # of retained variance: what is left below counts as none
LOSS_FLOOR = 1.0  # times the controls' mean loss at the level before training: what is left below counts as little
SMALLEST_LOSS = 1e-6  # keeps the ratio finite where nothing gives a floor
DECIDED_ON = 1  # side of the mean filter on what decides: none, because controls show the same noise
BRANCH_QUANTILE = 0.9  # over pixels: what the unconditional branch has lost on a control anyway


def log_ratio(baseline: CurvatureMap, now: CurvatureMap, floor: float | Tensor) -> CurvatureMap:
    """Log of the factor by which something has fallen: ``log((baseline + floor) / (now + floor))``.

    The floor keeps out ratios of next to nothing, as on plain backgrounds. Replicates are averaged before the ratio;
    the error is the paired one, by linearization (delta method).

    >>> before, now = (CurvatureMap(torch.full((1, 2, 1, 1), rho)) for rho in (0.95, 0.15))
    >>> round(factor(log_ratio(before, now, RHO_FLOOR).mean.item()), 4)
    5.0
    """
    b, a = ((values.mean.clamp(min=0) + floor)[..., None, :, :] for values in (baseline, now))
    deviation = (baseline.samples - baseline.mean[..., None, :, :]) / b - (now.samples - now.mean[..., None, :, :]) / a
    return CurvatureMap(torch.log(b / a) + deviation)


def free(baseline: CurvatureMap) -> Tensor:
    """Where the baseline leaves freedom that the estimator can resolve (``rho > 2 sem``): bool ``(levels, h, w)``."""
    return (baseline.mean > 2.0 * baseline.sem) & (baseline.mean > SMALLEST_RHO)


def squared_difference(a: Tensor, b: Tensor) -> CurvatureMap:
    """``(a - b)^2``, mean over channels, one replicate per noise draw: samples ``(levels, draws, h, w)``."""
    return CurvatureMap((a - b).square().mean(-3))


@dataclass(frozen=True)
class Comparison:
    """Two measurements at the same noisy latents with the same test vectors: every signal of the step earlier -> now.

    Attributes:
        score: squared difference of epsilon, samples ``(levels, draws, h, w)``; the paper's ``sigma^2 * Delta s``.
            Against the unconditional branch it is the per-coordinate signal of Wen et al. 2024.
        collapse: ``rho_earlier - rho_now`` in [-1, 1], samples ``(levels, n, h, w)``; the paper's ``sigma^2 * Delta
            h``. variance: ``log_ratio`` of the same. is_free: see ``free``. ``None`` where either side lacks curvature.
        loss: ``log_ratio`` of the denoising losses, samples ``(levels, draws, h, w)``; ``None`` without true noise.
    """

    score: CurvatureMap
    collapse: CurvatureMap | None = None
    variance: CurvatureMap | None = None
    is_free: Tensor | None = None
    loss: CurvatureMap | None = None

    @classmethod
    def of(
        cls, earlier: Measurement, now: Measurement, eps: Tensor | None, smooth: int, floor: Tensor | None = None
    ) -> Comparison:
        """Compare.

        Args:
            eps: true noise. floor: of the loss, ``(levels,)``, see ``loss_floor``; 0 without.
            smooth: side of the mean filter on rho and losses, latent pixels, odd.
        """
        found = cls(squared_difference(now.epsilon, earlier.epsilon))
        if eps is not None:
            before, after = (squared_difference(m.epsilon, eps).smooth(smooth) for m in (earlier, now))
            floor = torch.zeros(len(eps)) if floor is None else floor
            found = replace(found, loss=log_ratio(before, after, floor[:, None, None] + SMALLEST_LOSS))
        if earlier.rho is None or now.rho is None:
            return found
        rho_earlier, rho_now = earlier.rho.smooth(smooth), now.rho.smooth(smooth)
        return replace(
            found,
            collapse=rho_earlier - rho_now,
            variance=log_ratio(rho_earlier, rho_now, RHO_FLOOR),
            is_free=free(rho_earlier),
        )

    def term(self, terms: str) -> CurvatureMap | None:
        """``variance`` or ``loss``; ``None`` where it was not measured.

        A variance is 0 where the earlier measurement leaves no freedom to lose.
        """
        if terms == "loss":
            return self.loss
        if self.variance is None or self.is_free is None:
            return None
        return CurvatureMap(self.variance.samples.where(self.is_free[:, None], 0.0))


@dataclass(frozen=True)
class Signals:
    """All signals of one probe at one event.

    Attributes:
        snapshot, unconditional, branch: the comparisons S, N and K; ``None`` where either side was not measured.
        raw: ``1 - rho_now``, how pinned a coordinate is, samples ``(levels, n, h, w)``; ``None`` without curvature.
            Plain backgrounds are pinned as well, so it never decides.
        deciding: see ``decide``; unfiltered. decisive: its mean over levels, samples ``(n, h, w)``, natural log of a
            factor, from which verdicts come. ``None`` where nothing can be compared.
        heatmap: the same after the mean filter, from which regions and pictures come.
        fallen: of S alone, after the mean filter, from which severities come; of N with ``against: unconditional``.
    """

    snapshot: Comparison | None
    unconditional: Comparison | None
    branch: Comparison | None
    raw: CurvatureMap | None
    deciding: CurvatureMap | None = None
    decisive: CurvatureMap | None = None
    heatmap: CurvatureMap | None = None
    fallen: CurvatureMap | None = None

    @classmethod
    def of(cls, o: Observation, smooth: int, floor: Tensor | None = None) -> Signals:
        """Every comparison that an observation allows; nothing is decided yet. ``floor``: see ``loss_floor``."""

        def compared(earlier: Measurement | None, now: Measurement | None) -> Comparison | None:
            if earlier is None or now is None:
                return None
            return Comparison.of(earlier, now, o.eps, smooth, floor)

        return cls(
            snapshot=compared(o.baseline, o.now),
            unconditional=compared(o.unconditional, o.now),
            branch=compared(o.unconditional_baseline, o.unconditional),
            raw=None if o.now.rho is None else CurvatureMap(1 - o.now.rho.smooth(smooth).samples),
        )

    def maps(self) -> dict[str, CurvatureMap]:
        """Those that exist, by the names that files and logged keys use."""
        found: dict[str, CurvatureMap | None] = {"raw": self.raw, "decisive": self.decisive, "heatmap": self.heatmap}
        if (s := self.snapshot) is not None:
            found |= {"collapse": s.collapse, "log_ratio": s.variance, "score": s.score, "loss_log_ratio": s.loss}
        if (u := self.unconditional) is not None:
            found |= {"collapse_null": u.collapse, "log_ratio_null": u.variance, "score_null": u.score}
        return {name: value for name, value in found.items() if value is not None}


def decide(signals: Signals, terms: str, against: str, expected: Tensor | None = None) -> CurvatureMap | None:
    """The map that decides, level by level, samples ``(levels, n, h, w)``; ``None`` where nothing can be compared.

    ``both`` is ``min(S, N + relu(K - k0))``: fallen since the baseline, *and* not explained by the model without the
    prompt, where N is corrected for what the unconditional branch has memorized itself (few captions, dropped
    captions). Where it was not measured, S decides alone.

    ``expected`` is k0, ``(levels,)``: what the branch has lost on controls, see ``branch_quantile``; 0 without.
    """
    comparisons = (signals.snapshot, signals.unconditional, signals.branch)
    s, n, k = (None if c is None else c.term(terms) for c in comparisons)
    if against == "unconditional":
        return n
    if against == "snapshot" or s is None or n is None:
        return s
    if k is not None:
        k0 = torch.zeros(len(k.samples)) if expected is None else expected
        over = k.mean > k0[:, None, None]
        n = CurvatureMap(n.samples + (k.samples - k0[:, None, None, None]).where(over[:, None], 0.0))
    return CurvatureMap(torch.where((s.mean <= n.mean)[..., None, :, :], s.samples, n.samples))  # each with its error


def branch_quantile(signals: Signals, terms: str) -> Tensor | None:
    """What the unconditional branch has lost on a picture, a high quantile over pixels, ``(levels,)``; if measured."""
    k = None if signals.branch is None else signals.branch.term(terms)
    return None if k is None else k.mean.flatten(1).quantile(BRANCH_QUANTILE, dim=1)


def loss_floor(observations: Sequence[Observation], probe: Probe) -> Tensor | None:
    """What the loss of a probe is floored by, ``(levels,)``: the mean loss of the controls of its kind before training.

    So the log ratio means the same at every noise level and for every model. Without controls all probes of its kind
    count; ``None`` where no loss is known.
    """
    same = [o for o in observations if o.finite and o.eps is not None and o.probe.is_reference is probe.is_reference]
    group = [o for o in same if o.probe.is_control] or same
    losses = [((o.baseline or o.now).epsilon - o.eps).square().mean((1, 2, 3, 4)) for o in group if o.eps is not None]
    return LOSS_FLOOR * torch.stack(losses).mean(0) if losses else None


def compute_signals(
    observations: Sequence[Observation], *, terms: str, against: str, smooth: int
) -> dict[str, Signals | None]:
    """Every signal of every probe at one event, by name; ``None`` where its measurements are not finite.

    Args:
        smooth: side of the mean filter on losses and retained variances, for what is shown and for severities, not T.
    """
    one_of_kind = {o.probe.is_reference: o.probe for o in observations}
    floors = {kind: loss_floor(observations, probe) for kind, probe in one_of_kind.items()}

    def filtered(size: int) -> dict[str, Signals | None]:
        found = [(o, Signals.of(o, size, floors[o.probe.is_reference]) if o.finite else None) for o in observations]
        return decided([(o.probe, signals) for o, signals in found], terms, against)

    plain = filtered(DECIDED_ON)
    shown = plain if smooth == DECIDED_ON else filtered(smooth)
    return {
        name: s and (p := plain[name]) and replace(s, deciding=p.deciding, decisive=p.decisive)
        for name, s in shown.items()
    }


def decided(probes: Sequence[tuple[Probe, Signals | None]], terms: str, against: str) -> dict[str, Signals | None]:
    """The signals of all probes of an event with the maps that take their controls.

    k0 is the largest ``branch_quantile`` of any control of the probe's kind (reference or prompt) but itself: a loss of
    the branch counts as stored only as far as it exceeds every control's.
    """
    lost = [(p, q) for p, s in probes if p.is_control and s and (q := branch_quantile(s, terms)) is not None]

    def one(probe: Probe, signals: Signals) -> Signals:
        others = [q for p, q in lost if p.name != probe.name and p.is_reference is probe.is_reference]
        deciding = decide(signals, terms, against, torch.stack(others).amax(0) if others else None)
        decisive = None if deciding is None else CurvatureMap(deciding.samples.mean(0))
        since = None if against == "unconditional" or signals.snapshot is None else signals.snapshot.term(terms)
        fallen = decisive if since is None else CurvatureMap(since.samples.mean(0))
        return replace(signals, deciding=deciding, decisive=decisive, heatmap=decisive, fallen=fallen)

    return {probe.name: None if signals is None else one(probe, signals) for probe, signals in probes}


def factor(log_value: float) -> float:
    """The factor whose natural log is given: exp, kept finite."""
    return math.exp(min(log_value, 50.0))
