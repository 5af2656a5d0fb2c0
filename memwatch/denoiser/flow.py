"""What the rectified-flow transformers have in common."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from memwatch.denoiser.base import Denoiser


class FlowDenoiser(Denoiser):
    """Rectified flow: ``x_t = (1 - sigma) z_0 + sigma eps`` with ``sigma = t / 1000``.

    The published way to look takes Euler steps in place of DDIM's.

    Attributes:
        even_sigmas: whether sampling starts from evenly spaced sigmas instead of the scheduler's own timesteps.
    """

    even_sigmas = False

    def sampler(self, scheduler: Any, num_inference_steps: int, side: int, fast: bool = False) -> Any:
        """The family's own scheduler, with its timestep shift for latents of ``side`` pixels.

        Args:
            fast: DPM-Solver++ (2M) with the same shift. Otherwise Euler steps, as the family's pipeline takes them.
        """
        from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

        euler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        mu = shift_of((side // self.patch) ** 2, euler.config) if euler.config.use_dynamic_shifting else None
        if fast:
            shift = euler.config.shift if mu is None else math.exp(mu)
            solver = DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            )
            solver.set_timesteps(num_inference_steps)
            return solver
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if self.even_sigmas else None
        euler.set_timesteps(num_inference_steps, sigmas=sigmas, mu=mu)
        return euler


def shift_of(tokens: int, config: Any) -> float:
    """The timestep shift of an image of ``tokens`` tokens: linear between the scheduler's two ends, as in diffusers."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(base + (top - base) * (tokens - low) / (high - low))
