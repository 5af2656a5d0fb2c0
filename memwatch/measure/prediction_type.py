"""Prediction type: whether the network predicts epsilon or ``v_prediction``, told from data.

Loops choose the prediction type (``noise_scheduler.register_to_config(prediction_type=...)``), and a network does not
say which it was. But the noise of reference probes is known, and shows which of the two types denoises.

What the output m leaves unexplained of a target at one noise level is ``R = |m - target|^2 / |target|^2``, with the
target eps or ``v = alpha eps - sigma z_0``, over all reference probes, draws and coordinates. Levels are averaged by
how far apart the two targets lie there, ``|v - eps|^2 / (|v|^2 + |eps|^2)``: at low noise they are nearly the same.

Measured on tiny-sd at the shipped levels (R of the right type, R of the other):

| network | pictures trained on | never seen | flat | white noise |
|---|---|---|---|---|
| tiny-sd, epsilon | 0.03, 1.13 | 0.07, 1.30 | 0.01, 0.96 | 0.04, 1.53 |
| the same, its output turned into v | 0.14, 1.08 | 0.33, 0.93 | 0.02, 1.82 | 0.29, 0.68 |
| untrained (epsilon, v) | 1.10, 1.07 | 1.10, 1.18 | 1.10, 1.06 | 1.10, 1.32 |

The right type leaves at most 0.33, and the other one at least 2.3 times as much. A clear contradiction takes 0.5 and
1.5 times. An untrained network explains nothing by either type, and so contradicts none. A training from scratch
favours what it is trained for from its 5th step on; tiny-sd, trained on as v at a rate of 1e-4, contradicts v for some
dozens of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.measurement import Observation

EXPLAINED = 0.5  # R of a type that denoises is at most this
CLEARLY = 1.5  # times as large is the R of the other one
SMALLEST_ALPHA = 0.05  # below, the output cannot be got back from epsilon


class PredictionTypeCheck:
    """Whether the declared prediction type is the network's own, over the events of a run.

    Args:
        schedule: with the declared type.
        source: where that type is from, for people; ``None`` where the caller passed the scheduler.

    Attributes:
        settled: whether the declared type has been seen to denoise, so that nobody asks again.
    """

    def __init__(self, schedule: NoiseSchedule, source: str | None) -> None:
        self.schedule, self.source = schedule, source
        self.settled = False

    def contradiction(self, observations: Sequence[Observation], latents: Mapping[str, Tensor]) -> str | None:
        """Why nothing can be judged: the model clearly predicts the other type.

        Args:
            observations: of one event. latents: z_0 of reference probes by name, ``(c, h, w)``.

        Returns:
            ``None`` where the declared type denoises, and where it cannot be told: other prediction types, no reference
            probe, an untrained network.
        """
        left = None if self.settled else unexplained(self.schedule, observations, latents)
        if left is None:
            return None
        ours = self.schedule.prediction_type
        (theirs,) = left.keys() - {ours}
        self.settled = _is_clear(left[ours], left[theirs])
        if not _is_clear(left[theirs], left[ours]):
            return None
        numbers = f"it leaves {left[theirs]:.2f} of that unexplained, and {left[ours]:.2f} of {ours}"
        fix = "does training set prediction_type? Pass the scheduler that it trains with (scheduler=noise_scheduler)"
        cause = f"the model is read as {ours}, by the scheduler of {self.source}, but it denoises as {theirs}; {fix}"
        if self.source is None:
            fix = "where training has just changed it (--prediction_type), memwatch waits until the model has followed"
            cause = f"the scheduler that was passed says {ours}, but the model still denoises as {theirs}; {fix}"
        return f"{cause} ({numbers}). Until it is settled, nothing is judged and no baseline is taken"


def _is_clear(right: float, other: float) -> bool:
    """Whether the type with this R denoises, and the other one clearly does not."""
    return right <= EXPLAINED and other >= CLEARLY * right


def unexplained(
    schedule: NoiseSchedule, observations: Sequence[Observation], latents: Mapping[str, Tensor]
) -> dict[str, float] | None:
    """R of ``epsilon`` and of ``v_prediction``, 0 is all explained; ``None`` where it cannot be told.

    Args:
        schedule: variance preserving, with the prediction type by which epsilon was read.
        latents: z_0 by name; observations without it, and without known noise, say nothing.
    """
    if schedule.prediction_type not in ("epsilon", "v_prediction"):
        return None
    levels: dict[float, list[Tensor]] = {}
    for o in observations:
        if o.name in latents and o.eps is not None and o.now.finite:
            for t, epsilon, eps in zip(o.timesteps, o.now.epsilon, o.eps, strict=True):
                levels.setdefault(t, []).append(_squares(schedule, epsilon, eps, latents[o.name], t))

    def alpha(timestep: float) -> float:
        return float(schedule.alpha_sigma(torch.tensor([timestep]), torch.zeros(1))[0])

    sums = [torch.stack(found).sum(0) for t, found in levels.items() if alpha(t) >= SMALLEST_ALPHA]
    if not sums:
        return None
    eps_error, v_error, eps_size, v_size, apart = torch.stack(sums, dim=1)
    weight = apart / (eps_size + v_size)
    left = {"epsilon": eps_error / eps_size, "v_prediction": v_error / v_size}
    return {name: float((weight * r).sum() / weight.sum()) for name, r in left.items()}


def _squares(schedule: NoiseSchedule, epsilon: Tensor, eps: Tensor, z_0: Tensor, timestep: float) -> Tensor:
    """Sums of squares at one level, ``(5,)``: of both errors, of both targets, and of the difference of these."""
    alpha, sigma = schedule.alpha_sigma(torch.full((len(eps),), timestep), eps)
    v, output = alpha * eps - sigma * z_0, epsilon
    if schedule.prediction_type == "v_prediction":
        output = (epsilon - sigma * (alpha * z_0 + sigma * eps)) / alpha
    return torch.stack([x.double().square().sum() for x in (output - eps, output - v, eps, v, v - eps)])
