"""Finished weights on disk or hub: which model they are, and their tensors by parameter name.

Known forms: a diffusers pipeline (folder or hub id); a folder with ``unet/`` or ``transformer/`` inside, as diffusers'
training scripts write into ``checkpoint-N``; a folder of one model; LoRA of every trainer (``lora.py``: a file, or a
folder with ``pytorch_lora_weights.safetensors`` or PEFT's ``adapter_model.safetensors``) on a base; full checkpoints in
one file (``single_file.py``) beside a base that describes them; and safetensors named as the model's own parameters are
(``model.safetensors`` of accelerate).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memwatch.act.formats import LORA_FILE
from memwatch.denoiser import aligned
from memwatch.denoiser.log_filter import quietly
from memwatch.scan.discovery import found_in as found_in  # this module is the door to all that is said of checkpoints
from memwatch.scan.discovery import is_complete as is_complete
from memwatch.scan.discovery import numbered as numbered
from memwatch.scan.lora import PEFT_FILE, add_lora, lora_weights
from memwatch.scan.lora_keys import DENOISER, is_lora, parts_in
from memwatch.scan.reading import CheckpointError as CheckpointError
from memwatch.scan.reading import names_in, reading, tensors_in
from memwatch.scan.single_file import (
    encoders_in,
    is_original,
    single_file_encoder,
    single_file_like,
    single_file_model,
)

PARTS = ("unet", "transformer")


def is_pipeline(source: str) -> bool:
    """Whether text encoder, VAE and scheduler come with it: a pipeline's folder, or a hub id (no local path)."""
    return not Path(source).exists() or (Path(source) / "model_index.json").is_file()


def lora_file(source: str) -> Path | None:
    """The LoRA file of a source, or ``None`` when it is no LoRA.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return next((path / name for name in (LORA_FILE, PEFT_FILE) if (path / name).is_file()), None)
    return path if _is_safetensors(path) and is_lora(names_in(path)) else None


def single_file(source: str) -> Path | None:
    """The file of a full checkpoint under its original repository's names, or ``None`` when it is none.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    path = Path(source)
    if not _is_safetensors(path):
        return None
    names = names_in(path)
    return path if is_original(names) and not is_lora(names) else None


def load_model(source: str, pretrained: Any = None) -> nn.Module:
    """The denoiser that ``source`` holds, float32, in eval mode, on the CPU.

    Args:
        source: see above.
        pretrained: the pipeline whose denoiser a LoRA, a single file or bare tensors belong to.

    Raises:
        CheckpointError: unknown form, unreadable, or the base is missing or does not fit.
    """
    lora, whole, tensors = lora_file(source), single_file(source), _bare_tensors(source)
    if lora is None and whole is None and tensors is None:
        return _from_diffusers(source)
    if pretrained is None:
        raise CheckpointError(
            f"{source}: these are weights of a model that is described elsewhere; pass its pipeline as --pretrained"
        )
    if whole is not None:
        part = _part(str(pretrained))
        return single_file_model(whole, _class_of(str(pretrained), part), str(pretrained), part)
    model = _from_diffusers(str(pretrained))
    if lora is not None:
        make_room(model, source, DENOISER)
    copy_into(model, read_weights(source, model))
    return model.eval()


def read_weights(source: str, like: nn.Module) -> dict[str, Tensor]:
    """Tensors of ``source`` under the names of ``like``'s parameters: all of them, or those of a LoRA.

    Raises:
        CheckpointError: unreadable, or of another family, size or rank than ``like``.
    """
    lora, whole, tensors = lora_file(source), single_file(source), _bare_tensors(source)
    if lora is not None:
        weights = lora_weights(lora, DENOISER, like)
    elif tensors is not None:
        names = dict(like.named_parameters())
        weights = tensors_in(tensors, names.__contains__)
        if not weights:
            raise CheckpointError(f"{source}: none of its tensors is a parameter of the {type(like).__name__}")
    else:
        model = single_file_like(whole, like) if whole is not None else _from_diffusers(source)
        if type(model) is not type(like):
            raise CheckpointError(
                f"{source}: holds a {type(model).__name__}, expected a {type(like).__name__} as the model is"
            )
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    check_fit(weights, like, source, partly=lora is not None)
    return weights


