"""Weight files of every format: names and tensors under plain names, or one clear error about the format, first.

Read are safetensors, and pickles of nothing but tensors (``.bin``, ``.pt``, ``.pth``, ``.ckpt``), whole or as shards
with an index. What wraps a model leaves the names (``torch.compile``, DDP, PEFT), and scaled weights are multiplied
by their scales.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memwatch.denoiser import aligned

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
INDEX = ".index.json"
LFS = b"version https://git-lfs"
WRAPPERS = re.compile(r"^((_orig_mod|module|base_model\.model)\.)+|_orig_mod[._]")
SCALES = (".scale_weight", ".weight_scale")  # beside ``.weight``: ComfyUI's fp8, and others'
BYTES = (torch.int8, torch.uint8)  # mean nothing without a scale
ABOUT = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|scale_input|input_scale|v_pred|ztsnr)$")  # say something, weigh none
QUANTIZED = re.compile(r"\.(absmax|quant_map|quant_state|SCB|qweight|qzeros|g_idx|weight_scale_2)\b")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and says why."""


@contextmanager
def reading(source: object, what: str = "cannot be read") -> Iterator[None]:
    """Turn every error inside, of whatever kind, into a ``CheckpointError`` of one line that names the source."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{source}: {what}: {lines[0] if lines else type(error).__name__}") from error


def is_weights(path: Path) -> bool:
    """Whether a file is one of weights, by its name."""
    return path.suffix in (*SUFFIXES, ".gguf") or path.name.endswith(INDEX)


def names_in(file: Path) -> list[str]:
    """Plain names of the tensors in a file, or in all shards of an index; scales and the like are left out."""
    names = [plain(name) for shard in _shards(file) for name in _opened(shard)]
    twice = next((name for name in names if names.count(name) > 1), None) if len({*names}) < len(names) else None
    if twice is not None:
        raise CheckpointError(f"{file}: two tensors are called {twice} once their wrappers' names are gone")
    if quantized := [name for name in names if QUANTIZED.search(name)]:
        raise CheckpointError(f"{file}: its weights are quantized ({quantized[0]}); save them as fp16, bf16 or float32")
    of_scales = {name: name.rpartition(".")[0] + ".weight" for name in names if name.endswith(SCALES)}
    if lone := {*of_scales.values()} - {*names}:
        raise CheckpointError(f"{file}: {min(lone)} is missing, although its scale is there")
    return [name for name in names if name not in of_scales and not ABOUT.search(name)]


def all_names(file: Path) -> set[str]:
    """The names of everything in a file, as they are."""
    return {name for shard in _shards(file) for name in _opened(shard)}


def tensors_in(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The ``wanted`` tensors of a file by plain name, on the CPU, times their scales."""
    known = {plain(name): (name, shard) for shard in _shards(file) for name in _opened(shard)}
    opened = {shard: _opened(shard) for shard in {shard for _, shard in known.values()}}

    def read(name: str) -> Tensor:
        raw, shard = known[name]
        with reading(shard):
            return opened[shard][raw]()

    found = {name: aligned(read(name)) for name in names_in(file) if wanted(name)}
    for name, weight in found.items():
        scales = [scale for end in SCALES if (scale := name.removesuffix(".weight") + end) in known]
        if scales:
            found[name] = _scaled(weight, read(scales[0]), f"{file}: {name}")
        elif weight.dtype in BYTES:
            raise CheckpointError(f"{file}: {name} is quantized to {weight.dtype}, and no scale lies beside it")
    return found


def metadata_of(file: Path) -> dict[str, str]:
    """What a trainer has written into the header of a safetensors file; empty when it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def plain(name: str) -> str:
    """A tensor's name without what ``torch.compile``, DDP and PEFT have put into it, in whatever order."""
    return WRAPPERS.sub("", name)


def _scaled(weight: Tensor, scale: Tensor, where: str) -> Tensor:
    """A weight times its scale: one number, or one per output."""
    if weight.dtype is torch.uint8 or scale.numel() not in (1, len(weight)):
        kind = str(weight.dtype).removeprefix("torch.")
        why = f"{kind} {tuple(weight.shape)} with scales {tuple(scale.shape)} is a format that memwatch does not know"
        raise CheckpointError(f"{where}: {why}; save it as fp16, bf16 or float32")
    return weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))


def _shards(file: Path) -> list[Path]:
    """The files that hold the tensors: the file itself, or those of an index."""
    if not file.name.endswith(INDEX):
        return [file]
    with reading(file):
        names = sorted({*json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()})
    shards = [file.with_name(Path(name).name) for name in names]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{file}: {missing[0]} is missing, {len(missing)} of {len(shards)} shards")
    return shards


def _opened(file: Path) -> dict[str, Callable[[], Tensor]]:
    """By its name in the file, what reads a tensor."""
    _check_format(file)
    if file.suffix == ".safetensors":
        with reading(file):
            opened: Any = safe_open(file, "pt")
            return {name: partial(opened.get_tensor, name) for name in [*opened.keys()]}
    with reading(file):
        state = _unpickled(file)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not found:
        raise CheckpointError(f"{file}: it holds no named tensors")
    return {name: tensor.detach for name, tensor in found.items()}


def _unpickled(file: Path) -> object:
    """What a pickle of tensors holds, mapped from the file where its format allows that."""
    why = "it is a pickle that holds more than tensors, and memwatch runs no code from a file; save it as safetensors"
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # not a zip file, as old versions wrote
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: {why}") from error


def _check_format(file: Path) -> None:
    """Raise a ``CheckpointError`` that names the format of a file that is none of weights."""
    with reading(file), file.open("rb") as opened:
        head = opened.read(64)
    if not head:
        raise CheckpointError(f"{file}: is empty")
    if head.startswith(LFS):
        raise CheckpointError(f"{file}: is a pointer of Git LFS, not the file itself; run git lfs pull")
    if head.startswith(b"GGUF") or file.suffix == ".gguf":
        raise CheckpointError(f"{file}: is a GGUF file, whose weights are quantized; give safetensors in fp16 or bf16")
    if file.suffix not in SUFFIXES:
        raise CheckpointError(f"{file}: is no weight file; allowed: {', '.join(SUFFIXES)}, or a folder")
