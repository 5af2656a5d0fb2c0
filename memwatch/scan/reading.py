"""Safetensors files read with care: names before weights, and one kind of error for whatever goes wrong."""

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
    """Whatever a library raises while reading becomes one line that names the source.

    Libraries that read foreign files raise what their code stumbles over, so every kind of error is meant.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source}: {what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def names_in(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file; only its header is read.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(file), safe_open(file, "pt") as opened:
        return list(opened.keys())


def metadata_of(file: Path) -> dict[str, str]:
    """What a trainer has written about a safetensors file into its header; empty when it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def tensors_in(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, those that are ``wanted``, on the CPU and of the file's dtypes.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(file), safe_open(file, "pt") as opened:
        names = filter(wanted, opened.keys())
        return {name: aligned(opened.get_tensor(name)) for name in names}
