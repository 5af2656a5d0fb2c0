"""Finished weights on disk or hub: which model they are, and their tensors by parameter name.

Every function with a ``source`` raises a ``CheckpointError`` where it cannot be read, or does not fit the model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from memwatch.act.last_clean import LORA_FILE
from memwatch.denoiser import aligned
from memwatch.denoiser.components import variant_of
from memwatch.denoiser.log_filter import is_new, quietly
from memwatch.scan.lora import DENOISER, PEFT_FILE, add_lora, is_lora, lora_weights, names_by_part
from memwatch.scan.single_file import ENCODERS, NETWORK, single_file_part
from memwatch.scan.weight_files import INDEX, CheckpointError, is_weights, names_in, reading, tensors_in

logger = logging.getLogger("memwatch")

PARTS = ("unet", "transformer")
LORA_FILES = (
    LORA_FILE,
    PEFT_FILE,
    LORA_FILE.replace(".safetensors", ".bin"),
    PEFT_FILE.replace(".safetensors", ".bin"),
)
SHARDED = ("pytorch_model_fsdp*", "*.distcp", "zero_to_fp32.py", "pytorch_model/mp_rank_*", "mp_rank_*")
STATES = re.compile(r"optimizer|scheduler|scaler|sampler|random_states|training_args")  # of training, no models
TEXT = re.compile(r"(text_model\.|embeddings\.token_embedding|encoder\.block\.|shared\.)")  # CLIP and T5


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
        if lora := next((path / name for name in LORA_FILES if (path / name).is_file()), None):
            return Form.LORA, lora
        described = any((path / name).exists() for name in ("config.json", *PARTS))
        if described or not (files := model_files(path)):
            if not described and (sharded := next((n for n in SHARDED if any(path.glob(n))), None)):
                how = "merge it first (accelerate merge-weights, or the folder's own zero_to_fp32.py)"
                raise CheckpointError(f"{source}: holds a checkpoint that is spread over processes ({sharded}); {how}")
            return Form.DIFFUSERS, path
        return (Form.LORA if is_lora(names_in(files[0])) else Form.TENSORS), files[0]
    if not path.is_file() or not is_weights(path):
        return Form.DIFFUSERS, path
    names = names_in(path)
    if is_lora(names):
        return Form.LORA, path
    if path.stem.startswith("learned_embeds") or {*names} <= {"emb_params", "clip_l", "clip_g", "t5xxl"}:
        how = "in training, memwatch watches it by MemWatch(text_encoder=..., tokenizer=...)"
        raise CheckpointError(
            f"{source}: holds embeddings of new words, and no weights that a scan could compare; {how}"
        )
    return (Form.SINGLE_FILE if any(map(NETWORK.match, names)) else Form.TENSORS), path


def model_files(folder: Path) -> list[Path]:
    """What accelerate has saved of every model that was prepared, in their order; an index stands for its shards."""
    found = []
    for stem in ("model", "pytorch_model"):
        for suffix in (".safetensors", ".bin"):
            files = [folder / f"{stem}{suffix}", folder / f"{stem}{suffix}{INDEX}", *folder.glob(f"{stem}_*{suffix}")]
            found += sorted((file for file in files if file.is_file()), key=lambda file: (len(file.name), file.name))
    return found


def part_file(source: str, like: nn.Module) -> Path:
    """Of the files of a folder that accelerate has saved the one that holds this part; of one file the file."""
    known = {*like.state_dict()}
    return max(model_files(Path(source)) or [form_of(source)[1]], key=lambda file: len(known & {*names_in(file)}))


def not_read(source: str, *read: str) -> list[str]:
    """The files and folders of weights in a checkpoint's folder beside those that are read, by name."""
    path = Path(source)
    if not path.is_dir() or is_pipeline(source):
        return []
    found = (file.relative_to(path).parts[0] for file in path.rglob("*") if is_weights(file))
    return sorted({name for name in found if not STATES.match(name)} - {*read, *text_encoders(source)})


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
        if form is Form.TENSORS:
            ours = [file for file in model_files(Path(source)) if any(map(TEXT.match, names_in(file)))]
            return ["text_encoder", "text_encoder_2", "text_encoder_3"][: len(ours)]
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
    elif form is Form.TENSORS:
        weights = _bare_tensors(source, part, like)
    else:
        whole = single_file_part(file, part, like) if form is Form.SINGLE_FILE else _from_diffusers(source, part, like)
        if type(whole) is not type(like):
            raise CheckpointError(f"{source}: holds a {type(whole).__name__}, expected a {kind} as the model is")
        weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    _check_fit(weights, like, source if part == DENOISER else f"{source}: {part}", partly=form is Form.LORA)
    if is_new("memwatch", f"{source} {part} matched"):
        used = part_file(source, like) if form is Form.TENSORS else file
        others = not_read(source, used.name, *PARTS)
        beside = f"; not read: {', '.join(others)}" if others else ""
        logger.info("%s: all of its %d tensors for the %s are the model's%s", source, len(weights), kind, beside)
    return weights


