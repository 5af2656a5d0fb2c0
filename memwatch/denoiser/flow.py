"""What the rectified-flow transformers have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from memwatch.denoiser.base import Denoiser


class FlowDenoiser(Denoiser):
    """Rectified flow: ``x_t = (1 - sigma) z_0 + sigma eps`` with ``sigma = t / 1000``, sampled by Euler steps.

    Attributes:
        even_sigmas: whether sampling starts from evenly spaced sigmas instead of the scheduler's own timesteps.
    """

    part = "transformer"
    even_sigmas = False

    def sampler(self, scheduler: Any, num_inference_steps: int, side: int) -> Any:
        """The family's own scheduler, with its timestep shift for latents of ``side`` pixels."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        euler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if self.even_sigmas else None
        mu = None
        if euler.config.use_dynamic_shifting:  # linear in the number of tokens, as in diffusers
            low, high = euler.config.get("base_image_seq_len", 256), euler.config.get("max_image_seq_len", 4096)
            base, top = euler.config.get("base_shift", 0.5), euler.config.get("max_shift", 1.15)
            mu = float(base + (top - base) * ((side // self.patch) ** 2 - low) / (high - low))
        euler.set_timesteps(num_inference_steps, sigmas=sigmas, mu=mu)
        return euler
