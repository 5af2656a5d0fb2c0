"""LoRA files of every trainer, in the names that PEFT gives the layers of the base.

A layer that has the model's own name, with its dots or with underscores, needs no table. Others go through diffusers'
converters; SD 3's, which diffusers lacks, through ``sd3_names.py``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memwatch.denoiser import aligned
from memwatch.denoiser.log_filter import quietly
from memwatch.scan.lora_keys import DENOISER, EMBEDDINGS, part_of, refuse_others, without_prefix
from memwatch.scan.reading import CheckpointError, metadata_of, names_in, reading, tensors_in
from memwatch.scan.sd3_names import sd3_layers

ADAPTER = "default"
PEFT_FILE = "adapter_model.safetensors"

Pair = tuple[Tensor, Tensor]  # A (rank, in, ...) and B (out, rank, ...), float32

FACTOR = re.compile(r"(?P<layer>.+)\.(?P<factor>lora_A|lora_B|lora_down|lora_up)(?:\.(?!weight)\w+)?\.weight")


def lora_weights(file: Path, part: str, model: nn.Module) -> dict[str, Tensor]:
    """The LoRA of one part, float32, under the names that it has in ``model`` once ``add_lora`` has made room.

    What the file multiplies the LoRA by (alpha / rank) is inside ``lora_B``: two files differ in nothing but weights.

    Args:
        part: ``DENOISER`` or the name of a text encoder.
        model: that part of the base, with or without the room.

    Raises:
        CheckpointError: unreadable, no plain LoRA, or of another base than ``model``.
    """
    names = names_in(file)
    refuse_others(names, file)
    mine = {name for name in names if not name.startswith(EMBEDDINGS) and part_of(name, names) == part}
    tensors = {without_prefix(name): tensor for name, tensor in tensors_in(file, mine.__contains__).items()}
    shapes = _layers(model)
    pairs = _in_model(_pairs(tensors, file), shapes, model, file)
    settings = {} if any(name.endswith(".alpha") for name in mine) else _settings(file, part)
    if not pairs:
        raise CheckpointError(f"{file}: holds no LoRA of the {part}")
    weights = {}
    for layer, (down, up) in pairs.items():
        _check_layer(layer, down, up, shapes[layer], file)
        weights[f"{layer}.lora_A.{ADAPTER}.weight"] = aligned(down)
        weights[f"{layer}.lora_B.{ADAPTER}.weight"] = up * _scale(settings, layer, len(down))
    return weights


def add_lora(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Make room for a LoRA: PEFT layers of these names and ranks, in place. Their values are copied by the caller.

    Raises:
        CheckpointError: PEFT is not installed, or refuses.
    """
    ranks = {name.partition(".lora_A.")[0]: len(tensor) for name, tensor in weights.items() if ".lora_A." in name}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {"^" + re.escape(layer): value for layer, value in ranks.items() if value != rank}
    keys = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in weights.items()}
    with reading(source, "its LoRA cannot be added to the base"), quietly():
        from peft import LoraConfig, inject_adapter_in_model

        patterns = {"rank_pattern": others, "alpha_pattern": dict(others)}  # alpha = rank: the scale is in the weights
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(ranks), **patterns)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER, state_dict=keys)


