"""Finished weights on disk or hub: which model they are, and their tensors by parameter name.

Every function with a ``source`` raises a ``CheckpointError`` where it cannot be read, or does not fit the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memwatch.act.last_clean import LORA_FILE
from memwatch.denoiser import aligned
from memwatch.denoiser.log_filter import quietly
from memwatch.scan.lora import DENOISER, PEFT_FILE, add_lora, is_lora, lora_weights, names_by_part
from memwatch.scan.safetensors_files import (
    ENCODERS,
    NETWORK,
    CheckpointError,
    names_in,
    reading,
    single_file_part,
    tensors_in,
)

PARTS = ("unet", "transformer")


class Form(Enum):
    """What a source holds. All but the first belong to a base, which describes the model."""

    DIFFUSERS = auto()  # a pipeline (folder or hub id), a folder with unet/ or transformer/ inside, or one model's
    LORA = auto()  # of every trainer: a file, or a folder of diffusers or PEFT
    SINGLE_FILE = auto()  # a full checkpoint in one file
    TENSORS = auto()  # named as the model's own parameters: model.safetensors of accelerate


def form_of(source: str) -> tuple[Form, Path]:
    """The form of a source, and the file to read; for ``DIFFUSERS`` the source itself."""
    path = Path(source)
    if path.is_dir():
        lora = next((path / name for name in (LORA_FILE, PEFT_FILE) if (path / name).is_file()), None)
        if lora is not None:
            return Form.LORA, lora
        described = any((path / name).exists() for name in ("config.json", *PARTS))
        file = path / "model.safetensors"
        return (Form.TENSORS, file) if file.is_file() and not described else (Form.DIFFUSERS, path)
    if path.suffix != ".safetensors":
        return Form.DIFFUSERS, path
    names = names_in(path)
    if is_lora(names):
        return Form.LORA, path
    return (Form.SINGLE_FILE if any(map(NETWORK.match, names)) else Form.TENSORS), path


def is_pipeline(source: str) -> bool:
    """Whether text encoder, VAE and scheduler come with it: a pipeline's folder, or a hub id (no local path)."""
    return not Path(source).exists() or (Path(source) / "model_index.json").is_file()


def text_encoders(source: str) -> list[str]:
    """Names of the text encoders that come with the denoiser: in folders beside it, in its file, or as a LoRA.

    None of a file that cannot be read: reading its weights reports that.
    """
    try:
        form, file = form_of(source)
        if form is Form.LORA:
            return sorted(names_by_part(names_in(file)).keys() - {DENOISER})
        if form is Form.SINGLE_FILE:
            return sorted({part for name in names_in(file) for p, part in ENCODERS.items() if name.startswith(p)})
    except CheckpointError:
        return []
    return sorted(path.name for path in Path(source).glob("text_encoder*") if path.is_dir())


def load_model(source: str, pretrained: Any = None) -> nn.Module:
    """The denoiser that ``source`` holds, float32, in eval mode, on the CPU.

    Args:
        pretrained: the base: the pipeline whose denoiser a LoRA, a single file or bare tensors belong to.
    """
    if form_of(source)[0] is Form.DIFFUSERS:
        return _from_diffusers(source)
    if pretrained is None:
        why = "the file does not describe its model; pass the model's pipeline as --pretrained"
        raise CheckpointError(f"{source}: {why}")
    model = _from_diffusers(str(pretrained))
    make_room(model, source)
    copy_into(model, read_weights(source, model))
    return model.eval()


def read_weights(source: str, like: nn.Module, part: str = DENOISER) -> dict[str, Tensor]:
    """Tensors of one part of ``source`` under the names of ``like``'s parameters: all of them, or those of a LoRA.

    Args:
        part: ``DENOISER``, or the name of a text encoder; its LoRA needs ``make_room`` first.
    """
    form, file = form_of(source)
    kind = type(like).__name__
    if form is Form.LORA:
        weights = lora_weights(file, part, like)
    elif form is Form.TENSORS and part == DENOISER:
        weights = tensors_in(file, dict(like.named_parameters()).__contains__)
        if not weights:
            raise CheckpointError(f"{source}: none of its tensors is a parameter of the {kind}")
    else:
        whole = single_file_part(file, part, like) if form is Form.SINGLE_FILE else _from_diffusers(source, part, like)
        if type(whole) is not type(like):
            raise CheckpointError(f"{source}: holds a {type(whole).__name__}, expected a {kind} as the model is")
        weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    _check_fit(weights, like, source if part == DENOISER else f"{source}: {part}", partly=form is Form.LORA)
    return weights


def make_room(model: nn.Module, source: str, part: str = DENOISER) -> None:
    """Add the layers that the LoRA of ``source`` needs to one part of its base, in place; other forms need none."""
    form, file = form_of(source)
    if form is Form.LORA and not any(".lora_" in name for name, _ in model.named_parameters()):
        add_lora(model, lora_weights(file, part, model), source)


def copy_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrite parameters in place."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        parameters[name].data.copy_(tensor)


def _check_fit(weights: Mapping[str, Tensor], model: nn.Module, source: str, *, partly: bool) -> None:
    """Every weight has its parameter of the same shape; unless ``partly``, every parameter has its weight as well."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, tensor in weights.items():
        if shapes.get(name) != tuple(tensor.shape):
            has = shapes.get(name, "no such parameter")
            raise CheckpointError(f"{source}: {name} has shape {tuple(tensor.shape)}, the model {has}")
    missing = [name for name in shapes if name not in weights and (not partly or ".lora_" in name)]
    if missing:
        raise CheckpointError(f"{source}: {len(missing)} of the model's parameters are missing, {missing[0]} first")


def _from_diffusers(source: str, part: str = DENOISER, like: Any = None) -> nn.Module:
    """A part of a pipeline or folder; a text encoder is read as ``like`` is."""
    from diffusers import AutoModel

    with reading(source), quietly():
        if part == DENOISER:
            model: Any = AutoModel.from_pretrained(source, subfolder=_denoiser_in(source))
        else:
            model = type(like).from_pretrained(Path(source) / part)
    whole: nn.Module = aligned(model.float()).eval()
    return whole


def _denoiser_in(source: str) -> str | None:
    """The pipeline's part that denoises; ``None`` for a folder of one model."""
    from diffusers import DiffusionPipeline

    path = Path(source)
    if (path / "config.json").is_file():
        return None
    names = [item.name for item in path.iterdir()] if path.is_dir() else []
    if is_pipeline(source):
        with reading(source):
            names = list(DiffusionPipeline.load_config(source))
    part = next((part for part in PARTS if part in names), None)
    if part is None:
        why = f"no {' or '.join(PARTS)} inside, no config.json, no {LORA_FILE} and no model.safetensors"
        raise CheckpointError(f"{source}: {why if path.is_dir() else 'no safetensors file and no folder of a model'}")
    return part
