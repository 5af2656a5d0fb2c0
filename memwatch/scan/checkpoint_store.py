"""Seen: the checkpoints that a scan has looked at, and the model with the weights of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from memwatch.denoiser import family_of
from memwatch.measure.lora_off import lora_off, trained_adapters
from memwatch.measure.observer import Observer
from memwatch.measure.snapshots import SnapshotStore
from memwatch.measure.weights import with_conditioning, without_conditioning
from memwatch.scan.checkpoints import CheckpointError, copy_into, make_room, read_weights, text_encoders
from memwatch.scan.earlier import copy_text_encoders, text_parts
from memwatch.scan.observation_cache import Stamp, stamp


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step.

    Attributes:
        step: optimizer step, or epoch where the trainer's names count those.
        source: anything that ``memwatch.scan.checkpoints`` knows.
        stamp: names, sizes and times of its weight files as they were found; others mean other weights.
    """

    step: int
    source: str
    stamp: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(cls, step: int, source: object) -> Self:
        """The checkpoint as it lies there now; a hub id has no files."""
        return cls(step, str(source), tuple(stamp(str(source))))

    @property
    def is_there(self) -> bool:
        """Whether its files are still those that were found."""
        return tuple(stamp(self.source)) == self.stamp


def own_text_encoders(checkpoints: Sequence[Checkpoint], pretrained: Any, model: nn.Module) -> tuple[Any, ...]:
    """Text encoders that change between checkpoints, marked as trained so that they are asked at every event.

    Of those that come as a LoRA only the LoRA is.

    Args:
        model: a denoiser, on the device that the encoders go to as well.
    """
    owners = {
        c.source: names for c in checkpoints if c.source != str(pretrained) and (names := text_encoders(c.source))
    }
    if not owners:
        return ()
    family = family_of(model)
    parts = text_parts(pretrained, family, next(model.parameters()).device)
    for name, encoder in zip(family.text_encoders, parts.text_encoders, strict=True):
        theirs = [source for source, names in owners.items() if name in names] if encoder is not None else []
        for source in theirs:
            with suppress(CheckpointError):  # said when its weights are read
                make_room(encoder, source, name)
        if theirs and not trained_adapters(encoder):
            encoder.requires_grad_(True)
    return parts.text_encoders


class Seen:
    """Checkpoints in order of step, of which the observer's model holds one at a time.

    Args:
        observer: its model and its trained text encoders are written over.
        base: the pipeline. As a checkpoint it is the model before training: of a LoRA, the LoRA off.

    Attributes:
        stamps: by step.
    """

    def __init__(self, observer: Observer, base: str) -> None:
        self.observer, self.base = observer, base
        self.stamps: dict[int, Stamp] = {}
        self._checkpoints: list[Checkpoint] = []
        self._loaded: int | None = None

    def add(self, checkpoint: Checkpoint) -> None:
        """One more, of a greater step than all others."""
        assert not self._checkpoints or checkpoint.step > self._checkpoints[-1].step
        self._checkpoints.append(checkpoint)
        self.stamps[checkpoint.step] = list(checkpoint.stamp)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Its event did not come about; what the model holds now counts as nothing."""
        self._checkpoints.remove(checkpoint)
        self._loaded = None

    @property
    def sources(self) -> list[tuple[int, str]]:
        """(step, source) of all: what an observation at the last of them may depend on."""
        return [(c.step, c.source) for c in self._checkpoints]

    def is_there(self, step: int) -> bool:
        """Whether the weights of that step can still be read."""
        return any(c.step == step and c.is_there for c in self._checkpoints)

    def load(self, step: int) -> None:
        """Give the model the weights of that step, and trained text encoders theirs.

        Raises:
            CheckpointError: they cannot be read, or are gone.
        """
        if self._loaded == step:
            return
        self._loaded = None
        copy_into(self.observer.model, self.read(step))
        copy_text_encoders(self._at(step).source, self.observer.denoiser, self.observer.text_encoders)
        self.observer.forget_generations()
        self._loaded = step

    def read(self, step: int) -> dict[str, Tensor]:
        """The network's weights of that step, by parameter name.

        Raises:
            CheckpointError: they cannot be read, or are gone.
        """
        checkpoint = self._at(step)
        if checkpoint.source == self.base and (off := lora_off(self.observer.model)):
            return off
        if not checkpoint.is_there:
            raise CheckpointError(f"{checkpoint.source}: was deleted or written over after it had been found")
        return read_weights(checkpoint.source, self.observer.model)

    def _at(self, step: int) -> Checkpoint:
        return next(c for c in self._checkpoints if c.step == step)

    def to_list(self) -> list[Any]:
        """Plain values."""
        return [[c.step, c.source, [list(part) for part in c.stamp]] for c in self._checkpoints]

    def restore(self, saved: Sequence[Any]) -> None:
        """The inverse of ``to_list``."""
        self._checkpoints, self._loaded = from_list(saved), None
        self.stamps.update({c.step: list(c.stamp) for c in self._checkpoints})


def from_list(saved: Sequence[Any]) -> list[Checkpoint]:
    """Checkpoints as ``Seen.to_list`` wrote them."""
    return [Checkpoint(step, source, tuple((n, s, t) for n, s, t in parts)) for step, source, parts in saved]


class KeptWeights(SnapshotStore):
    """Weights that lie in checkpoints, as long as those are there; what a trained text encoder said then lies beside.

    Args:
        folder: for that, and for the marks of each step.
    """

    def __init__(self, seen: Seen, folder: Path, *, writes: bool) -> None:
        super().__init__(folder, keep=1_000_000, writes=writes)
        self._seen = seen

    def add(self, step: int, tensors: dict[str, Tensor], marks: Mapping[str, str] | None = None) -> None:
        super().add(step, with_conditioning({}, without_conditioning(tensors)[1]), marks)

    def get(self, step: int) -> dict[str, Tensor]:
        return self._seen.read(step) | super().get(step)

    def has(self, step: int) -> bool:
        return super().has(step) and self._seen.is_there(step)
