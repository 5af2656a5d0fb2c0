"""Safetensors files: names, metadata and tensors, with one kind of error; and full checkpoints in one file.

A full checkpoint in one file has the names of its original repository (SD 1.x, 2.x, XL, 3, Flux). diffusers converts
it, with every configuration from the base, so the network is not used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from memwatch.denoiser import aligned
from memwatch.denoiser.log_filter import quietly

NETWORK = re.compile(r"(model\.diffusion_model\.|(joint_blocks|double_blocks|input_blocks)\.\d)")  # of a denoiser
ENCODERS = {  # prefixes of text encoders, and which one of the pipeline each of them is; T5 is always the base's
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.clip_g.": "text_encoder_2",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and says why."""


@contextmanager
def reading(source: object, what: str = "cannot be read") -> Iterator[None]:
    """Turn every error inside, of whatever kind, into a ``CheckpointError`` of one line that names the source."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{source}: {what}: {lines[0] if lines else type(error).__name__}") from error


def names_in(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file, from its header alone."""
    with reading(file), safe_open(file, "pt") as opened:
        return list(opened.keys())


def metadata_of(file: Path) -> dict[str, str]:
    """What a trainer has written into the header of a safetensors file; empty when it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def tensors_in(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The ``wanted`` tensors of a safetensors file by name, on the CPU."""
    with reading(file), safe_open(file, "pt") as opened:
        return {name: aligned(opened.get_tensor(name)) for name in filter(wanted, opened.keys())}


# --- full checkpoints in one file ------------------------------------------------------------------------------------


def single_file_part(file: Path, part: str, like: Any) -> nn.Module:
    """A text encoder of a file, by name, or its denoiser, of the class and configuration of ``like``, float32."""
    kind: Any = type(like)
    prefixes = tuple(prefix for prefix, encoder in ENCODERS.items() if encoder == part)
    what = f"its {part} cannot be converted to the base's, a {kind.__name__} that may be of another family"
    with TemporaryDirectory() as folder, reading(file, what), quietly():
        if prefixes:
            from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

            like.config.save_pretrained(folder)
            tensors = tensors_in(file, lambda key: key.startswith(prefixes))  # diffusers confuses two of the same width
            model: Any = create_diffusers_clip_model_from_ldm(kind, checkpoint=tensors, config=folder)
        else:
            others = (*ENCODERS, "text_encoders.", "first_stage_model.")
            like.save_config(folder)
            tensors = tensors_in(file, lambda key: not key.startswith(others))
            try:
                model = kind.from_single_file(tensors, config=folder)
            except NotImplementedError as error:  # what the file lacks has no value, and so cannot be moved
                raise CheckpointError(f"{file}: lacks some parameters of the base ({kind.__name__})") from error
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        why = f"{len(missing)} parameters of the {kind.__name__} are missing, {missing[0]} first"
        raise CheckpointError(f"{file}: {why}")
    whole: nn.Module = aligned(model.float())
    return whole
