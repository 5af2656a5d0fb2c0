"""LoRA files of every trainer, under the names that PEFT gives the layers of the base.

A layer that has the model's own name, with dots or with underscores, is matched by that name; diffusers' converters
rename those of the original repositories, which kohya and ComfyUI write for SDXL and Flux. Every tensor of the file
must end in a layer of its shape: diffusers drops unknown names silently.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memwatch.denoiser import aligned
from memwatch.denoiser.log_filter import is_new, quietly
from memwatch.scan.weight_files import CheckpointError, metadata_of, names_in, reading, tensors_in

logger = logging.getLogger("memwatch")

ADAPTER = "default"
PEFT_FILE = "adapter_model.safetensors"
DENOISER, T5 = "denoiser", "t5"
PREFIXES = {  # of tensor names, and the part of the pipeline they mean
    "lora_te_": "text_encoder",  # kohya
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": T5,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",  # ComfyUI
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": T5,
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,  # OneTrainer
    "unet.": DENOISER,  # diffusers, ai-toolkit, SimpleTuner
    "transformer.": DENOISER,
    "diffusion_model.": DENOISER,
}
FLUX_BLOCKS = re.compile("(double|single)_(transformer_)?blocks")
EMBEDDINGS = ("bundle_emb.", "emb_params")
FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>A|B|down|up)(?:\.(?!weight)\w+)?\.weight")

Pairs = dict[str, tuple[Tensor, Tensor]]  # by layer, A (rank, in, ...) and B (out, rank, ...), float32


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA, or one of its relatives."""
    return any(re.search(r"lora|\.(hada|lokr|oft)_", name.lower()) for name in names)


