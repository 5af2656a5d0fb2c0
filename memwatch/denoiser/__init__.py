"""The one place that knows foreign models.

Every family becomes ``epsilon = denoiser(noisy_latents, timesteps, conditioning)``. A new family is one subclass of
``Denoiser`` and one entry in ``families.FAMILIES``.
"""

from memwatch.denoiser.base import Conditioning, Denoiser, dtype_of, to_device
from memwatch.denoiser.borrow import borrow, can_checkpoint, checkpointed, untouched_streams, unwrap
from memwatch.denoiser.components import Components, aligned, as_tuple, load_components
from memwatch.denoiser.families import family_of
from memwatch.denoiser.flow import Flux, StableDiffusion3
from memwatch.denoiser.unets import StableDiffusion, Unconditional

__all__ = [
    "Components",
    "Conditioning",
    "Denoiser",
    "Flux",
    "StableDiffusion",
    "StableDiffusion3",
    "Unconditional",
    "aligned",
    "as_tuple",
    "borrow",
    "can_checkpoint",
    "checkpointed",
    "dtype_of",
    "family_of",
    "load_components",
    "to_device",
    "untouched_streams",
    "unwrap",
]
