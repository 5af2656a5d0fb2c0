"""Finished weights on disk or hub: which model they are, and their tensors by parameter name.

Known forms: a diffusers pipeline (folder or hub id); a folder with ``unet/`` or ``transformer/`` inside, as diffusers'
training scripts write into ``checkpoint-N``; a folder of one model; LoRA (``pytorch_lora_weights.safetensors``, or the
file itself) on a base; and safetensors named as the model's own parameters are (``model.safetensors`` of accelerate).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from memwatch.denoiser.quiet import quietly

logger = logging.getLogger("memwatch")

PARTS = ("unet", "transformer")
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and says why."""


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """``checkpoint-N`` folders with their N, smallest first."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def is_pipeline(source: str) -> bool:
    """Whether text encoder, VAE and scheduler come with it: a pipeline's folder, or a hub id (no local path)."""
    return not Path(source).exists() or (Path(source) / "model_index.json").is_file()


def lora_file(source: str) -> Path | None:
    """The LoRA file of a source, or ``None`` when it is no LoRA."""
    path = Path(source)
    if path.is_dir():
        return path / LORA_FILE if (path / LORA_FILE).is_file() else None
    if path.suffix != ".safetensors":
        return None
    with _reading(source), safe_open(path, "pt") as file:
        return path if any("lora" in name.lower() for name in file.keys()) else None  # noqa: SIM118 (no mapping)


def load_model(source: str, pretrained: Any = None) -> nn.Module:
    """The denoiser that ``source`` holds, float32, in eval mode, on the CPU.

    Args:
        source: see above.
        pretrained: the pipeline whose denoiser a LoRA or bare tensors belong to.

    Raises:
        CheckpointError: unknown form, unreadable, or the base is missing or does not fit.
    """
    lora, tensors = lora_file(source), _bare_tensors(source)
    if lora is None and tensors is None:
        return _from_diffusers(source)
    if pretrained is None:
        raise CheckpointError(
            f"{source}: these are weights of a model that is described elsewhere; pass its pipeline as --pretrained"
        )
    model: Any = _from_diffusers(str(pretrained))
    if tensors is not None:
        copy_into(model, read_weights(source, model))
    elif lora is not None:
        with _reading(source):
            model.load_lora_adapter(
                str(lora.parent), weight_name=lora.name, prefix=_part(str(pretrained)), adapter_name=ADAPTER
            )
        read_weights(source, model)  # every one of them is in the model now, or this raises
    loaded: nn.Module = model.eval()
    return loaded


def read_weights(source: str, like: nn.Module) -> dict[str, Tensor]:
    """Tensors of ``source`` under the names of ``like``'s parameters: all of them, or those of a LoRA.

    Raises:
        CheckpointError: unreadable, or of another family or size than ``like``.
    """
    lora, tensors = lora_file(source), _bare_tensors(source)
    if lora is not None:
        weights = {_parameter_name(name): tensor for name, tensor in _lora_tensors(lora).items()}
    elif tensors is not None:
        weights = {name: tensor for name, tensor in _load(tensors).items() if name in dict(like.named_parameters())}
    else:
        model = _from_diffusers(source)
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
    """Names of the text encoders that lie beside the denoiser, as where both were trained."""
    return sorted(path.name for path in Path(source).glob("text_encoder*") if path.is_dir())


def read_text_encoder(source: str, name: str, like: nn.Module) -> dict[str, Tensor]:
    """Weights of a text encoder that lies beside the denoiser, under the names of ``like``'s parameters.

    Raises:
        CheckpointError: unreadable, or of another size than ``like``.
    """
    family: Any = type(like)
    with _reading(source), quietly():
        weights = dict(family.from_pretrained(Path(source) / name).float().named_parameters())
    check_fit(weights, like, f"{source}: {name}", partly=False)
    return weights


def copy_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrite parameters in place."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        parameters[name].data.copy_(tensor)


def _bare_tensors(source: str) -> Path | None:
    """Safetensors that no ``config.json`` describes."""
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        return path if lora_file(source) is None else None
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
        with _reading(source):
            names = list(DiffusionPipeline.load_config(source))
    else:
        names = [item.name for item in path.iterdir()] if path.is_dir() else []
    part = next((part for part in PARTS if part in names), None)
    if part is None:
        raise CheckpointError(
            f"{source}: no {' or '.join(PARTS)} inside, no config.json, no {LORA_FILE} and no model.safetensors"
        )
    return part


def _from_diffusers(source: str) -> nn.Module:
    from diffusers import AutoModel

    with _reading(source), quietly():
        model: nn.Module = AutoModel.from_pretrained(source, subfolder=_part(source))
    return model.float().eval()


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with _reading(str(file)):
        return load_file(file)


def _lora_tensors(file: Path) -> dict[str, Tensor]:
    """Of the denoiser alone, in PEFT's names without the adapter's."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    named = convert_unet_state_dict_to_peft(_load(file))
    tensors = {
        name: tensor
        for name, tensor in named.items()
        if not name.startswith("text_encoder") and not name.endswith(".alpha")
    }
    if any(name.startswith("text_encoder") for name in named):
        logger.warning("%s: its LoRA of the text encoder is left out; prompts are encoded by the base's own", file)
    return {name.removeprefix("unet.").removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def _parameter_name(name: str) -> str:
    return name.removesuffix(".weight") + f".{ADAPTER}.weight"


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Whatever a library raises while reading becomes one line that names the source."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{source}: cannot be read: {text}") from error
