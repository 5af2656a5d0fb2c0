"""The parts that turn probes into latents and conditioning: the user's own, or loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memwatch.denoiser.log_filter import quietly

ALIGNMENT = 64  # bytes: of everything that torch allocates on the CPU

Weights = TypeVar("Weights", Tensor, nn.Module)


@dataclass
class Components:
    """The parts of a pipeline beside its denoiser, in its order; ``None`` where there is none.

    ``zero_unconditional`` is SDXL's ``force_zeros_for_empty_prompt``.
    """

    scheduler: Any
    vae: Any = None
    text_encoders: tuple[Any, ...] = ()
    tokenizers: tuple[Any, ...] = ()
    zero_unconditional: bool = True


def as_tuple(parts: Any) -> tuple[Any, ...]:
    """One part, or a list of parts in the pipeline's order, as a tuple; ``None`` gives an empty one."""
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
    """Fill in the parts that are not ``given``, or raise ``ValueError``. The denoiser itself is never loaded.

    Args:
        pretrained: a folder, a hub id or a ``DiffusionPipeline``.
        text_encoders: those that are needed, by their names in the pipeline. optional: those that it may lack.
        dtype: of loaded text encoders. A loaded VAE is float32, because some VAEs give NaN in float16.
    """
    tokenizers = [_tokenizer(name) for name in text_encoders]
    if (count := max(len(given.text_encoders), len(given.tokenizers))) > len(text_encoders):
        names = ", ".join(text_encoders) or "none"
        raise ValueError(f"got {count} text encoders or tokenizers, this model has {len(text_encoders)}: {names}")
    parts: dict[str, Any] = {"scheduler": given.scheduler} | ({"vae": given.vae} if needs_vae else {})
    parts |= dict(zip_longest(text_encoders, given.text_encoders)) | dict(zip_longest(tokenizers, given.tokenizers))
    missing = [name for name, part in parts.items() if part is None]
    needed = [name for name in missing if name not in {*optional, *map(_tokenizer, optional)}]
    if needed and pretrained is None:
        instead = "a pretrained path, hub id or pipeline to load them from"
        raise ValueError(f"pass {_arguments(needed, text_encoders)} or {instead}")
    zero_unconditional = given.zero_unconditional
    if missing and pretrained is not None:
        is_path = isinstance(pretrained, str) or hasattr(pretrained, "__fspath__")
        source = _read_pipeline(pretrained, missing, dtype) if is_path else pretrained
        zero_unconditional = bool(getattr(getattr(source, "config", None), "force_zeros_for_empty_prompt", True))
        for name in missing:
            part: Any = getattr(source, name, None)
            is_ours = is_path and isinstance(part, nn.Module)
            parts[name] = aligned(part.to(device)).eval().requires_grad_(False) if is_ours else part
        if absent := [name for name in needed if parts[name] is None]:
            instead = _arguments(absent, text_encoders)
            raise ValueError(f"pretrained {pretrained!r} has no {', '.join(absent)}; pass {instead}")
    for encoder, tokenizer in zip(text_encoders, tokenizers, strict=True):
        if encoder not in missing and tokenizer in missing:
            _check_vocabulary(parts[encoder], parts[tokenizer])
    encoders, words = (tuple(parts[name] for name in names) for names in (text_encoders, tokenizers))
    return Components(parts["scheduler"], parts.get("vae"), encoders, words, zero_unconditional)


def aligned(weights: Weights) -> Weights:
    """A tensor, or a network with all its parameters and buffers, at addresses that are multiples of ``ALIGNMENT``.

    What safetensors maps from a file lies where the file's header lets it begin, and views begin where they were cut.
    Some CPU kernels round otherwise there (by about 1e-6), so that a model compared with itself would not read exactly
    0. Everything that is read from a file goes through this function before anything is computed with it.

    A tensor stays the same object where it lies well already. A network is changed in place.
    """
    if isinstance(weights, nn.Module):
        for tensor in (*weights.parameters(), *weights.buffers()):
            tensor.data = aligned(tensor.data)
        return weights
    return weights.clone() if offset_of(weights) else weights


def offset_of(tensor: Tensor) -> int:
    """How many bytes a tensor lies behind a multiple of ``ALIGNMENT``; 0 on any device but the CPU."""
    return tensor.data_ptr() % ALIGNMENT if tensor.device.type == "cpu" else 0


def _check_vocabulary(text_encoder: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that lacks tokens of a CLIP text encoder: it would split a textual inversion's token."""
    rows = text_encoder.get_input_embeddings().num_embeddings
    is_clip = str(text_encoder.config.model_type).startswith("clip")  # T5's embedding is longer by itself
    if is_clip and rows > len(tokenizer):
        known = f"the tokenizer in pretrained has only {len(tokenizer)}"
        raise ValueError(f"text_encoder has {rows} tokens, {known}: pass tokenizer= as well")


def _tokenizer(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def _arguments(names: Sequence[str], text_encoders: Sequence[str]) -> str:
    """The arguments of ``MemWatch`` that take the named parts."""
    arguments = dict.fromkeys(f"{name.rstrip('_23456789')}=" for name in names)
    several = len(text_encoders) > 1 and "text_encoder=" in arguments
    return ", ".join(arguments) + (f" (lists, for {', '.join(text_encoders)})" if several else "")


def _read_pipeline(pretrained: Any, names: Sequence[str], dtype: torch.dtype) -> Any:
    """A pipeline that holds only the named parts, or a ``ValueError`` where it cannot be loaded."""
    from accelerate.utils import compare_versions
    from diffusers import DiffusionPipeline

    # each version refuses the other's name
    dtype_key = "torch_dtype" if compare_versions("diffusers", "<", "0.40") else "dtype"
    try:
        config = DiffusionPipeline.load_config(pretrained)
        parts = (name for name, part in config.items() if isinstance(part, list))
        options: dict[str, Any] = {name: None for name in parts if name not in names}
        # A pipeline that was saved without T5 must be told so when it is loaded.
        options |= {name: None for name in names if (config.get(name) or [None])[0] is None}
        options |= {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        options[dtype_key] = {"default": dtype, "vae": torch.float32}
        options["variant"] = next(filter(None, map(variant_of, Path(pretrained).glob("*/"))), None)
        with quietly():
            return DiffusionPipeline.from_pretrained(pretrained, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"pretrained {str(pretrained)!r} cannot be loaded: {error}") from error


def variant_of(folder: Path) -> str | None:
    """The variant (``fp16``) of a local folder that has weights of no other; ``None`` where there are plain ones."""
    names = (
        [file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin")] if folder.is_dir() else []
    )
    found = [re.fullmatch(r"\w+?(?:\.(\w+?))?(?:-\d+-of-\d+)?\.\w+", name) for name in names]
    variants = [match[1] for match in found if match]
    return min(filter(None, variants), default=None) if None not in variants else None


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
