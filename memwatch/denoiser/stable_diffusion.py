"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memwatch.denoiser.base import Conditioning, Denoiser, config_of
from memwatch.denoiser.components import Components
from memwatch.denoiser.text import warn_if_cut


class StableDiffusion(Denoiser):
    """Stable Diffusion 1.x and 2.x: ``UNet2DConditionModel``, one CLIP text encoder; epsilon or v_prediction; full or LoRA."""

    name = "Stable Diffusion 1.x / 2.x"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        same_channels = config_of(model, "in_channels") is not None and config_of(model, "in_channels") == config_of(model, "out_channels")
        other = any(config_of(model, key) for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"))
        return same_channels and bool(config_of(model, "cross_attention_dim")) and not other

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning["encoder_hidden_states"]
        output: Tensor = self.model(noisy_latents, timesteps, encoder_hidden_states=hidden, return_dict=False)[0]
        return output

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], components: Components) -> list[Conditioning]:
        tokenizer, text_encoder = components.tokenizer, components.text_encoder
        encoded: list[Conditioning] = []
        for prompt in prompts:
            warn_if_cut(prompt, tokenizer)
            limit = tokenizer.model_max_length
            tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=limit, return_tensors="pt").to(text_encoder.device)
            mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
            # clone: a tensor made under inference_mode could not enter a backward pass later
            encoded.append({"encoder_hidden_states": text_encoder(tokens.input_ids, attention_mask=mask)[0][0].float().cpu().clone()})
        return encoded
