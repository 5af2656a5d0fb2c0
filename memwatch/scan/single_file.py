"""Full checkpoints in one file, which have the names of their original repositories (SD 1.x, 2.x, XL, 3, Flux).

diffusers converts them, with every configuration from the base, so the network is not used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from memwatch.denoiser import aligned
from memwatch.denoiser.log_filter import quietly
from memwatch.scan.weight_files import CheckpointError, names_in, reading, tensors_in

NETWORK = re.compile(r"(model\.diffusion_model\.|(joint_blocks|double_blocks|input_blocks)\.\d)")  # of a denoiser
ENCODERS = {  # prefixes of text encoders, and which one of the pipeline each of them is; T5 is always the base's
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.clip_g.": "text_encoder_2",
}


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
            like.save_config(folder)
            tensors = tensors_in(file, network_of(names_in(file)).__contains__)
            sizes = [tensor.numel() for tensor in tensors.values()]  # diffusers empties the mapping
            try:
                model = kind.from_single_file(tensors, config=folder)
            except NotImplementedError as error:  # what the file lacks has no value, and so cannot be moved
                raise CheckpointError(f"{file}: lacks some parameters of the base ({kind.__name__})") from error
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        why = f"{len(missing)} parameters of the {kind.__name__} are missing, {missing[0]} first"
        raise CheckpointError(f"{file}: {why}")
    takes = sum(tensor.numel() for tensor in model.state_dict().values())
    if not prefixes and sum(sizes) != takes:  # diffusers drops what it does not know
        why = f"{sum(sizes)} numbers in {len(sizes)} tensors, of which the {kind.__name__} of the base takes {takes}"
        raise CheckpointError(f"{file}: the network in it has {why}; is it of another base?")
    whole: nn.Module = aligned(model.float())
    return whole


def network_of(names: Sequence[str]) -> set[str]:
    """The names of the denoiser: under its prefix or, in a file of a network alone, all of them."""
    under = {name for name in names if name.startswith("model.diffusion_model.")}
    return under or {name for name in names if not name.startswith((*ENCODERS, "text_encoders.", "first_stage_model."))}
