"""The one place that knows foreign models: every family becomes ``epsilon = denoiser(noisy_latents, timesteps, conditioning)``.

A new family is one file with one subclass of ``Denoiser`` and one entry in ``families.FAMILIES``.
"""

from memwatch.denoiser.base import Conditioning, Denoiser
from memwatch.denoiser.borrow import borrow, unwrap
from memwatch.denoiser.components import Components, load_components
from memwatch.denoiser.families import FAMILIES, make_denoiser
from memwatch.denoiser.stable_diffusion import StableDiffusion

__all__ = ["FAMILIES", "Components", "Conditioning", "Denoiser", "StableDiffusion", "borrow", "load_components", "make_denoiser", "unwrap"]