# --- names ------------------------------------------------------------------------------------------------------------


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Pair]:
    """``A`` and ``B`` of every layer, ``B`` times alpha / rank where the file has alphas."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _in_words_of_peft(tensors).items():
        match = FACTOR.fullmatch(name)
        layer, factor = (match["layer"], match["factor"]) if match else (name.removesuffix(".alpha"), "alpha")
        if match is None and not name.endswith(".alpha"):
            raise CheckpointError(f"{file}: {name} is no LoRA tensor that memwatch knows")
        found.setdefault(layer, {})[{"lora_down": "lora_A", "lora_up": "lora_B"}.get(factor, factor)] = tensor
    pairs = {}
    for layer, factors in found.items():
        if not {"lora_A", "lora_B"} <= factors.keys():
            raise CheckpointError(f"{file}: {layer} lacks one half of its LoRA; it has {', '.join(sorted(factors))}")
        down, up = factors["lora_A"].float(), factors["lora_B"].float()
        pairs[layer] = down, up * (float(factors["alpha"]) / len(down) if "alpha" in factors else 1.0)
    return pairs


def _in_words_of_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that diffusers itself gave over the years (``to_q_lora.down``, ``lora_linear_layer.up``), as PEFT's."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    text = any(".self_attn." in name for name in tensors)
    old = any("to_out_lora" in name or "lora_linear_layer" in name for name in tensors)
    if text and not old:
        return dict(tensors)
    converted: dict[str, Tensor] = (convert_state_dict_to_peft if text else convert_unet_state_dict_to_peft)(tensors)
    return converted


def _layers(model: nn.Module) -> dict[str, torch.Size]:
    """Weight shapes of the layers that can have a LoRA, by name."""
    named = {name: p.shape for name, p in model.named_parameters() if name.endswith(".weight") and p.ndim > 1}
    plain = {name: shape for name, shape in named.items() if ".lora_" not in name}
    return {name.removesuffix(".weight").removesuffix(".base_layer"): shape for name, shape in plain.items()}


def _in_model(
    pairs: Mapping[str, Pair], shapes: Mapping[str, torch.Size], model: nn.Module, file: Path
) -> dict[str, Pair]:
    """The same pairs under the model's own layer names.

    Raises:
        CheckpointError: some belong to no layer of the model.
    """
    known: dict[str, str] = {}
    for name in shapes:  # transformers has dropped a level of CLIP's names, and trainers have not
        for same in (name, name.removeprefix("text_model."), f"text_model.{name}"):
            known |= {same: name, _flat(same): name}
    own = {known[layer]: pair for layer, pair in pairs.items() if layer in known}
    rest = {layer: pair for layer, pair in pairs.items() if layer not in known}
    converted = _converted(rest, model, file) if rest else {}
    strange = [layer for layer in converted if layer not in known]
    if strange:
        why = f"{len(strange)} of its layers are not in the model ({type(model).__name__}), {strange[0]} first"
        raise CheckpointError(f"{file}: {why}; is it a LoRA of another base?")
    return own | {known[layer]: pair for layer, pair in converted.items()}


def _flat(layer: str) -> str:
    return layer.replace(".", "_")


def _converted(pairs: Mapping[str, Pair], model: nn.Module, file: Path) -> dict[str, Pair]:
    """Names of the original repositories (``input_blocks``, ``double_blocks``, ``joint_blocks``) as diffusers'."""
    kind = type(model).__name__
    if kind.startswith("SD3"):
        return sd3_layers({_flat(layer): pair for layer, pair in pairs.items()})
    tensors = {f"lora_unet_{_flat(layer)}.lora_down.weight": down for layer, (down, _) in pairs.items()}
    tensors |= {f"lora_unet_{_flat(layer)}.lora_up.weight": up for layer, (_, up) in pairs.items()}
    with reading(file, f"its names cannot be converted to those of the base ({kind})"), quietly():
        from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin

        if kind.startswith("Flux"):
            renamed = FluxLoraLoaderMixin.lora_state_dict(tensors)
        elif kind.startswith("UNet"):
            renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=model.config)
        else:
            return dict(pairs)
    converted = _pairs({without_prefix(name): tensor for name, tensor in renamed.items()}, file)
    if len(converted) < len(pairs):  # diffusers drops what it does not know
        lost = f"{len(pairs)} layers became {len(converted)} in the names of the base ({kind})"
        raise CheckpointError(f"{file}: {lost}; is it a LoRA of another base?")
    return converted


# --- numbers ----------------------------------------------------------------------------------------------------------


def _settings(file: Path, part: str) -> dict[str, Any]:
    """What PEFT was told for this part, where the file or its neighbour says so; alphas in the file say more."""
    beside = file.with_name("adapter_config.json")
    if file.name == PEFT_FILE and beside.is_file():
        with reading(beside):
            settings: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
            return settings
    with reading(file, "its LoRA settings cannot be read"):
        said: dict[str, Any] = json.loads(metadata_of(file).get("lora_adapter_metadata", "{}"))
    prefixes = ("unet.", "transformer.") if part == DENOISER else (f"{part}.",)
    return {key.removeprefix(p): value for p in prefixes for key, value in said.items() if key.startswith(p)}


def _scale(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """What PEFT multiplies a layer's LoRA by; 1 without settings."""
    if settings.get("lora_alpha") is None:
        return 1.0
    patterns = (settings.get("alpha_pattern") or {}).items()
    fits = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", layer))
    alpha = float(next(fits, settings["lora_alpha"]))
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _check_layer(layer: str, down: Tensor, up: Tensor, shape: torch.Size, file: Path) -> None:
    made_for = (len(up), *down.shape[1:])
    if made_for != tuple(shape) or up.shape[1] != len(down):
        factors = f"A {tuple(down.shape)}, B {tuple(up.shape)}"
        raise CheckpointError(f"{file}: the LoRA of {layer} has {factors}, the base's layer {tuple(shape)}")
