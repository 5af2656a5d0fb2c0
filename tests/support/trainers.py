"""LoRA files as trainers write them, made from PEFT layers that are there already."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.originals import in_order, original_layer
from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor, float]]  # layer: A, B, alpha

WIDE = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]
TEXT = ["q_proj", "v_proj", "fc1"]


def with_lora(model: nn.Module, targets: list[str], *, rank: int = 2, alpha: float = 2, seed: int = 0) -> nn.Module:
    """Random LoRA of every target layer, in place. ``alpha`` differs from ``rank`` where the scale is of interest."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)
    fill(model, seed)
    return model


def fill(model: nn.Module, seed: int) -> None:
    """Other random values for the LoRA."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def factors_of(model: nn.Module) -> Factors:
    """What a trainer has in memory."""
    named = dict(model.named_parameters())
    layers = [name.removesuffix(".lora_A.default.weight") for name in named if ".lora_A." in name]
    modules = dict(model.named_modules())
    return {
        layer: (
            named[f"{layer}.lora_A.default.weight"].detach().clone(),
            named[f"{layer}.lora_B.default.weight"].detach().clone(),
            modules[layer].scaling["default"] * len(named[f"{layer}.lora_A.default.weight"]),
        )
        for layer in layers
    }


def joined(factors: Factors, model: nn.Module) -> Factors:
    """Layers of the original repository: several of ours that are one there get ``A`` stacked and ``B`` in blocks."""
    theirs: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for layer, (down, up, alpha) in sorted(factors.items(), key=lambda item: in_order(item[0])):
        theirs.setdefault(original_layer(layer, model), []).append((down, up, alpha))
    return {
        layer: pieces[0]
        if len(pieces) == 1
        else (
            torch.cat([down for down, _, _ in pieces]),
            torch.block_diag(*(up for _, up, _ in pieces)),
            sum(alpha for *_, alpha in pieces),
        )
        for layer, pieces in theirs.items()
    }


def kohya(factors: Factors, prefix: str) -> dict[str, Tensor]:
    """``lora_unet_LAYER.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, the layer with underscores."""
    return {
        f"{prefix}{layer.replace('.', '_')}.{name}": value.contiguous()
        for layer, (down, up, alpha) in factors.items()
        for name, value in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(float(alpha))))
    }


def dotted(factors: Factors, prefix: str, *, alphas: bool = False, names: str = "AB") -> dict[str, Tensor]:
    """``PREFIX.LAYER.lora_A.weight``; without alphas, ``B`` holds alpha / rank as ai-toolkit and diffusers save it."""
    down_name, up_name = ("lora_A", "lora_B") if names == "AB" else ("lora_down", "lora_up")
    tensors = {}
    for layer, (down, up, alpha) in factors.items():
        tensors[f"{prefix}{layer}.{down_name}.weight"] = down.contiguous()
        tensors[f"{prefix}{layer}.{up_name}.weight"] = (up if alphas else up * (alpha / len(down))).contiguous()
        if alphas:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors


def text_prefixed(factors: Factors) -> Factors:
    """Layers of a CLIP encoder with ``text_model.``, which trainers write and newer transformers has dropped."""
    return {f"text_model.{layer.removeprefix('text_model.')}": value for layer, value in factors.items()}


def save_peft(folder: Path, model: nn.Module, alpha: float, rank: int) -> Path:
    """A folder as ``PeftModel.save_pretrained`` leaves it."""
    folder.mkdir(parents=True)
    factors = {layer: (down, up, float(len(down))) for layer, (down, up, _) in factors_of(model).items()}
    save_file(dotted(factors, "base_model.model."), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
