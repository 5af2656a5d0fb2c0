"""Layers of Stable Diffusion 3 by the names of its original repository, in those of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

BLOCK = re.compile(r"joint_blocks_(?P<number>\d+)_(?P<stream>x|context)_block_(?P<layer>\w+)")
IMAGE = {
    "attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn_proj": ("attn.to_out.0",),
    "attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn2_proj": ("attn2.to_out.0",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "adaLN_modulation_1": ("norm1.linear",),
}
TEXT = {
    "attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn_proj": ("attn.to_add_out",),
    "mlp_fc1": ("ff_context.net.0.proj",),
    "mlp_fc2": ("ff_context.net.2",),
    "adaLN_modulation_1": ("norm1_context.linear",),
}
OUTSIDE = {
    "x_embedder_proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}


def sd3_layers(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """LoRA factors under diffusers' layer names; names that are not the repository's stay as they are.

    Queries, keys and values are one layer there and three in diffusers: they share ``A``, and ``B`` is cut. A layer
    that gives nothing but shift and scale (the last block's for the text, and the final one) has the two the other way
    round; its ``B`` is twice as wide as the model.
    """
    renamed: dict[str, Pair] = {}
    for name, (down, up) in pairs.items():
        layers = _layers_of(name)
        if name.endswith("adaLN_modulation_1") and len(up) == 2 * down.shape[1]:
            up = torch.cat(up.chunk(2)[::-1])
        for layer, rows in zip(layers, up.chunk(len(layers)), strict=True):
            renamed[layer] = down, rows.contiguous()
    return renamed


def _layers_of(name: str) -> tuple[str, ...]:
    match = BLOCK.fullmatch(name)
    if match is None:
        return (OUTSIDE.get(name, name),)
    table = IMAGE if match["stream"] == "x" else TEXT
    block = f"transformer_blocks.{match['number']}"
    return tuple(f"{block}.{layer}" for layer in table.get(match["layer"], (match["layer"],)))
