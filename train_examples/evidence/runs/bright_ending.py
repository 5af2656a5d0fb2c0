"""Bright Ending attention (Chen et al., ICLR 2025): where the last denoising step looks at the prompt's final token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memwatch.denoiser import Conditioning, Denoiser


class Recorder:
    """An attention processor that does as the one it stands in for, and keeps the mean attention to one token."""

    def __init__(self, processor: Any, token: int, kept: list[Tensor]) -> None:
        self.processor, self.token, self.kept = processor, token, kept

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        self.kept.append(attn.get_attention_scores(query, key)[..., self.token].mean(0))  # over heads; one row
        output: Tensor = self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        return output


@contextmanager
def recording(unet: Any, token: int) -> Iterator[list[Tensor]]:
    """Cross-attention of the down blocks to ``token``, one ``(pixels,)`` per layer and call.

    The processors are given back as found.
    """
    modules = unet.named_modules()
    layers = [m for name, m in modules if name.startswith("down_blocks") and name.endswith("attn2")]
    kept: list[Tensor] = []
    before = [(layer, layer.processor) for layer in layers]
    try:
        for layer, processor in before:
            layer.processor = Recorder(processor, token, kept)
        yield kept
    finally:
        for layer, processor in before:
            layer.processor = processor


@torch.no_grad()
def bright_ending(
    denoiser: Denoiser, noisy_latents: Tensor, timestep: int, conditioning: Conditioning, token: int
) -> np.ndarray:
    """The map ``(h, w)``: mean over the largest down-block layers (64x64 for Stable Diffusion 1.x at 512 px).

    Args:
        noisy_latents: ``(c, h, w)``.
        token: place of the prompt's end token.
    """
    with recording(denoiser.model, token) as kept:
        timesteps = torch.tensor([timestep], device=denoiser.device)
        denoiser(noisy_latents[None].to(denoiser.device), timesteps, denoiser.stack([conditioning]))
    largest = max(attention.numel() for attention in kept)
    mean = torch.stack([attention for attention in kept if attention.numel() == largest]).mean(0)
    height = round((largest * noisy_latents.shape[1] / noisy_latents.shape[2]) ** 0.5)
    result: np.ndarray = mean.reshape(height, -1).float().cpu().numpy()
    return result
