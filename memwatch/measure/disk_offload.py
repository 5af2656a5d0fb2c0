"""Shelf: what is needed at events only lies on disk in between, in files without a name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memwatch.denoiser import aligned
from memwatch.measure.weights import write_safetensors


def shelved(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The same tensors, mapped from a file: they take memory only while they are read, and the system may reclaim it.

    The file has no name any more. So nobody can change it, and it is gone with the last of the tensors, however the
    process ends. Where the disk refuses, the tensors are left as they are. All share one storage: clone what is to be
    pickled.

    Args:
        tensors: on the CPU, each with a storage of its own.
        folder: on the disk that is to hold them; it need not exist yet.
    """
    file: Path | None = None
    try:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        handle, name = tempfile.mkstemp(prefix=".shelf-", suffix=".safetensors", dir=there)
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


class ShelvedNetwork:
    """A frozen network that is needed now and then. In between its weights take no memory, on any device.

    Args:
        module: nobody else uses it.
        folder: see ``shelved``.
    """

    def __init__(self, module: nn.Module, folder: Path) -> None:
        self._module = module.to("cpu")
        self._tensors = [*module.parameters(), *module.buffers()]
        kept = shelved({str(i): tensor.data for i, tensor in enumerate(self._tensors)}, folder)
        self._kept = [kept[str(i)] for i in range(len(self._tensors))]
        self._put_back()

    def _put_back(self) -> None:
        for tensor, kept in zip(self._tensors, self._kept, strict=True):
            tensor.data = kept

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Inside, the network can be used on ``device``."""
        try:
            aligned(self._module.to(device))
            yield
        finally:
            self._put_back()
