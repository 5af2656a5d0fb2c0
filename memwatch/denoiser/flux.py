"""Flux.1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memwatch.denoiser.base import Conditioning, config_of, is_a
from memwatch.denoiser.components import Components
from memwatch.denoiser.flow import FlowDenoiser
from memwatch.denoiser.text import clip_pooled, t5

T5_TOKENS = 512  # diffusers' pipeline and LoRA script, --max_sequence_length
GUIDANCE = 3.5  # what the training scripts embed, --guidance_scale


class Flux(FlowDenoiser):
    """Flux.1: ``FluxTransformer2DModel`` on packed latents, CLIP for the pooled embedding, T5 for the tokens.

    ``predict`` packs the latents (2x2 pixels per token) and unpacks the output. The model is distilled: guidance is an
    input and not a second branch, so prompt probes are sampled without classifier-free guidance.
    """

    name = "Flux.1"
    pipeline = "FluxPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    longest = (1, T5_TOKENS)
    guided = False
    even_sigmas = True

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        channels = config_of(model, "in_channels")
        return is_a(model, "FluxTransformer2DModel") and channels == (config_of(model, "out_channels") or channels)

    @property
    def latent_channels(self) -> int:
        return int(config_of(self.model, "in_channels")) // 4

    @property
    def patch(self) -> int:
        return 2

    @property
    def sample_size(self) -> int:
        return 128  # the pipeline's; the model itself names none

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        b, _, h, w = noisy_latents.shape
        hidden = conditioning["encoder_hidden_states"]
        embeds_guidance = config_of(self.model, "guidance_embeds")
        output: Tensor = self.model(
            hidden_states=pack(noisy_latents),
            timestep=timesteps / 1000,
            encoder_hidden_states=hidden,
            guidance=torch.full((b,), GUIDANCE, device=noisy_latents.device) if embeds_guidance else None,
            pooled_projections=conditioning["pooled_projections"],
            txt_ids=torch.zeros(hidden.shape[1], 3, device=hidden.device, dtype=hidden.dtype),
            img_ids=positions(h // 2, w // 2).to(noisy_latents),
            return_dict=False,
        )[0]
        return unpack(output, h, w)

    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        (clip_encoder, t5_encoder), (clip_tokenizer, t5_tokenizer) = components.text_encoders, components.tokenizers
        pooled = clip_pooled(prompt, clip_tokenizer, clip_encoder)
        return {"encoder_hidden_states": t5(prompt, t5_tokenizer, t5_encoder, T5_TOKENS), "pooled_projections": pooled}


def pack(latents: Tensor) -> Tensor:
    """``(b, c, h, w)`` to tokens ``(b, h/2 * w/2, 4 c)``: one token per 2x2 pixels."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of ``pack``."""
    b, _, channels = tokens.shape
    patches = tokens.reshape(b, h // 2, w // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, h, w)


def positions(rows: int, columns: int) -> Tensor:
    """The tokens' coordinates, shape ``(rows * columns, 3)``: 0, row, column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)
