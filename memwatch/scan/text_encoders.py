"""Text encoders that come with checkpoints, and an earlier model from outside with its own text encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from memwatch.denoiser import Components, Denoiser, family_of, load_components
from memwatch.denoiser.log_filter import is_new
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.lora_off import lora_off, trained_adapters
from memwatch.measure.observer import Observer
from memwatch.measure.weights import with_conditioning
from memwatch.scan.checkpoints import (
    CheckpointError,
    Form,
    copy_into,
    form_of,
    is_pipeline,
    make_room,
    read_text_encoder,
    read_weights,
    text_encoders,
)

logger = logging.getLogger("memwatch")


def earlier_model(source: str, observer: Observer, pretrained: Any) -> Callable[[], Mapping[str, Tensor]]:
    """What the checkpoints are compared with: weights, with what their own text encoder makes of each prompt.

    Args:
        source: anything that ``memwatch.scan.checkpoints`` knows.
        pretrained: the pipeline of the model that is scanned.

    Raises:
        CheckpointError: it does not fit the model, or predicts something else.
    """
    denoiser, device = observer.denoiser, observer.ranks.accelerator.device
    weights = {name: tensor.to(device) for name, tensor in read_weights(source, observer.model).items()}
    if is_pipeline(source):
        parts = text_parts(source, denoiser, device)
        theirs = NoiseSchedule.from_scheduler(parts.scheduler).prediction_type
        ours = denoiser.schedule.prediction_type
        if theirs != ours:
            why = "epsilon can be compared, weights cannot be exchanged"
            raise CheckpointError(f"{source}: predicts {theirs}, the model {ours}; {why}")
    elif text_encoders(source):
        parts = text_parts(pretrained, denoiser, device)
        copy_text_encoders(source, denoiser, parts.text_encoders)
    else:
        return lambda: weights
    return cache(lambda: with_conditioning(weights, observer.encoded_by(parts)))


def text_parts(pretrained: Any, family: Denoiser | type[Denoiser], device: torch.device) -> Components:
    """Scheduler, and what encodes prompts."""
    names, optional = family.text_encoders, family.optional
    nothing = Components(None)
    return load_components(pretrained, nothing, needs_vae=False, text_encoders=names, optional=optional, device=device)


def own_text_encoders(sources: Sequence[str], pretrained: Any, model: nn.Module) -> tuple[Any, ...]:
    """Text encoders of the pipeline, if a source has its own; marked as trained, so that each event encodes anew.

    Of those that come as a LoRA only the LoRA is marked.

    Args:
        model: a denoiser, on the device for the encoders as well.
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
    """Overwrite the encoders that ``source`` has of its own, or their LoRA; where it has none, switch a LoRA off.

    Raises:
        CheckpointError: one of them is unreadable, or does not fit. In a single file that is a warning.
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
            if form_of(source)[0] is not Form.SINGLE_FILE:
                raise
            if is_new("memwatch", str(error)):  # scans come back to the same file
                logger.warning("memwatch: %s; the base's text encoder encodes the prompts instead", error)
