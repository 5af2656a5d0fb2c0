"""Earlier states to compare with: weights that are swapped in and out, and the ledger of earlier measurements."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memwatch.curvature import CurvatureMap
from memwatch.signals import Measurement


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """CPU copies of the trainable parameters (under FSDP2 of this rank's shards): all of them, or a few MB for LoRA."""
    reshard(model)
    return {name: held(p).to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


def without_lora(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that turn every LoRA layer off: ``lora_B`` all zero gives the base model exactly. Empty when there is no LoRA."""
    reshard(model)
    return {name: torch.zeros_like(held(p), device="cpu") for name, p in model.named_parameters() if ".lora_B." in name}


PROMPTS = (
    "conditioning/"  # what a trained text encoder said at that step, kept beside the weights; no parameter is called so
)


def with_conditioning(
    weights: Mapping[str, Tensor], conditioning: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Weights of a step together with the conditioning of probes, by name, as one file of named tensors."""
    flat = {
        f"{PROMPTS}{name}//{key}": tensor for name, tensors in conditioning.items() for key, tensor in tensors.items()
    }
    return {**weights, **flat}


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

    The live storage is set aside, never copied; but FSDP2 gathers from that very storage, so shards are written over, and back. Gradients
    must be taken inside, because gradient checkpointing computes activations a second time.

    Args:
        tensors: by parameter name; for a sharded parameter the whole tensor or this rank's part.

    Raises:
        ValueError: a name is unknown or a shape differs.
    """
    reshard(model)
    parameters = dict(model.named_parameters())
    values = {}
    for name, tensor in tensors.items():
        found = parameters.get(name)
        values[name] = tensor if found is None else _part(tensor, found)
        if found is None or held(found).shape != values[name].shape:
            has = tuple(held(found).shape) if found is not None else "no such parameter"
            raise ValueError(
                f"snapshot does not fit the model: {name} has shape {tuple(values[name].shape)}, the model {has}"
            )
    live: dict[str, Tensor] = {}
    try:
        for name, value in values.items():
            parameter = parameters[name]
            if is_sharded(parameter):
                live[name] = held(parameter).clone()
                held(parameter).copy_(value)
            else:
                live[name] = parameter.data
                parameter.data = torch.empty_like(parameter.data).copy_(value)  # keeps dtype, device and memory format
        torch.clear_autocast_cache()
        yield
    finally:
        reshard(model)
        for name, data in live.items():
            if is_sharded(parameters[name]):
                held(parameters[name]).copy_(data)
            else:
                parameters[name].data = data
        torch.clear_autocast_cache()


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, as FSDP2's parameters are (duck-typed: torch has moved the class)."""
    return hasattr(tensor, "to_local")


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of it, sharing its storage, outside of autograd."""
    detached: Any = tensor.detach()
    own: Tensor = detached.to_local() if is_sharded(tensor) else detached
    return own


def _part(tensor: Tensor, like: Any) -> Tensor:
    """``tensor`` cut as ``like`` is; unchanged when it already is."""
    if is_sharded(tensor) or not is_sharded(like) or tensor.shape != like.shape:
        return held(tensor)
    from torch.distributed.tensor import distribute_tensor

    return held(distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements))


def reshard(model: nn.Module) -> None:
    """Make FSDP2 forget what it has gathered, so that parameters are shards again and the next pass gathers what they hold then."""
    for module in model.modules():
        if callable(drop := getattr(module, "reshard", None)):
            drop()


class SnapshotStore:
    """Named tensors of earlier steps: the first is pinned, of the others the latest ``keep`` stay.

    Args:
        folder: where each step becomes ``step_NNNNNNN.safetensors``; ``None`` keeps everything in memory.
        keep: bound of the ring, at least 1.
        in_memory: hold what is on disk in memory as well (small things that are read often).
        writes: whether this process writes (one a machine); the others only read.
    """

    def __init__(self, folder: Path | None, keep: int, *, in_memory: bool = False, writes: bool = True) -> None:
        self.folder, self.keep, self.in_memory, self.writes = folder, keep, in_memory, writes
        self.steps: list[int] = []
        self._protected: set[int] = set()
        self._held: dict[int, dict[str, Tensor]] = {}

    def _file(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step_{step:07d}.safetensors"

    def add(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Keep ``tensors`` as those of ``step``.

        Raises:
            OSError: the disk refused; the tensors are held in memory instead, nothing is lost.
        """
        self.steps = [s for s in self.steps if s < step] + [step]
        self._held[step] = tensors
        for old in self.steps[1 : -self.keep]:
            self._held.pop(old, None)
            if old not in self._protected:
                self._forget(old)
        self.steps = self.steps[:1] + self.steps[1:][-self.keep :]
        if self.folder is None:
            return
        if self.writes:
            write_safetensors(self._file(step), tensors)
        if not self.in_memory:
            del self._held[step]

    def protect(self) -> list[int]:
        """The steps that a checkpoint taken now refers to; their files outlast the ring until the next checkpoint is taken."""
        for old in self._protected - set(self.steps):
            self._forget(old)
        self._protected = set(self.steps)
        return list(self.steps)

    def _forget(self, step: int) -> None:
        if self.folder is not None and self.writes:
            self._file(step).unlink(missing_ok=True)

    def __contains__(self, step: object) -> bool:
        return step in self.steps

    def get(self, step: int) -> dict[str, Tensor]:
        return self._held[step] if step in self._held else load_file(self._file(step))

    def resume(self, steps: list[int]) -> None:
        """Go on with what was kept at these steps; entries whose file is gone are forgotten."""
        self._protected = set(steps)
        self.steps = [s for s in steps if s in self._held or (self.folder is not None and self._file(s).is_file())]
        self._held = {s: tensors for s, tensors in self._held.items() if s in self.steps}
        if self.in_memory:
            self._held = {s: self.get(s) for s in self.steps}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole or not at all.

    Raises:
        OSError: also for what the library reports in a type of its own.
    """
    from safetensors import SafetensorError

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def to_ledger(measurements: Mapping[str, Measurement]) -> dict[str, Tensor]:
    """Measurements of reference probes as named tensors; the null branch is not kept."""
    tensors = {f"{name}/rho": m.rho.samples for name, m in measurements.items()}
    return tensors | {f"{name}/epsilon": m.epsilon for name, m in measurements.items()}


def from_ledger(tensors: Mapping[str, Tensor], name: str) -> Measurement | None:
    """One probe's measurement, or ``None`` when it was not taken then."""
    rho = tensors.get(f"{name}/rho")
    return None if rho is None else Measurement(CurvatureMap(rho), tensors[f"{name}/epsilon"])
