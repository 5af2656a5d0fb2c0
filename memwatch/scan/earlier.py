"""Earlier models of a scan: checkpoints read again, and a model from outside with its own text encoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from memwatch.denoiser import Components, Denoiser, load_components
from memwatch.denoiser.log_filter import is_new
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.lora_off import lora_off
from memwatch.measure.observer import Observer
from memwatch.measure.weights import with_conditioning
from memwatch.scan.checkpoints import (
    CheckpointError,
    copy_into,
    is_pipeline,
    make_room,
    read_text_encoder,
    read_weights,
    single_file,
    text_encoders,
)
from memwatch.scan.observation_cache import stamp

logger = logging.getLogger("memwatch")


class EarlierModel:
    """The model compared with: its weights, and its own text encoder where it comes with one.

    Args:
        source: anything that ``memwatch.scan.checkpoints`` knows.
        pretrained: the pipeline of the model that is scanned.

    Raises:
        CheckpointError: it does not fit the model, or predicts something else.
    """

    def __init__(self, source: str, observer: Observer, pretrained: Any) -> None:
        self.stamp, self._observer = stamp(source), observer
        denoiser, device = observer.denoiser, observer.ranks.accelerator.device
        self._weights = {name: tensor.to(device) for name, tensor in read_weights(source, observer.model).items()}
        self._parts: Components | None = None
        if is_pipeline(source):
            self._parts = text_parts(source, denoiser, device)
            theirs = NoiseSchedule.from_scheduler(self._parts.scheduler).prediction_type
            ours = denoiser.schedule.prediction_type
            if theirs != ours:
                why = "epsilon can be compared, weights cannot be exchanged"
                raise CheckpointError(f"{source}: predicts {theirs}, the model {ours}; {why}")
        elif text_encoders(source):
            self._parts = text_parts(pretrained, denoiser, device)
            copy_text_encoders(source, denoiser, self._parts.text_encoders)

    def weights(self) -> Mapping[str, Tensor]:
        """Its weights, with the conditioning that its own text encoder gives each probe."""
        return self._weights_and_conditioning

    @cached_property
    def _weights_and_conditioning(self) -> Mapping[str, Tensor]:
        if self._parts is None:
            return self._weights
        return with_conditioning(self._weights, self._observer.encoded_by(self._parts))


def text_parts(pretrained: Any, family: Denoiser | type[Denoiser], device: torch.device) -> Components:
    """Scheduler, and what encodes prompts."""
    names, optional = family.text_encoders, family.optional
    nothing = Components(None)
    return load_components(pretrained, nothing, needs_vae=False, text_encoders=names, optional=optional, device=device)


def copy_text_encoders(source: str, family: Denoiser, encoders: Sequence[Any]) -> None:
    """Overwrite those that ``source`` has of its own, or their LoRA; the LoRA of an earlier source goes where not.

    Raises:
        CheckpointError: one of them is unreadable, or does not fit.
    """
    theirs = text_encoders(source)
    for name, encoder in zip(family.text_encoders, encoders, strict=False):  # none at all where none is trained
        if encoder is None:
            continue
        if name not in theirs:
            copy_into(encoder, lora_off(encoder))
            continue
        make_room(encoder, source, name)
        try:
            copy_into(encoder, read_text_encoder(source, name, encoder))
        except CheckpointError as error:
            if single_file(source) is None:
                raise
            _say_left_out(error)


def _say_left_out(error: CheckpointError) -> None:
    """Once for each, as scans come back to the same file."""
    if is_new("memwatch", str(error)):
        logger.warning("memwatch: %s; prompts are encoded by the base's own", error)
