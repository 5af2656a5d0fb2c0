"""Prompts to embeddings, as diffusers' pipelines and training scripts make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tokenize(prompt: str, tokenizer: Any, length: int | None = None) -> Any:
    """A batch of one prompt's tokens, padded or cut to ``length``; by default to the tokenizer's own length."""
    length = tokenizer.model_max_length if length is None else length
    return tokenizer(prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def kept(embedding: Tensor) -> Tensor:
    """The only row of a batch, float32 on the CPU."""
    return embedding[0].float().cpu().clone()  # one made under ``inference_mode`` can take no part in a backward pass


@torch.no_grad()
def clip_penultimate(prompt: str, tokenizer: Any, text_encoder: Any) -> tuple[Tensor, Tensor]:
    """Last hidden state but one ``(tokens, width)`` and pooled projection ``(width,)`` of CLIP (SDXL, SD 3)."""
    output = text_encoder(tokenize(prompt, tokenizer).input_ids.to(text_encoder.device), output_hidden_states=True)
    return kept(output.hidden_states[-2]), kept(output[0])


@torch.no_grad()
def clip_pooled(prompt: str, tokenizer: Any, text_encoder: Any) -> Tensor:
    """The pooled output of a CLIP text encoder (Flux), shape ``(width,)``."""
    return kept(text_encoder(tokenize(prompt, tokenizer).input_ids.to(text_encoder.device)).pooler_output)


@torch.no_grad()
def t5(prompt: str, tokenizer: Any, text_encoder: Any, length: int) -> Tensor:
    """The embedding of a T5 encoder, shape ``(length, width)``. As in the pipelines, there is no attention mask."""
    return kept(text_encoder(tokenize(prompt, tokenizer, length).input_ids.to(text_encoder.device))[0])
