"""What turns probes into latents and conditioning: the user's own, or loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn


@dataclass
class Components:
    """What turns probes into latents and conditioning. Any of them may be the user's own.

    Attributes:
        text_encoders, tokenizers: in the pipeline's order (``text_encoder``, ``text_encoder_2``, ...); ``None`` where there is none.
        zero_unconditional: the unconditional branch is zeros where the family allows it (SDXL's ``force_zeros_for_empty_prompt``).
    """

    scheduler: Any
    vae: Any = None
    text_encoders: tuple[Any, ...] = ()
    tokenizers: tuple[Any, ...] = ()
    zero_unconditional: bool = True


def as_tuple(parts: Any) -> tuple[Any, ...]:
    """One part, or a list of them in the pipeline's order, as a tuple; nothing for ``None``."""
    return tuple(parts) if isinstance(parts, list | tuple) else (parts,) if parts is not None else ()


def load_components(
    pretrained: Any,
    given: Components,
    *,
    needs_vae: bool,
    text_encoders: Sequence[str],
    optional: Collection[str] = (),
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Components:
    """Fill in what the caller did not pass, from a folder, a hub id or a ``DiffusionPipeline``. The denoiser itself is never loaded.

    Args:
        text_encoders: the pipeline's names of the text encoders that are needed; each has its tokenizer.
        optional: those of them that the pipeline may lack.
        dtype: of the text encoders that are loaded, the denoiser's as in training scripts. The VAE is float32: some give NaN in float16.

    Raises:
        ValueError: something is needed that is neither passed nor in ``pretrained``; or ``pretrained`` cannot be read.
    """
    tokenizers = [_tokenizer(name) for name in text_encoders]
    if (count := max(len(given.text_encoders), len(given.tokenizers))) > len(text_encoders):
        raise ValueError(
            f"got {count} text encoders or tokenizers, this model has {len(text_encoders)}: {', '.join(text_encoders) or 'none'}"
        )
    parts: dict[str, Any] = {"scheduler": given.scheduler} | ({"vae": given.vae} if needs_vae else {})
    parts |= dict(zip_longest(text_encoders, given.text_encoders)) | dict(zip_longest(tokenizers, given.tokenizers))
    missing = [name for name, part in parts.items() if part is None]
    needed = [name for name in missing if name not in {*optional, *map(_tokenizer, optional)}]
    if needed and pretrained is None:
        raise ValueError(
            f"pass {_arguments(needed, text_encoders)} or a pretrained path, hub id or pipeline to load them from"
        )
    zero_unconditional = given.zero_unconditional
    if missing and pretrained is not None:
        is_path = isinstance(pretrained, str) or hasattr(pretrained, "__fspath__")
        source = _read_pipeline(pretrained, missing, dtype) if is_path else pretrained
        parts |= {name: getattr(source, name, None) for name in missing}
        if absent := [name for name in needed if parts[name] is None]:
            raise ValueError(
                f"pretrained {pretrained!r} has no {', '.join(absent)}; pass {_arguments(absent, text_encoders)}"
            )
        for name in missing:
            if is_path and isinstance(parts[name], nn.Module):
                parts[name] = parts[name].to(device).eval().requires_grad_(False)
        zero_unconditional = bool(getattr(getattr(source, "config", None), "force_zeros_for_empty_prompt", True))
    for encoder, tokenizer in zip(text_encoders, tokenizers, strict=True):
        if encoder not in missing and tokenizer in missing:
            _check_vocabulary(parts[encoder], parts[tokenizer])
    encoders, words = (tuple(parts[name] for name in names) for names in (text_encoders, tokenizers))
    return Components(parts["scheduler"], parts.get("vae"), encoders, words, zero_unconditional)


def _check_vocabulary(text_encoder: Any, tokenizer: Any) -> None:
    """A textual inversion's token that the tokenizer does not know would silently fall apart into others."""
    rows = text_encoder.get_input_embeddings().num_embeddings
    if str(text_encoder.config.model_type).startswith("clip") and rows > len(
        tokenizer
    ):  # T5's embedding is longer by itself
        raise ValueError(
            f"text_encoder has {rows} tokens, the tokenizer in pretrained {len(tokenizer)}: pass tokenizer= as well"
        )


def _tokenizer(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def _arguments(names: Sequence[str], text_encoders: Sequence[str]) -> str:
    """MemWatch's arguments through which the named parts are passed."""
    arguments = dict.fromkeys(f"{name.rstrip('_23456789')}=" for name in names)
    lists = (
        f" (lists, for {', '.join(text_encoders)})" if len(text_encoders) > 1 and "text_encoder=" in arguments else ""
    )
    return ", ".join(arguments) + lists


def _read_pipeline(pretrained: Any, names: Sequence[str], dtype: torch.dtype) -> Any:
    """A pipeline of just the named parts."""
    from diffusers import DiffusionPipeline

    try:
        config = DiffusionPipeline.load_config(pretrained)
        skipped: dict[str, Any] = {
            name: None for name, part in config.items() if isinstance(part, list) and name not in names
        }
        skipped |= {
            name: None for name in names if (config.get(name) or [None])[0] is None
        }  # saved without T5: it wants to be told so
        skipped |= {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        return DiffusionPipeline.from_pretrained(pretrained, dtype={"default": dtype, "vae": torch.float32}, **skipped)
    except (OSError, ValueError) as error:
        raise ValueError(f"pretrained {str(pretrained)!r} cannot be loaded: {error}") from error
