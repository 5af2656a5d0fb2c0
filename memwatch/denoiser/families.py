"""Which family a model belongs to."""

from __future__ import annotations

from torch import nn

from memwatch.denoiser.base import Denoiser, config_of
from memwatch.denoiser.stable_diffusion import StableDiffusion
from memwatch.noise import NoiseSchedule

FAMILIES: tuple[type[Denoiser], ...] = (StableDiffusion,)


def make_denoiser(model: nn.Module, schedule: NoiseSchedule) -> Denoiser:
    """The denoiser of ``model``'s family.

    Raises:
        ValueError: no known family fits; the message says what the model's config holds and which families exist.
    """
    for family in FAMILIES:
        if family.fits(model):
            return family(model, schedule)
    keys = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "class_embed_type")
    seen = ", ".join(f"{key}={config_of(model, key)!r}" for key in keys)
    known = "; ".join(family.name for family in FAMILIES)
    raise ValueError(f"model {type(model).__name__} ({seen}) is of no family that memwatch knows: {known}")
