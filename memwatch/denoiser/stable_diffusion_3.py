"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memwatch.denoiser.base import Conditioning, config_of, is_a
from memwatch.denoiser.components import Components
from memwatch.denoiser.flow import FlowDenoiser
from memwatch.denoiser.text import clip_penultimate, t5

T5_TOKENS = 77  # diffusers' SD 3 training scripts, --max_sequence_length


class StableDiffusion3(FlowDenoiser):
    """Stable Diffusion 3 and 3.5: ``SD3Transformer2DModel``, two CLIP text encoders and, unless it was dropped, T5.

    The training scripts' ``--precondition_outputs`` only changes the loss: the output is the flow velocity either way.
    """

    name = "Stable Diffusion 3 / 3.5"
    pipeline = "StableDiffusion3Pipeline"
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional: tuple[str, ...] = ("text_encoder_3",)

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        same = config_of(model, "in_channels") == config_of(model, "out_channels")
        return is_a(model, "SD3Transformer2DModel") and same

    @property
    def patch(self) -> int:
        return int(config_of(self.model, "patch_size") or 1)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.model(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            pooled_projections=conditioning["pooled_projections"],
            return_dict=False,
        )[0]
        return output

    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        pairs = zip(components.tokenizers[:2], components.text_encoders[:2], strict=True)
        clip, pooled = zip(*(clip_penultimate(prompt, *pair) for pair in pairs), strict=True)
        width = int(config_of(self.model, "joint_attention_dim"))
        tokenizer, text_encoder = components.tokenizers[2], components.text_encoders[2]
        long = torch.zeros(T5_TOKENS, width) if text_encoder is None else t5(prompt, tokenizer, text_encoder, T5_TOKENS)
        short = torch.cat(clip, dim=-1)
        short = nn.functional.pad(short, (0, width - short.shape[-1]))
        return {"encoder_hidden_states": torch.cat([short, long]), "pooled_projections": torch.cat(pooled)}
