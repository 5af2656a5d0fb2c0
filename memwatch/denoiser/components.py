"""What turns probes into latents and conditioning: the user's own, or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Components:
    """What turns probes into latents and conditioning. Any of them may be the user's own."""

    scheduler: Any
    vae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None


def load_components(pretrained: Any, given: Components, *, needs_vae: bool, needs_text: bool, device: torch.device) -> Components:
    """Fill in what the caller did not pass, from a folder, a hub id or a ``DiffusionPipeline``. The denoiser itself is never loaded.

    Raises:
        ValueError: something is needed that is neither passed nor in ``pretrained``; or ``pretrained`` cannot be read.
    """
    wanted = {"scheduler": True, "vae": needs_vae, "text_encoder": needs_text, "tokenizer": needs_text}
    missing = [name for name, needed in wanted.items() if needed and getattr(given, name) is None]
    if not missing:
        return given
    if pretrained is None:
        raise ValueError(f"pass {', '.join(name + '=' for name in missing)} or a pretrained path, hub id or pipeline to load them from")
    source = _read_pipeline(pretrained, missing) if isinstance(pretrained, str) or hasattr(pretrained, "__fspath__") else pretrained
    found: dict[str, Any] = {name: getattr(source, name, None) for name in missing}
    if absent := [name for name, part in found.items() if part is None]:
        raise ValueError(f"pretrained {pretrained!r} has no {', '.join(absent)}; pass {', '.join(name + '=' for name in absent)}")
    if source is not pretrained:
        for name in {"vae", "text_encoder"} & set(found):
            found[name] = found[name].to(device).eval().requires_grad_(False)
    return Components(**{name: found.get(name, getattr(given, name)) for name in wanted})


def _read_pipeline(pretrained: Any, names: Sequence[str]) -> Any:
    """A pipeline of just the named parts, float32."""
    from diffusers import DiffusionPipeline

    try:
        config = DiffusionPipeline.load_config(pretrained)
        skipped: dict[str, Any] = {name: None for name in config if not name.startswith("_") and name not in names}
        skipped |= {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        return DiffusionPipeline.from_pretrained(pretrained, dtype=torch.float32, **skipped)
    except (OSError, ValueError) as error:
        raise ValueError(f"pretrained {str(pretrained)!r} cannot be loaded: {error}") from error
