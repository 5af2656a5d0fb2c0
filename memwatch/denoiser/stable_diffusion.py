"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memwatch.denoiser.base import Conditioning, Denoiser, config_of
from memwatch.denoiser.components import Components
from memwatch.denoiser.text import kept, tokenize


def is_plain_unet(model: nn.Module) -> bool:
    """Whether ``model`` is a text-conditioned UNet whose only image input is the noisy latents."""
    channels = config_of(model, "in_channels")
    other = config_of(model, "class_embed_type") or config_of(model, "encoder_hid_dim_type")
    same = channels is not None and channels == config_of(model, "out_channels")
    return same and bool(config_of(model, "cross_attention_dim")) and not other


class StableDiffusion(Denoiser):
    """Stable Diffusion 1.x and 2.x: ``UNet2DConditionModel`` with one CLIP text encoder; epsilon or v_prediction."""

    name = "Stable Diffusion 1.x / 2.x"
    pipeline = "StableDiffusionPipeline"
    text_encoders = ("text_encoder",)

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return is_plain_unet(model) and not config_of(model, "addition_embed_type")

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning["encoder_hidden_states"]
        output: Tensor = self.model(noisy_latents, timesteps, encoder_hidden_states=hidden, return_dict=False)[0]
        return output

    @torch.no_grad()
    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        (text_encoder,), (tokenizer,) = components.text_encoders, components.tokenizers
        tokens = tokenize(prompt, tokenizer).to(text_encoder.device)
        mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
        return {"encoder_hidden_states": kept(text_encoder(tokens.input_ids, attention_mask=mask)[0])}