def check_fit(weights: Mapping[str, Tensor], model: nn.Module, source: str, *, partly: bool) -> None:
    """Every weight has its parameter of the same shape; unless ``partly``, every parameter has its weight as well."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, tensor in weights.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the model {shapes.get(name, 'no such parameter')}"
            )
    missing = [name for name in shapes if name not in weights and (not partly or ".lora_" in name)]
    if missing:
        raise CheckpointError(f"{source}: {len(missing)} of the model's parameters are missing, {missing[0]} first")


def text_encoders(source: str) -> list[str]:
    """Names of the text encoders that come with the denoiser: in folders beside it, in its file, or as a LoRA.

    None of a file that cannot be read; whoever reads its weights says so.
    """
    try:
        lora, whole = lora_file(source), single_file(source)
        if lora is not None:
            return sorted(parts_in(names_in(lora)) - {DENOISER})
        if whole is not None:
            return encoders_in(names_in(whole))
    except CheckpointError:
        return []
    return sorted(path.name for path in Path(source).glob("text_encoder*") if path.is_dir())


def read_text_encoder(source: str, name: str, like: nn.Module) -> dict[str, Tensor]:
    """Weights of a text encoder that comes with the denoiser, under the names of ``like``'s parameters.

    Those of a LoRA want ``make_room`` first.

    Raises:
        CheckpointError: unreadable, or of another size or rank than ``like``.
    """
    family: Any = type(like)
    lora, whole = lora_file(source), single_file(source)
    if lora is not None:
        weights = lora_weights(lora, name, like)
    elif whole is not None:
        weights = single_file_encoder(whole, name, like)
    else:
        with reading(source), quietly():
            encoder = aligned(family.from_pretrained(Path(source) / name).float())
        inside = {own.replace(".base_layer.", "."): own for own, _ in like.named_parameters() if ".base_layer." in own}
        weights = {inside.get(own, own): p for own, p in encoder.named_parameters()}
        layers = {own: p for own, p in like.named_parameters() if ".lora_" in own}  # of another checkpoint: off
        weights |= {own: torch.zeros_like(p) if ".lora_B." in own else p for own, p in layers.items()}
    check_fit(weights, like, f"{source}: {name}", partly=lora is not None)
    return weights


def make_room(model: nn.Module, source: str, part: str) -> None:
    """Add the layers that the LoRA of ``source`` needs to one part of its base, in place, where it has none yet.

    Args:
        part: ``memwatch.scan.lora_keys.DENOISER``, or the name of a text encoder.

    Raises:
        CheckpointError: unreadable, or of another base than ``model``.
    """
    file = lora_file(source)
    if file is not None and not any(".lora_" in name for name, _ in model.named_parameters()):
        add_lora(model, lora_weights(file, part, model), source)


def copy_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrite parameters in place."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        parameters[name].data.copy_(tensor)


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" and not path.is_dir()  # one that is not there is told so by whoever reads it


def _bare_tensors(source: str) -> Path | None:
    """Safetensors that no ``config.json`` describes, and that are neither a LoRA nor a single file."""
    path = Path(source)
    if _is_safetensors(path):
        return path if lora_file(source) is None and single_file(source) is None else None
    described = path / "config.json", *(path / part for part in PARTS)
    file = path / "model.safetensors"
    return file if file.is_file() and not any(item.exists() for item in described) else None


def _part(source: str) -> str | None:
    """The pipeline's part that denoises; ``None`` for a folder of one model.

    Raises:
        CheckpointError: there is none.
    """
    from diffusers import DiffusionPipeline

    path = Path(source)
    if (path / "config.json").is_file():
        return None
    if is_pipeline(source):
        with reading(source):
            names = list(DiffusionPipeline.load_config(source))
    else:
        names = [item.name for item in path.iterdir()] if path.is_dir() else []
    part = next((part for part in PARTS if part in names), None)
    if part is None:
        wanted = f"no {' or '.join(PARTS)} inside, no config.json, no {LORA_FILE} and no model.safetensors"
        raise CheckpointError(
            f"{source}: {wanted if path.is_dir() else 'no safetensors file and no folder of a model'}"
        )
    return part


def _class_of(pretrained: str, part: str | None) -> type[Any]:
    """The class of a base's denoiser."""
    import diffusers

    with reading(pretrained):
        config = diffusers.UNet2DConditionModel.load_config(pretrained, subfolder=part)  # of any model
        kind: type[Any] = getattr(diffusers, config["_class_name"])
    return kind


def _from_diffusers(source: str) -> nn.Module:
    from diffusers import AutoModel

    with reading(source), quietly():
        model: nn.Module = AutoModel.from_pretrained(source, subfolder=_part(source))
    return aligned(model.float()).eval()
