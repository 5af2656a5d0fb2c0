"""Families: which of the models that memwatch knows a model is."""

from __future__ import annotations

from torch import nn

from memwatch.denoiser.base import Denoiser, config_of
from memwatch.denoiser.flow import Flux, StableDiffusion3
from memwatch.denoiser.unets import StableDiffusion, StableDiffusionXL, Unconditional

FAMILIES: tuple[type[Denoiser], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Unconditional)


def family_of(model: nn.Module) -> type[Denoiser]:
    """The family of an unwrapped model; a ``ValueError`` that says what memwatch knows, and what is missing."""
    for family in FAMILIES:
        if family.fits(model):
            return family
    keys = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "class_embed_type")
    seen = ", ".join(f"{key}={config_of(model, key)!r}" for key in keys)
    known = "; ".join(family.name for family in FAMILIES)
    lacks = f" ({reason})" if (reason := _what_is_missing(model)) else ""
    raise ValueError(f"model {type(model).__name__} ({seen}) is of no family that memwatch knows: {known}{lacks}")


def _what_is_missing(model: nn.Module) -> str:
    """Why memwatch cannot watch a model that people do fine-tune; empty for any other model."""
    kind, channels = type(model).__name__, config_of(model, "in_channels")
    if "ControlNet" in kind or "T2IAdapter" in kind:
        needs = "a probe would need a control image, and memwatch the frozen denoiser beside the trained network"
        return f"{kind} is no denoiser: {needs}"
    more = {8: "the image to be edited (InstructPix2Pix)", 9: "a mask and the masked image (inpainting)"}
    if "UNet2DConditionModel" in kind and channels in more:
        return f"it takes {channels} channels: a probe would need {more[channels]} beside its noisy latents"
    if config_of(model, "class_embed_type") or config_of(model, "num_class_embeds"):
        return "it takes class labels, which probes do not have"
    return ""
