"""How many bytes of tensors and arrays an object holds."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

PASSED_OVER = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, types.FrameType)


def bytes_held(root: Any, apart_from: Iterable[Any] = ()) -> int:
    """Bytes in memory that can be reached from ``root`` without what others own; mapped files do not count."""
    seen, sizes, waiting = {id(thing) for thing in apart_from}, dict[int, int](), [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, PASSED_OVER):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            sizes[thing.ctypes.data] = thing.nbytes
        elif isinstance(thing, bytes):
            sizes[id(thing)] = len(thing)
        else:
            waiting += gc.get_referents(thing)
            waiting += list(getattr(thing, "__dict__", {}).values())
    files = mapped_files()
    return sum(size for place, size in sizes.items() if not any(start <= place < end for start, end in files))


def mapped_files() -> list[tuple[int, int]]:
    """Where safetensors are mapped into this process, ``(start, end)``; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.is_file() else []
    of_files = (line.split()[0].split("-") for line in lines if ".safetensors" in line)
    return [(int(start, 16), int(end, 16)) for start, end in of_files]
