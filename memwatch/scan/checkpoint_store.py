"""What a scan has of its checkpoints: weights in the observer's model and text encoders, and what was measured."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from memwatch.config import MemWatchConfig
from memwatch.denoiser import Components, Denoiser, family_of, load_components
from memwatch.measure.lora_off import lora_off, trained_adapters
from memwatch.measure.measurement import (
    Observation,
    digest,
    measured_under,
    observation_from_tensors,
    observation_to_tensors,
)
from memwatch.measure.observer import Observer
from memwatch.measure.prepare import PreparedProbe
from memwatch.measure.snapshots import SnapshotStore
from memwatch.measure.weights import read_safetensors, with_conditioning, without_conditioning, write_safetensors
from memwatch.run_folder import stem_of
from memwatch.scan.checkpoints import (
    Form,
    are_equal,
    copy_into,
    form_of,
    is_pipeline,
    make_room,
    read_weights,
    text_encoders,
)
from memwatch.scan.prediction import check_prediction
from memwatch.scan.trainer_folder import Checkpoint
from memwatch.scan.weight_files import CheckpointError

logger = logging.getLogger("memwatch")

FORMAT = 2  # of a cached observation; another one is measured again


class CheckpointStore:
    """The scanned checkpoints in order of step, of which the observer's model and trained text encoders hold one.

    Args:
        base: the pipeline. As a checkpoint it is the model before training: of a LoRA, the LoRA off.
    """

    def __init__(self, observer: Observer, base: str) -> None:
        self.observer, self.base = observer, base
        self._checkpoints: dict[int, Checkpoint] = {}
        self._loaded: int | None = None

    def add(self, checkpoint: Checkpoint) -> None:
        """One more, of a greater step than all others."""
        assert checkpoint.step > max(self._checkpoints, default=-1)
        self._checkpoints[checkpoint.step] = checkpoint

    def remove(self, checkpoint: Checkpoint) -> None:
        """Forget it: its event failed. The model may hold a part of it."""
        del self._checkpoints[checkpoint.step]
        self._loaded = None

    def is_there(self, step: int) -> bool:
        """Whether the weights of that step can still be read."""
        return step in self._checkpoints and self._checkpoints[step].is_there

    def load(self, step: int) -> None:
        """Give the model the weights of that step, and trained text encoders theirs."""
        if self._loaded == step:
            return
        before, self._loaded = self._loaded, None
        source = self._checkpoints[step].source
        check_prediction(source, self.observer.denoiser.schedule, self.base)
        weights = self.read(step)
        if before is not None and not text_encoders(source) and are_equal(self.observer.model, weights):
            logger.warning("%s and %s are equal, tensor for tensor", source, self._checkpoints[before].source)
        copy_into(self.observer.model, weights)
        copy_text_encoders(self._checkpoints[step].source, self.observer.denoiser, self.observer.text_encoders)
        self.observer.forget_generations()
        self._loaded = step

    def read(self, step: int) -> dict[str, Tensor]:
        """The network's weights of that step, by parameter name."""
        checkpoint = self._checkpoints[step]
        if checkpoint.source == self.base and (off := lora_off(self.observer.model)):
            return off
        if not checkpoint.is_there:
            raise CheckpointError(f"{checkpoint.source}: was deleted or overwritten after memwatch had found it")
        return read_weights(checkpoint.source, self.observer.model)

    def to_list(self) -> list[list[Any]]:
        """Plain values, which ``restore`` takes."""
        return [[c.step, c.source, c.stamp] for c in self._checkpoints.values()]

    def restore(self, saved: Sequence[Sequence[Any]]) -> None:
        self._checkpoints, self._loaded = {c[0]: Checkpoint(*c) for c in saved}, None


class CheckpointWeights(SnapshotStore):
    """Baseline weights that are read from the checkpoints; only what a trained text encoder encoded is written."""

    def __init__(self, store: CheckpointStore, folder: Path, *, writes: bool) -> None:
        super().__init__(folder, keep=1_000_000, writes=writes)
        self._store = store

    def add(self, step: int, tensors: dict[str, Tensor], marks: Mapping[str, str] | None = None) -> None:
        super().add(step, with_conditioning({}, without_conditioning(tensors)[1]), marks)

    def get(self, step: int) -> dict[str, Tensor]:
        return self._store.read(step) | super().get(step)

    def has(self, step: int) -> bool:
        return super().has(step) and self._store.is_there(step)


