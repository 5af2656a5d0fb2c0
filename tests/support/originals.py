"""Names and tensors of diffusers' models as the original repositories have them: the inverse of diffusers' converters.

Several layers of ours are one of theirs, joined in the order of ``in_order``.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
JOINT = {  # of a block with two streams: SD3's name, Flux's name
    **{f"attn.to_{one}": ("x_block.attn.qkv", "img_attn.qkv") for one in "qkv"},
    "attn.to_out.0": ("x_block.attn.proj", "img_attn.proj"),
    **{f"attn.add_{one}_proj": ("context_block.attn.qkv", "txt_attn.qkv") for one in "qkv"},
    "attn.to_add_out": ("context_block.attn.proj", "txt_attn.proj"),
    "ff.net.0.proj": ("x_block.mlp.fc1", "img_mlp.0"),
    "ff.net.2": ("x_block.mlp.fc2", "img_mlp.2"),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", "txt_mlp.0"),
    "ff_context.net.2": ("context_block.mlp.fc2", "txt_mlp.2"),
    "norm1.linear": ("x_block.adaLN_modulation.1", "img_mod.lin"),
    "norm1_context.linear": ("context_block.adaLN_modulation.1", "txt_mod.lin"),
}
SD3_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
FLUX_SINGLE = {"proj_out": "linear2", "norm.linear": "modulation.lin"}  # linear1 wants Flux's own width of 3072
FLUX_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def unet_layer(layer: str, per_block: int) -> str:
    """A layer of ``UNet2DConditionModel`` in the names of CompVis and Stability."""

    def within(rest: str, in_resnet: bool) -> str:
        return f".{RESNET[rest.removeprefix('.')]}" if in_resnet else rest

    for ours, theirs in UNET_OUTSIDE.items():
        if layer == ours or layer.startswith(ours + "."):
            return theirs + within(layer.removeprefix(ours), ".resnets." in ours)
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(.*)", layer)
    assert match, layer
    way, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = block * (per_block + 1) + (way == "down")
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + per_block}.{2 if block == 0 else 1}.conv"  # the first one has attention
    blocks = "input_blocks" if way == "down" else "output_blocks"
    return f"{blocks}.{first + number}.{int(kind == 'attentions')}{within(rest, kind == 'resnets')}"


def transformer_layer(layer: str, is_flux: bool) -> str:
    """A layer of SD3's or Flux's transformer in the names of their repositories."""
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)
    if match is None:
        return (FLUX_OUTSIDE if is_flux else SD3_OUTSIDE)[layer]
    if match[1]:
        return f"single_blocks.{match[2]}.{FLUX_SINGLE[match[3]]}"
    blocks = "double_blocks" if is_flux else "joint_blocks"
    return f"{blocks}.{match[2]}.{JOINT[match[3]][is_flux]}"


def original_layer(layer: str, model) -> str:
    """A layer of any model, with dots, without a prefix."""
    kind = type(model).__name__
    if kind.startswith("UNet"):
        return unet_layer(layer, model.config.layers_per_block)
    return transformer_layer(layer, is_flux=kind.startswith("Flux"))


def original_weights(model) -> dict[str, Tensor]:
    """A whole denoiser as in a single file."""
    weights: dict[str, Tensor] = {}
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: in_order(item[0])):
        if name == "pos_embed.pos_embed":
            weights["model.diffusion_model.pos_embed"] = tensor
            continue
        layer, _, kind = name.rpartition(".")
        theirs = f"model.diffusion_model.{original_layer(layer, model)}.{kind}"
        tensor = swapped(tensor) if is_two_wide(layer, model) else tensor
        weights[theirs] = torch.cat([weights[theirs], tensor]) if theirs in weights else tensor.clone()
    return weights


def in_order(name: str) -> int:
    """Queries before keys before values: as they lie in the repositories' joined layers."""
    match = re.search(r"(?:to|add)_([qkv])|([qkv])_proj", name)
    return "qkv".index(match[1] or match[2]) if match else 0


def is_two_wide(layer: str, model) -> bool:
    """A modulation that gives nothing but shift and scale: theirs are the other way round."""
    last = f"transformer_blocks.{model.config.get('num_layers', 0) - 1}.norm1_context.linear"
    return layer == "norm_out.linear" or (type(model).__name__.startswith("SD3") and layer == last)


def swapped(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def clip_weights(encoder, prefix: str) -> dict[str, Tensor]:
    """CLIP under the names of transformers, as SD 1.x and the first encoder of SDXL have it."""
    named = {name.removeprefix("text_model."): tensor.clone() for name, tensor in encoder.state_dict().items()}
    return {f"{prefix}{'' if 'text_projection' in name else 'text_model.'}{name}": named[name] for name in named}


def open_clip_weights(encoder, prefix: str) -> dict[str, Tensor]:
    """CLIP under the names of OpenCLIP, as SD 2.x and the second encoder of SDXL have it."""
    weights: dict[str, Tensor] = {}
    for name, tensor in sorted(encoder.state_dict().items(), key=lambda item: in_order(item[0])):
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            weights["text_projection"] = tensor.T.contiguous()
            continue
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        name = name.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        name = name.replace("encoder.layers.", "transformer.resblocks.").replace("layer_norm", "ln_")
        name = name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj").replace("self_attn", "attn")
        name = re.sub(r"[qkv]_proj\.(weight|bias)", r"in_proj_\1", name)
        weights[name] = torch.cat([weights[name], tensor]) if name in weights else tensor.clone()
    return {prefix + name: tensor for name, tensor in weights.items()}
