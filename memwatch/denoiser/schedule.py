"""The noise schedule of any diffusers scheduler, and epsilon from every prediction type.

``x_t = alpha z_0 + sigma eps``. Variance preserving: ``alpha^2 = alpha_bar_t``, ``sigma^2 = 1 - alpha_bar_t``.
Rectified flow (Stable Diffusion 3, Flux): ``sigma = t / 1000``, ``alpha = 1 - sigma``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha ``(T,)``, float64, of every training timestep; ``None`` for rectified flow, which takes any real timestep.

    A prediction type that is unknown or does not fit ``alphas`` is a ``ValueError``.
    """

    alphas: Tensor | None
    num_train_timesteps: int
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type: got {self.prediction_type!r}, allowed {', '.join(PREDICTION_TYPES)}")
        if (self.alphas is None) != (self.prediction_type == "flow"):
            raise ValueError(f"prediction_type {self.prediction_type!r} does not fit this scheduler's noise schedule")

    @classmethod
    def from_scheduler(cls, scheduler: Any, prediction_type: str | None = None) -> NoiseSchedule:
        """Read a diffusers scheduler: one with ``alphas_cumprod``, or for flow matching; else it is a ``ValueError``.

        ``prediction_type`` overrides the scheduler's own.
        """
        declared = prediction_type or getattr(scheduler.config, "prediction_type", None)
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if declared in ("flow", "flow_prediction") or "FlowMatch" in type(scheduler).__name__:
            return cls(None, scheduler.config.num_train_timesteps, "flow")
        if alphas_cumprod is None:
            kind = type(scheduler).__name__
            raise ValueError(f"scheduler {kind} has no alphas_cumprod and is not a flow-matching scheduler")
        alpha_bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        return cls(alpha_bar.sqrt(), len(alpha_bar), declared or "epsilon")

    def alpha_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of ``timesteps`` ``(b,)``, each ``(b, 1, ...)``, in dtype and on device of ``like``."""
        t = timesteps.detach().cpu()
        if self.alphas is None:
            sigma = t.double() / self.num_train_timesteps
            alpha = 1 - sigma
        else:
            alpha = self.alphas[t.long()]
            sigma = (1 - alpha**2).sqrt()
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.to(like).reshape(shape), sigma.to(like).reshape(shape)

    def add_noise(self, latents: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """``x_t = alpha z_0 + sigma eps`` of ``latents`` z_0 and noise ``eps``, both ``(b, c, h, w)``."""
        alpha, sigma = self.alpha_sigma(timesteps, latents)
        return alpha * latents + sigma * eps

    def epsilon(self, model_output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The epsilon that a model output stands for, whatever its prediction type; differentiable in both tensors."""
        alpha, sigma = self.alpha_sigma(timesteps, noisy_latents)
        match self.prediction_type:
            case "epsilon":
                return model_output
            case "v_prediction":
                return alpha * model_output + sigma * noisy_latents
            case "sample":
                return (noisy_latents - alpha * model_output) / sigma
            case _:  # flow: v = eps - z_0
                return noisy_latents + (1 - sigma) * model_output
