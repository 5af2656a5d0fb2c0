"""Meter: seconds and memory."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from memwatch.pace import synchronize


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call, with the GPU waited for."""
    synchronize()
    began = clock()
    work()
    synchronize()
    return clock() - began


def median_seconds(
    work: Callable[[], object], repeats: int = 3, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Of ``repeats`` calls, after one to warm up."""
    work()
    return statistics.median(timed(work, clock) for _ in range(repeats))


def clock_of(device: torch.device) -> Callable[[], float]:
    """On a CPU the processor's own time, which what else runs beside does not lengthen."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The shorter of two calls, by ``clock_of``."""
    return min(timed(work, clock_of(device)) for _ in range(2))


@dataclass
class Measured:
    """Seconds, and bytes above what the process held before (``None`` where that cannot be known)."""

    seconds: float = 0.0
    peak: int | None = None


@contextmanager
def measured(clock: Callable[[], float] = time.perf_counter) -> Iterator[Measured]:
    """Time what is inside, and find the most memory that it held.

    On CUDA that is what PyTorch has allocated. On the CPU it is the resident set's high water, which Linux keeps and
    can set back; memory that was freed before goes back to the system first.
    """
    found, cuda = Measured(), torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else _forget_high_water()
    began = clock()
    yield found
    synchronize()
    found.seconds = clock() - began
    after = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    found.peak = None if before is None or after is None else max(0, after - before)


def _forget_high_water() -> int | None:
    """Bytes that the process holds now, from where its high water rises; ``None`` where the system has none."""
    try:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(key: str) -> int | None:
    """A line of Linux's ``/proc/self/status``, bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
