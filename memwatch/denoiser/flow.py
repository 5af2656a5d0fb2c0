"""The rectified-flow transformers: Stable Diffusion 3 and 3.5, and Flux.1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memwatch.denoiser.base import Conditioning, Denoiser, config_of, is_a
from memwatch.denoiser.components import Components, clip_penultimate, clip_pooled, t5


class FlowDenoiser(Denoiser):
    """Rectified flow: ``x_t = (1 - sigma) z_0 + sigma eps`` with ``sigma = t / 1000``, sampled by Euler steps."""

    part = "transformer"
    even_sigmas = False  # for sampling, instead of the scheduler's own timesteps

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


class StableDiffusion3(FlowDenoiser):
    """Stable Diffusion 3 and 3.5: ``SD3Transformer2DModel``, two CLIP text encoders and, unless it was dropped, T5.

    The training scripts' ``--precondition_outputs`` only changes the loss: the output is the flow velocity either way.
    """

    name = "Stable Diffusion 3 / 3.5"
    pipeline = "StableDiffusion3Pipeline"
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional: tuple[str, ...] = ("text_encoder_3",)
    t5_tokens = 77  # diffusers' training scripts, --max_sequence_length

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
        *pairs, (tokenizer, encoder) = zip(components.tokenizers, components.text_encoders, strict=True)
        clip, pooled = zip(*(clip_penultimate(prompt, *pair) for pair in pairs), strict=True)
        tokens, width = self.t5_tokens, int(config_of(self.model, "joint_attention_dim"))
        long = torch.zeros(tokens, width) if encoder is None else t5(prompt, tokenizer, encoder, tokens)
        short = torch.cat(clip, dim=-1)
        short = nn.functional.pad(short, (0, width - short.shape[-1]))
        return {"encoder_hidden_states": torch.cat([short, long]), "pooled_projections": torch.cat(pooled)}


class Flux(FlowDenoiser):
    """Flux.1: ``FluxTransformer2DModel`` on packed latents, CLIP for the pooled embedding, T5 for the tokens.

    The model is distilled: guidance is an input and not a second branch, so prompt probes are sampled without
    classifier-free guidance.
    """

    name = "Flux.1"
    pipeline = "FluxPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    t5_tokens = 512  # diffusers' pipeline and LoRA script, --max_sequence_length
    longest = (1, t5_tokens)
    guided = False
    guidance = 3.5  # what the training scripts embed, --guidance_scale
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
        hidden, guided = conditioning["encoder_hidden_states"], config_of(self.model, "guidance_embeds")
        row, column = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        positions = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)
        output: Tensor = self.model(
            hidden_states=pack(noisy_latents),
            timestep=timesteps / 1000,
            encoder_hidden_states=hidden,
            guidance=torch.full((b,), self.guidance, device=noisy_latents.device) if guided else None,
            pooled_projections=conditioning["pooled_projections"],
            txt_ids=torch.zeros(hidden.shape[1], 3, device=hidden.device, dtype=hidden.dtype),
            img_ids=positions.to(noisy_latents),
            return_dict=False,
        )[0]
        return unpack(output, h, w)

    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        clip, long = zip(components.tokenizers, components.text_encoders, strict=True)
        pooled = clip_pooled(prompt, *clip)
        return {"encoder_hidden_states": t5(prompt, *long, self.t5_tokens), "pooled_projections": pooled}


def pack(latents: Tensor) -> Tensor:
    """``(b, c, h, w)`` to tokens ``(b, h/2 * w/2, 4 c)``: one token per 2x2 pixels."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of ``pack``."""
    b, _, channels = tokens.shape
    patches = tokens.reshape(b, h // 2, w // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, h, w)