def _bare_tensors(source: str, part: str, like: nn.Module) -> dict[str, Tensor]:
    """Parameters by name; a buffer may lie beside them, and nothing else."""
    file = part_file(source, like)
    tensors, known = tensors_in(file, lambda name: True), {*like.state_dict()}
    strange = sorted(tensors.keys() - known)
    if strange:
        kind, here = type(like).__name__, f"{source}" if file == Path(source) else f"{file}"
        if len(strange) == len(tensors):
            raise CheckpointError(f"{here}: none of its {len(tensors)} tensors is a parameter of the {kind}")
        why = f"{len(tensors) - len(strange)} of its {len(tensors)} tensors are the {kind}'s, {len(strange)} are not"
        raise CheckpointError(f"{here}: {why}, {', '.join(strange[:3])} first")
    parameters = dict(like.named_parameters())
    return {name: tensor.float() for name, tensor in tensors.items() if name in parameters}


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


def are_equal(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights that the model has already, to the bit."""
    parameters = dict(model.named_parameters())
    return all(
        torch.equal(parameters[name].cpu(), tensor.cpu().to(parameters[name])) for name, tensor in weights.items()
    )


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
    """A part of a pipeline or folder; a text encoder is read as ``like`` is. Every tensor must have its place."""
    import diffusers

    with reading(source), quietly():
        if part == DENOISER:
            inside = _denoiser_in(source)
            named = diffusers.AutoModel.load_config(source, subfolder=inside).get("_class_name", "nothing")
            if not hasattr(diffusers, named):
                raise CheckpointError(f"{source}: its config.json describes {named}, and no model of diffusers")
            loader, options = getattr(diffusers, named), {"subfolder": inside}
            folder, where = Path(source, inside or ""), source
        else:
            loader, options, folder, where = type(like), {}, Path(source, part), str(Path(source, part))
        for file in folder.glob("*.safetensors"):  # diffusers would take them for plain numbers
            with safe_open(file, "pt") as opened:
                if whole_numbers := [n for n in [*opened.keys()] if opened.get_slice(n).get_dtype() in ("I8", "U8")]:
                    raise CheckpointError(f"{file}: its weights are quantized ({whole_numbers[0]})")
        variant = variant_of(folder)
        model, info = loader.from_pretrained(where, variant=variant, output_loading_info=True, **options)
    missing, strange = ([*info.get(f"{kind}_keys", ())] for kind in ("missing", "unexpected"))
    if missing or strange:
        has = len(model.state_dict())
        why = (
            f"{has - len(missing)} of the {has} tensors of the {type(model).__name__} are there, {len(strange)} others"
        )
        raise CheckpointError(f"{source}: {why} as well ({', '.join([*missing, *strange][:3])} first)")
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
