"""Prediction type: whether the network predicts epsilon or ``v_prediction``, told from data.

The noise of reference probes is known, and shows which of the two types denoises. What the output m leaves unexplained
of a target at one noise level is ``R = |m - target|^2 / |target|^2``, with the target eps or ``v = alpha eps - sigma
z_0``, over all reference probes, draws and coordinates. Levels are averaged by how far apart the two targets lie there,
``|v - eps|^2 / (|v|^2 + |eps|^2)``: at low noise they are nearly the same.

On tiny-sd, with pictures seen, unseen, flat or noise, the right type leaves at most 0.33, and the other one at least
2.3 times as much. An untrained network leaves 1.1 by either, and so contradicts none.
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
        schedule: with the declared type. source: where that is from; ``None`` where the caller passed the scheduler.

    Attributes:
        settled: whether the declared type has been seen to denoise, so that nobody asks again.
    """

    def __init__(self, schedule: NoiseSchedule, source: str | None) -> None:
        self.schedule, self.source, self.settled = schedule, source, False

    def contradiction(self, observations: Sequence[Observation], latents: Mapping[str, Tensor]) -> str | None:
        """Why nothing can be judged: the model clearly predicts the other type. ``None`` where that cannot be told.

        Args:
            observations: of one event. latents: z_0 of reference probes by name, ``(c, h, w)``.
        """
        left = None if self.settled else unexplained(self.schedule, observations, latents)
        if left is None:
            return None
        ours = self.schedule.prediction_type
        (theirs,) = left.keys() - {ours}
        right, other = left[ours], left[theirs]
        self.settled = right <= EXPLAINED and other >= CLEARLY * right
        if not (other <= EXPLAINED and right >= CLEARLY * other):
            return None
        numbers = f"it leaves {left[theirs]:.2f} of that unexplained, and {left[ours]:.2f} of {ours}"
        fix = "does training set prediction_type? Pass the scheduler that it trains with (scheduler=noise_scheduler)"
        cause = f"the model is read as {ours}, by the scheduler of {self.source}, but it denoises as {theirs}; {fix}"
        if self.source is None:
            fix = "where training has just changed it (--prediction_type), memwatch waits until the model has followed"
            cause = f"the scheduler that was passed says {ours}, but the model still denoises as {theirs}; {fix}"
        return f"{cause} ({numbers}). Until it is settled, nothing is judged and no baseline is taken"


def unexplained(
    schedule: NoiseSchedule, observations: Sequence[Observation], latents: Mapping[str, Tensor]
) -> dict[str, float] | None:
    """R of ``epsilon`` and of ``v_prediction``, 0 is all explained; ``None`` where it cannot be told.

    Observations without z_0 among ``latents``, and without known noise, say nothing.
    """
    if schedule.prediction_type not in ("epsilon", "v_prediction"):
        return None
    levels: dict[float, list[Tensor]] = {}
    for o in observations:
        if o.name in latents and o.eps is not None and o.now.finite:
            for t, epsilon, eps in zip(o.timesteps, o.now.epsilon, o.eps, strict=True):
                if float(schedule.alpha_sigma(torch.tensor([t]), torch.zeros(1))[0]) >= SMALLEST_ALPHA:
                    levels.setdefault(t, []).append(_squares(schedule, epsilon, eps, latents[o.name], t))
    sums = [torch.stack(found).sum(0) for found in levels.values()]
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