def names_by_part(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The file's tensor names by part of the pipeline and by what follows the prefix; embeddings are left out."""
    names = [name for name in names if not name.startswith(EMBEDDINGS)]
    t5 = "text_encoder_2" if any(map(FLUX_BLOCKS.search, names)) else "text_encoder_3"  # the third encoder of SD 3
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        part = PREFIXES.get(prefix, DENOISER)
        parts.setdefault(t5 if part == T5 else part, {})[name.removeprefix(prefix)] = name
    return parts


def lora_weights(file: Path, part: str, model: nn.Module) -> dict[str, Tensor]:
    """The LoRA of one part, float32, under the names that it has in ``model`` once ``add_lora`` has made room.

    What the file multiplies the LoRA by (alpha / rank) is inside ``lora_B``: two files differ in nothing but weights.

    Args:
        part: ``DENOISER`` or the name of a text encoder. model: that part of the base, with or without LoRA layers.

    Raises:
        CheckpointError: unreadable, no plain LoRA, or of another base.
    """
    names = names_in(file)
    if any(".base_layer." in name for name in names):
        how = "save the LoRA with its settings (save_lora_weights, or PEFT's save_pretrained)"
        raise CheckpointError(f"{file}: holds a network that PEFT has wrapped, without the LoRA's alpha; {how}")
    embedding = next((name for name in names if name.startswith(EMBEDDINGS)), None)
    if embedding and is_new("memwatch", f"{file} embeddings"):
        how = "memwatch ignores the trained embeddings in this file, so their tokens have no meaning"
        logger.warning("%s: %s (%s)", file, how, embedding)
    mine = names_by_part(names).get(part, {})
    if not mine:
        raise CheckpointError(f"{file}: holds no LoRA of the {part}")
    tensors = tensors_in(file, set(mine.values()).__contains__)
    pairs = _in_model(_pairs({short: tensors[name] for short, name in mine.items()}, file), model, file)
    settings = {} if any(name.endswith(".alpha") for name in mine) else _settings(file, part)
    weights = {}
    for layer, (down, up) in pairs.items():
        weights[f"{layer}.lora_A.{ADAPTER}.weight"] = aligned(down)
        weights[f"{layer}.lora_B.{ADAPTER}.weight"] = up * _scale(settings, layer, len(down))
    return weights


def add_lora(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Add PEFT layers of these names and ranks to ``model``, in place. The caller copies their values."""
    ranks = {name.partition(".lora_A.")[0]: len(tensor) for name, tensor in weights.items() if ".lora_A." in name}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {"^" + re.escape(layer): value for layer, value in ranks.items() if value != rank}
    keys = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in weights.items()}
    with reading(source, "its LoRA cannot be added to the base"), quietly():
        from peft import LoraConfig, inject_adapter_in_model

        patterns = {"rank_pattern": others, "alpha_pattern": dict(others)}  # alpha = rank: the scale is in the weights
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(ranks), **patterns)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER, state_dict=keys)


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> Pairs:
    """``A`` and ``B`` of every layer, ``B`` times alpha / rank where the file has alphas."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in convert_unet_state_dict_to_peft(tensors).items():  # names that diffusers gave over the years
        match = FACTOR.fullmatch(name)
        if match is None and not name.endswith(".alpha"):
            why = "is no tensor of a plain LoRA (DoRA, LoHa, LoKr, OFT and Tucker are other models)"
            raise CheckpointError(f"{file}: {name} {why}; merge the file into a full checkpoint")
        layer, factor = (match["layer"], match["factor"]) if match else (name.removesuffix(".alpha"), "alpha")
        found.setdefault(layer, {})[{"down": "A", "up": "B"}.get(factor, factor)] = tensor
    pairs = {}
    for layer, factors in found.items():
        if not {"A", "B"} <= factors.keys():
            raise CheckpointError(f"{file}: {layer} lacks one half of its LoRA; it has {', '.join(sorted(factors))}")
        down, up = factors["A"].float(), factors["B"].float()
        pairs[layer] = down, up * (float(factors["alpha"]) / len(down) if "alpha" in factors else 1.0)
    return pairs


def _in_model(pairs: Pairs, model: nn.Module, file: Path) -> Pairs:
    """The same pairs under the model's own layer names; each must belong to a layer of its shape."""
    shapes = {
        name.removesuffix(".weight").removesuffix(".base_layer"): tuple(p.shape)
        for name, p in model.named_parameters()
        if name.endswith(".weight") and p.ndim > 1 and ".lora_" not in name
    }
    known: dict[str, str] = {}
    for name in shapes:  # newer transformers have dropped a level of CLIP's names, and trainers have not
        for same in (name, name.removeprefix("text_model."), f"text_model.{name}"):
            known |= {same: name, _flat(same): name}
    rest = {layer: pair for layer, pair in pairs.items() if layer not in known}
    renamed = {layer: pair for layer, pair in pairs.items() if layer in known} | _converted(rest, model, file)
    kind = type(model).__name__
    if strange := [layer for layer in renamed if layer not in known]:
        why = f"{len(strange)} of its layers are not in the model ({kind}), {', '.join(strange[:3])} first"
        if kind.startswith("SD3") and any("joint_blocks" in layer for layer in strange):
            why += "; diffusers has no converter for SD 3's original names: save it with diffusers' names"
        raise CheckpointError(f"{file}: {why}; is it a LoRA of another base?")
    found = {known[layer]: pair for layer, pair in renamed.items()}
    for layer, (down, up) in found.items():
        if (len(up), *down.shape[1:]) != shapes[layer] or up.shape[1] != len(down):
            factors = f"A {tuple(down.shape)}, B {tuple(up.shape)}, the base's layer {shapes[layer]}"
            raise CheckpointError(f"{file}: the LoRA of {layer} has {factors}; is it a LoRA of another base?")
    return found


def _flat(layer: str) -> str:
    return layer.replace(".", "_")


def _converted(pairs: Pairs, model: nn.Module, file: Path) -> Pairs:
    """Names of the original repositories (``input_blocks``, ``double_blocks``) as diffusers', which may drop none."""
    kind = type(model).__name__
    if not pairs or not kind.startswith(("Flux", "UNet")):
        return pairs
    tensors = {f"lora_unet_{_flat(layer)}.lora_down.weight": down for layer, (down, _) in pairs.items()}
    tensors |= {f"lora_unet_{_flat(layer)}.lora_up.weight": up for layer, (_, up) in pairs.items()}
    with reading(file, f"its names cannot be converted to those of the base ({kind})"), quietly():
        from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin

        if kind.startswith("Flux"):
            renamed = FluxLoraLoaderMixin.lora_state_dict(tensors)
        else:
            renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=model.config)
    mine = names_by_part(renamed).get(DENOISER, {})
    converted = _pairs({short: renamed[name] for short, name in mine.items()}, file)
    rows, arrived = (sum(len(up) for _, up in each.values()) for each in (pairs, converted))
    if rows != arrived:
        why = f"diffusers converts {arrived} of the {rows} rows of {', '.join([*pairs][:3])}..."
        raise CheckpointError(f"{file}: {why}; is it a LoRA of another base than {kind}?")
    return converted


def _settings(file: Path, part: str) -> dict[str, Any]:
    """PEFT's settings of this part, where the file or its neighbour has them."""
    beside = file.with_name("adapter_config.json")
    with reading(file, "its LoRA settings cannot be read"):
        if file.name == PEFT_FILE and beside.is_file():
            return dict(json.loads(beside.read_text(encoding="utf-8")))
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
