"""LoRA off: the model before its LoRA, as ``signals.baseline: base`` means it, and where that cannot be had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from memwatch.measure.weights import local_part, reshard

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights: they leave the base as it is


def lora_off(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that turn the trained LoRA off: its ``lora_B`` all zero; adapters that are not trained stay on."""
    reshard(model)
    trained = trained_adapters(model)
    return {
        name: torch.zeros_like(local_part(p), device="cpu")
        for name, p in model.named_parameters()
        if ".lora_B." in name and _adapter(name) in trained
    }


def trained_adapters(model: nn.Module) -> set[str]:
    """Names of the LoRA adapters of which something is trained."""
    return {_adapter(name) for name, p in model.named_parameters() if p.requires_grad and _is_lora(name)}


def why_not_base(models: Iterable[nn.Module | None]) -> str | None:
    """Why ``lora_off`` of these networks does not give what was there before training; ``None`` where it does.

    It takes LoRA alone: nothing else may be trained (biases, whole modules, other adapters), nothing may multiply the
    base's weights (DoRA), and the adapter must not have begun with a part of them (PiSSA, OLoRA, CorDA, LoftQ, ...).
    """
    parts = [model for model in models if model is not None]
    if not any(trained_adapters(model) for model in parts):
        return "the model has no LoRA layers to switch off, or none that are trained"
    return next((cause for model in parts for cause in _causes(model)), None)


def _causes(model: nn.Module) -> Iterator[str]:
    kind = type(model).__name__
    for adapter in sorted(trained_adapters(model)):
        config, which = getattr(model, "peft_config", {}).get(adapter), f"adapter {adapter!r} of the {kind}"
        start, by_module = getattr(config, "init_lora_weights", True), (vars(m) for m in model.modules())
        variants = {type(v[adapter]).__name__ for m in by_module if adapter in (v := m.get("lora_variant", {}))}
        if getattr(config, "use_dora", False):
            yield f"{which} is a DoRA, which goes on scaling the base's weights without it"
        if variants:
            yield f"{which} is no plain LoRA ({', '.join(sorted(variants))})"
        if start not in PLAIN_STARTS:
            yield f"{which} took its first values out of the base's weights (init_lora_weights={start!r})"
    rest = [name for name, p in model.named_parameters() if p.requires_grad and not _is_lora(name)]
    if rest:
        yield f"the {kind} trains {len(rest)} parameters beside its LoRA, {rest[0]} first (bias=, modules_to_save=)"


def _is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _adapter(name: str) -> str:
    """Of ``layer.lora_B.ADAPTER.weight``."""
    return name.replace(".lora_A.", ".lora_B.").rpartition(".lora_B.")[2].partition(".")[0]