class ObservationCache:
    """What was measured: one file per step and probe, under a name that changes with everything it depends on.

    Args:
        depends: what every observation depends on beside the settings, as JSON takes it.
        history: gives the checkpoints so far, which an observation may depend on; likewise.
    """

    def __init__(
        self, folder: Path, config: MemWatchConfig, depends: Sequence[Any], history: Callable[[], list[Any]]
    ) -> None:
        self.folder, self.config, self._history = folder, config, history
        self._depends = [FORMAT, config.signals.baseline, *depends]

    def file(self, step: int, p: PreparedProbe) -> Path:
        """Where the observation of a probe is, or will be."""
        short = digest(self._depends, self._history(), p.name, measured_under(self.config, p))[:12]
        return self.folder / stem_of(step) / f"{p.name}-{short}.safetensors"

    def read(self, step: int, p: PreparedProbe) -> Observation | None:
        """The observation of a probe, or ``None`` when it has to be measured (again)."""
        file = self.file(step, p)
        try:
            return observation_from_tensors(read_safetensors(file), p.probe) if file.is_file() else None
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("%s cannot be read (%s); the probe is measured again", file, error)
            return None

    def write(self, step: int, p: PreparedProbe, observation: Observation) -> None:
        write_safetensors(self.file(step, p), observation_to_tensors(observation))

    def thin(self, newest: int) -> None:
        """Delete all but the newest steps."""
        for folder in sorted(self.folder.glob("step_*"))[:-newest]:
            shutil.rmtree(folder, ignore_errors=True)


# --- text encoders, and an earlier model with its own ----------------------------------------------------------------


def earlier_model(source: str, observer: Observer, pretrained: Any) -> Callable[[], Mapping[str, Tensor]]:
    """What the checkpoints are compared with: weights of ``source``, and prompts encoded by its own text encoder.

    Raises:
        CheckpointError: it does not fit the model, which belongs to ``pretrained``, or predicts something else.
    """
    denoiser, device = observer.denoiser, observer.ranks.accelerator.device
    check_prediction(source, denoiser.schedule, str(pretrained))
    weights = {name: tensor.to(device) for name, tensor in read_weights(source, observer.model).items()}
    whole = is_pipeline(source)
    if are_equal(observer.model, weights):
        logger.warning("the baseline %s and the first checkpoint are equal, tensor for tensor", source)
    if not whole and not text_encoders(source):
        return lambda: weights
    parts = text_parts(source if whole else pretrained, denoiser, device)
    if not whole:
        copy_text_encoders(source, denoiser, parts.text_encoders)
    return cache(lambda: with_conditioning(weights, observer.encoded_by(parts)))


def text_parts(pretrained: Any, family: Denoiser | type[Denoiser], device: torch.device) -> Components:
    """Scheduler, and what encodes prompts."""
    names, optional = family.text_encoders, family.optional
    nothing = Components(None)
    return load_components(pretrained, nothing, needs_vae=False, text_encoders=names, optional=optional, device=device)


def own_text_encoders(sources: Sequence[str], pretrained: Any, model: nn.Module) -> tuple[Any, ...]:
    """Text encoders of the pipeline, if a source has its own; marked as trained, so that each event encodes anew.

    Of those that come as a LoRA only the LoRA is marked. They lie on the device of ``model``, the denoiser.
    """
    owners = {source: names for source in sources if source != str(pretrained) and (names := text_encoders(source))}
    if not owners:
        return ()
    family = family_of(model)
    parts = text_parts(pretrained, family, next(model.parameters()).device)
    for name, encoder in zip(family.text_encoders, parts.text_encoders, strict=True):
        theirs = [source for source, names in owners.items() if name in names] if encoder is not None else []
        for source in theirs:
            with suppress(CheckpointError):  # reading its weights reports that
                make_room(encoder, source, name)
        if theirs and not trained_adapters(encoder):
            encoder.requires_grad_(True)
    return parts.text_encoders


def copy_text_encoders(source: str, family: Denoiser, encoders: Sequence[Any]) -> None:
    """Overwrite the encoders that ``source`` has of its own, or their LoRA; where it has no LoRA, switch theirs off."""
    theirs, is_lora = text_encoders(source), form_of(source)[0] is Form.LORA
    for name, encoder in zip(family.text_encoders, encoders, strict=False):  # none at all where none is trained
        if encoder is None:
            continue
        off = lora_off(encoder)
        if name not in theirs or (off and not is_lora):  # a LoRA's base
            copy_into(encoder, off)
        else:
            make_room(encoder, source, name)
            copy_into(encoder, read_weights(source, encoder, name))
