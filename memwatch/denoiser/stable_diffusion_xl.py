"""Stable Diffusion XL."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memwatch.denoiser.base import Conditioning, Denoiser, config_of
from memwatch.denoiser.components import Components
from memwatch.denoiser.stable_diffusion import is_plain_unet
from memwatch.denoiser.text import clip_penultimate


class StableDiffusionXL(Denoiser):
    """Stable Diffusion XL: ``UNet2DConditionModel``, two CLIP text encoders, pooled embedding and size conditioning.

    Its size conditioning is that of generating: original and target size are the resolution, and nothing is cropped.
    """

    name = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return is_plain_unet(model) and config_of(model, "addition_embed_type") == "text_time"

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        added = {"text_embeds": conditioning["text_embeds"], "time_ids": conditioning["time_ids"]}
        hidden = conditioning["encoder_hidden_states"]
        output: Tensor = self.model(noisy_latents, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]
        return output

    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        pairs = zip(components.tokenizers, components.text_encoders, strict=True)
        (first, _), (second, pooled) = (clip_penultimate(prompt, *pair) for pair in pairs)
        time_ids = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
        return {
            "encoder_hidden_states": torch.cat([first, second], dim=-1),
            "text_embeds": pooled,
            "time_ids": time_ids,
        }

    def encode_unconditional(self, components: Components, resolution: int) -> Conditioning:
        """Zeros, or the empty prompt where the pipeline's ``force_zeros_for_empty_prompt`` is off."""
        empty = self.encode("", components, resolution)
        if not components.zero_unconditional:
            return empty
        return {key: value if key == "time_ids" else torch.zeros_like(value) for key, value in empty.items()}
