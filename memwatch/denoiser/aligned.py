"""Aligned: weights that came from a file, moved to where kernels expect them."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

ALIGNMENT = 64  # bytes: of everything that torch allocates on the CPU

Weights = TypeVar("Weights", Tensor, nn.Module)


def aligned(weights: Weights) -> Weights:
    """A tensor, or a network with all its parameters and buffers, at addresses that are multiples of ``ALIGNMENT``.

    What safetensors maps from a file lies where the file's header lets it begin, and views begin where they were cut.
    Some CPU kernels round otherwise there (by about 1e-6), so that a model compared with itself would not read exactly
    0. Everything that is read from a file goes through this function before anything is computed with it.

    Args:
        weights: a tensor stays the same object where it lies well already. A network is changed in place.
    """
    if isinstance(weights, nn.Module):
        for tensor in (*weights.parameters(), *weights.buffers()):
            tensor.data = aligned(tensor.data)
        return weights
    return weights.clone() if offset_of(weights) else weights


def offset_of(tensor: Tensor) -> int:
    """How many bytes a tensor lies behind a multiple of ``ALIGNMENT``; 0 on any device but the CPU."""
    return tensor.data_ptr() % ALIGNMENT if tensor.device.type == "cpu" else 0
