"""Ranks: the processes of a run, how they hold the model, which probes each measures, and how they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import AutocastKwargs, gather_object
from torch import nn

from memwatch.config import MemWatchConfig, require
from memwatch.denoiser import unwrap
from memwatch.faults import Faults, PartError, StrictError

T = TypeVar("T")

UNKNOWN = ("MEGATRON_LM", "XLA", "TP")


@dataclass(frozen=True)
class Ranks:
    """All processes of one accelerator.

    Attributes:
        accelerator: the loop's.
        sharding: how the model is shared out, in words that users know: ``DDP``, ``FSDP2``, ...
        lockstep: whether a forward pass is a collective, because parameters are sharded. Then every rank measures every
            probe, in the same order.
        swappable: whether earlier weights can replace the live ones for a while.
    """

    accelerator: Any
    sharding: str
    lockstep: bool = False
    swappable: bool = True

    @classmethod
    def of(cls, accelerator: Any) -> Ranks:
        """What the accelerator's distributed type means for memwatch.

        Raises:
            ValueError: memwatch cannot work with this type.
        """
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if kind in UNKNOWN:
            known = "one process, DDP, FSDP1, FSDP2 and DeepSpeed"
            raise ValueError(f"memwatch works with {known}; got distributed type {kind}")
        if kind == "DEEPSPEED":
            stage = int(accelerator.deepspeed_config["zero_optimization"]["stage"])
            return cls(accelerator, f"DeepSpeed ZeRO-{stage}", lockstep=stage == 3, swappable=stage < 3)
        if kind == "FSDP":
            second = bool(getattr(accelerator, "is_fsdp2", False))
            return cls(accelerator, "FSDP2" if second else "FSDP1", lockstep=True, swappable=second)
        return cls(accelerator, "DDP" if accelerator.num_processes > 1 else "one process")

    @property
    def reuse_graph(self) -> bool:
        """Whether one forward pass serves several backward passes; FSDP1 and ZeRO-3 free parameters after the first."""
        return not self.lockstep or self.swappable

    def require(self, config: MemWatchConfig, has_prompts: bool) -> None:
        """Refuse settings that need other weights, where weights cannot be exchanged.

        Raises:
            ConfigError: the message names the key, its value and what is allowed.
        """
        if not self.swappable:
            under = f"under {self.sharding}, whose weights cannot be exchanged during training"
            require(not has_prompts, "probes", "prompts", f"images with captions {under}")
            require(config.weights == "live", "weights", config.weights, f"live {under}")
            signals, allowed = config.signals, f"first, previous, lag:N or last_clean {under}"
            require(not signals.baseline_is_fixed, "signals.baseline", signals.baseline, allowed)

    def mixed_precision(self) -> AbstractContextManager[Any]:
        """The loop's own, as ``accelerator.autocast`` enters it, but without a cache.

        A cache would hand low-precision weights made without gradients to a surrounding autocast of the loop.
        """
        handler = self.accelerator.autocast_handler or AutocastKwargs()
        context: AbstractContextManager[Any] = self.accelerator.autocast(replace(handler, cache_enabled=False))
        return context

    def forward_module(self, model: nn.Module) -> nn.Module:
        """What memwatch calls: the bare network or, under sharding, the module whose hooks gather the parameters.

        Raises:
            ValueError: the parameters are on another device than the one that computes (CPU offload).
        """
        if not self.lockstep:
            return unwrap(model)
        model = getattr(model, "_orig_mod", model)
        if self.sharding.startswith("DeepSpeed"):
            # the engine's own forward would mistake memwatch's backward pass for one of the loop
            inner: Any = model.module
            return inner  # type: ignore[no-any-return]
        lies, computes = next(model.parameters()).device.type, self.accelerator.device.type
        if lies != computes:
            where = f"{self.sharding} keeps parameters on {lies} while {computes} computes"
            raise ValueError(f"{where}; memwatch works without CPU offload")
        return model

    @contextmanager
    def unpartitioned(self) -> Iterator[None]:
        """Inside, models are loaded whole; under ZeRO-3 transformers would split them, whatever accelerate is told."""
        if not self.sharding.startswith("DeepSpeed"):
            yield
            return
        from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        try:
            yield
        finally:
            if (config := self.accelerator.state.deepspeed_plugin.dschf) is not None:
                set_hf_deepspeed_config(config)

    # --- sharing out, and agreeing -----------------------------------------------------------------------------------

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this rank measures: all of them in lockstep."""
        return items if self.lockstep else items[self.accelerator.process_index :: self.accelerator.num_processes]

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks, the same on every rank; rank 0's in lockstep."""
        speaks = self.accelerator.process_index == 0 or not self.lockstep
        found = list(items) if speaks else []
        return gather_object(found) if self.accelerator.num_processes > 1 else found

    def agree(self, error: str | None) -> str | None:
        """The first error of any rank, the same on every rank; ``None`` without an error. It waits for all ranks."""
        errors = gather_object([error]) if self.accelerator.num_processes > 1 else [error]
        return next((text for text in errors if text is not None), None)

    def together(self, part: str, faults: Faults, work: Callable[[], T]) -> T:
        """What ``work`` returns on this rank, once it is done on all; a failure on any rank is one of ``part`` on all.

        ``work`` must not wait for other ranks, since a failed rank never comes. Only passes of a sharded model do.

        Raises:
            PartError: on every rank, when it failed on any.
            StrictError: instead, on every rank, when ``faults`` is strict.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # a monitor never kills a run
            error = caught
        counted = isinstance(error, StrictError)
        failed = self.agree(None if error is None else str(error) if counted else repr(error))
        if failed is None:
            faults.worked(part)
            return result  # type: ignore[return-value]  # only None where work gives None
        if error is not None and counted:
            raise error
        faults.failed(part, failed, error)
        raise PartError(f"{part} failed: {failed}") from error

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.accelerator.num_processes == 1:
            return value
        theirs: T = gather_object([value])[0]
        return theirs

    def largest(self, value: int) -> int:
        """The largest value of any rank."""
        return max(gather_object([value])) if self.accelerator.num_processes > 1 else value

    # --- files -------------------------------------------------------------------------------------------------------

    @property
    def writes_weights(self) -> bool:
        """Whether this rank writes weights: one rank per machine, or every rank its own shard."""
        return bool(self.lockstep or self.accelerator.is_local_main_process)

    def weights_folder(self, folder: Path) -> Path:
        """Where this rank writes weights; a shard's folder names the number of ranks, which shards of it need."""
        if not self.lockstep:
            return folder
        return folder / f"rank-{self.accelerator.process_index}-of-{self.accelerator.num_processes}"
