"""Safetensors files, and one kind of error for whatever goes wrong while a checkpoint is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from memwatch.denoiser import aligned


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and says why."""


@contextmanager
def reading(source: object, what: str = "cannot be read") -> Iterator[None]:
    """Turn every error inside into a ``CheckpointError`` of one line that names the source.

    Libraries that read foreign files raise whatever their code stumbles over.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{source}: {what}: {lines[0] if lines else type(error).__name__}") from error


def names_in(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file, from its header alone. Raises a ``CheckpointError``."""
    with reading(file), safe_open(file, "pt") as opened:
        return list(opened.keys())


def metadata_of(file: Path) -> dict[str, str]:
    """What a trainer has written into the header of a safetensors file; empty when it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def tensors_in(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The ``wanted`` tensors of a safetensors file by name, on the CPU. Raises a ``CheckpointError``."""
    with reading(file), safe_open(file, "pt") as opened:
        return {name: aligned(opened.get_tensor(name)) for name in filter(wanted, opened.keys())}
