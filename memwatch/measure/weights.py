"""Weights: read from a model, swapped in and out exactly, written to disk, and kept there while nobody needs them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memwatch.denoiser.components import ALIGNMENT, aligned, offset_of

PROMPTS = "conditioning/"  # before what a trained text encoder said at a step, beside the weights; no parameter has it


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """CPU copies of the trainable parameters (under FSDP2 of this rank's shards): all of them, or a few MB for LoRA."""
    reshard(model)
    return {name: local_part(p).to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


def averages(model: nn.Module, ema: Any) -> dict[str, Tensor]:
    """What diffusers' ``EMAModel`` has averaged, by parameter name: of all parameters, or of those that are trained."""
    named = list(model.named_parameters())
    if len(ema.shadow_params) != len(named):  # an average of what is trained only, as for LoRA
        named = [(name, p) for name, p in named if p.requires_grad]
    return {name: average for (name, _), average in zip(named, ema.shadow_params, strict=True)}


def with_conditioning(weights: Mapping[str, Tensor], said: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weights of a step together with the conditioning of probes, by name, as one file of named tensors."""
    return {**weights, **{f"{PROMPTS}{name}//{key}": x for name, tensors in said.items() for key, x in tensors.items()}}


def without_conditioning(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The inverse of ``with_conditioning``."""
    conditioning: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(PROMPTS):
            probe, _, key = name.removeprefix(PROMPTS).rpartition("//")
            conditioning.setdefault(probe, {})[key] = tensor
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(PROMPTS)}, conditioning


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other values for some parameters, and afterwards exactly as before.

    The live storage is set aside, never copied; but FSDP2 gathers from that very storage, so shards are written over,
    and back. The other values lie as the live ones do, which may be mapped from a file, see ``aligned``: both round
    alike. Gradients must be taken inside, because gradient checkpointing computes activations a second time.

    Args:
        tensors: by parameter name, of a sharded one whole or this rank's part; what does not fit is a ``ValueError``.
    """
    reshard(model)
    parameters = dict(model.named_parameters())
    values = {name: _fitted(name, tensor, parameters.get(name)) for name, tensor in tensors.items()}
    live: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, value in values.items():
            parameter = parameters[name]
            if is_sharded(parameter):
                live.append((parameter, local_part(parameter).clone()))
                local_part(parameter).copy_(value)
            else:
                live.append((parameter, parameter.data))
                parameter.data = _empty_like(parameter.data).copy_(value)
        torch.clear_autocast_cache()
        yield
    finally:
        reshard(model)
        for parameter, data in live:
            if is_sharded(parameter):
                local_part(parameter).copy_(data)
            else:
                parameter.data = data
        torch.clear_autocast_cache()


def _empty_like(tensor: Tensor) -> Tensor:
    """Memory of the same size, dtype, device and format, as far from a multiple of ``ALIGNMENT`` bytes."""
    like = torch.empty_like(tensor)
    if (offset := offset_of(tensor)) == 0:
        return like
    room = torch.empty(tensor.numel() + ALIGNMENT, dtype=tensor.dtype)
    return room.as_strided(like.shape, like.stride(), offset // tensor.element_size())


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, as FSDP2's parameters are (duck-typed: torch has moved the class)."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it, sharing its storage, outside of autograd."""
    detached: Any = tensor.detach()
    own: Tensor = detached.to_local() if is_sharded(tensor) else detached
    return own


def _fitted(name: str, tensor: Tensor, parameter: Tensor | None) -> Tensor:
    """``tensor`` as this rank's part of ``parameter``, or a ``ValueError`` that names both shapes."""
    like: Any = parameter
    if like is not None and is_sharded(like) and not is_sharded(tensor) and tensor.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    value = local_part(tensor)
    if parameter is None or local_part(parameter).shape != value.shape:
        has = tuple(local_part(parameter).shape) if parameter is not None else "no such parameter"
        raise ValueError(f"snapshot does not fit the model: {name} has shape {tuple(value.shape)}, the model {has}")
    return value


def reshard(model: nn.Module) -> None:
    """Make FSDP2 forget what it has gathered: parameters are shards again, and the next pass gathers anew."""
    for module in model.modules():
        if callable(drop := getattr(module, "reshard", None)):
            drop()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by name, see ``aligned``."""
    return {name: aligned(tensor) for name, tensor in load_file(path).items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write whole or not at all; else it is an ``OSError``. ``metadata``: texts, kept beside the tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def kept_on_disk(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The same tensors, mapped from a file: they take memory only while they are read.

    The file's name is deleted at once, so nobody can change the file, and the disk space is free again when the last of
    the tensors is gone, however the process ends. Where the disk refuses, the tensors are left as they are. All share
    one storage: clone what is to be pickled. ``folder``, on the disk that is to hold them, need not exist yet.
    """
    file: Path | None = None
    try:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        handle, name = tempfile.mkstemp(prefix=".memwatch-", suffix=".safetensors", dir=there)
        os.close(handle)
        file = Path(name)
        write_safetensors(file, tensors)
        return load_file(file)
    except OSError:
        return dict(tensors)
    finally:
        if file is not None:
            with suppress(OSError):  # some systems keep the name of a file that is mapped
                file.unlink(missing_ok=True)


class OffloadedNetwork:
    """A frozen network that nobody else uses. Between uses its weights take no memory, see ``kept_on_disk``."""

    def __init__(self, module: nn.Module, folder: Path) -> None:
        self._module = module.to("cpu")
        self._tensors = [*module.parameters(), *module.buffers()]
        self._kept = kept_on_disk({str(i): tensor.data for i, tensor in enumerate(self._tensors)}, folder)
        self._put_back()

    def _put_back(self) -> None:
        for i, tensor in enumerate(self._tensors):
            tensor.data = self._kept[str(i)]

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Inside, the network can be used on ``device``."""
        try:
            aligned(self._module.to(device))
            yield
        finally:
            self._put_back()
