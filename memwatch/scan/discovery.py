"""What a trainer has left in a folder: its checkpoints with their steps, and whether one is written to its end."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from memwatch.denoiser.log_filter import is_new
from memwatch.scan.reading import metadata_of

logger = logging.getLogger("memwatch")

FOLDER = re.compile(r"(checkpoint|step|epoch)[-_](\d+)")
MODEL = ("unet", "transformer", "model_index.json", "adapter_config.json")  # text_encoder_2 has none of these
NO_CHECKPOINT = re.compile(  # optimizers, states, text encoders beside the model, and files that are a folder's own
    r"optimizer|[-_.]state|(^|[-_.])(scheduler|vae|ema|clip_[lg]|t5xxl)$"
    r"|^(pytorch_lora_weights|adapter_model|model(-\d+-of-\d+)?|diffusion_pytorch_model.*)$"
)
NUMBER = (  # what trainers put into names, the surest first: kohya's steps, OneTrainer's, then any number at the end
    re.compile(r"[-_]step(\d+)$"),
    re.compile(r"-save-(\d+)(-\d+)*$"),
    re.compile(r"[-_](\d+)$"),
)
NUMBER_AT_END = re.compile(r"([-_](step)?\d+|-save-[\d-]+)$")
WEIGHTS = re.compile(r"(?!optimizer|scheduler|scaler|random_states|custom_checkpoint).*\.(safetensors|bin)")


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """``checkpoint-N`` folders with their N, smallest first."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def found_in(folder: Path) -> list[tuple[int, Path]]:
    """Every checkpoint that lies in a folder, with its step, smallest first; one per step.

    Known are ``checkpoint-N``, ``step-N`` and ``epoch-N`` folders, numbered folders with a model inside, and
    safetensors files. The step of a file is what the trainer has written into it (kohya's ``ss_steps``, ai-toolkit's
    ``training_info``), else the number in its name, which may count epochs. A file with neither is the last one, which
    comes one step after all others. A file that is being written may not say its step yet: ask ``is_complete`` first.
    """
    steps: dict[int, Path] = {}
    last: list[Path] = []
    for path in sorted(folder.iterdir()):
        if not _is_checkpoint(path):
            continue
        step = _step_of(path)
        if step is None:
            last.append(path)
        elif step not in steps:
            steps[step] = path
        else:
            steps[step] = _one_of(steps[step], path, step)
    for path in last:
        steps[max(steps, default=-1) + 1] = path
    return sorted(steps.items())


def is_complete(path: Path) -> bool:
    """Whether a checkpoint is written to its end; ``False`` as well for one that is gone."""
    try:
        if path.is_file():
            return _is_whole(path)
        files = [file for file in path.rglob("*") if WEIGHTS.fullmatch(file.name) and file.is_file()]
        described = {config.parent for config in path.rglob("config.json")} & _with_weights(path)
        return bool(files) and all(map(_is_whole, files)) and described <= {file.parent for file in files}
    except OSError:  # it went while it was looked at
        return False


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        has_model = any((path / name).exists() for name in MODEL)
        return FOLDER.fullmatch(path.name) is not None or (has_model and _number(path.name) is not None)
    return path.suffix == ".safetensors" and not NO_CHECKPOINT.search(path.stem)


def _step_of(path: Path) -> int | None:
    """The step as the file itself says, or as its name does."""
    if match := FOLDER.fullmatch(path.name):
        return int(match[2])
    if path.is_dir():
        return _number(path.name)
    said = metadata_of(path)
    if said.get("ss_steps", "").isdecimal():
        return int(said["ss_steps"])
    try:
        return int(json.loads(said["training_info"])["step"])
    except (KeyError, TypeError, ValueError):
        return _number(path.stem)


def _number(name: str) -> int | None:
    match = next((match for pattern in NUMBER if (match := pattern.search(name))), None)
    return int(match[1]) if match else None


def _one_of(first: Path, second: Path, step: int) -> Path:
    """Of two checkpoints of a step the numbered one, where one is a run's last file; of two runs the first, said."""
    runs = [NUMBER_AT_END.sub("", path.stem) for path in (first, second)]
    if runs[0] != runs[1] and is_new("memwatch", f"{first} {second}"):
        why = "Does the folder hold two runs?"
        logger.warning("memwatch: %s is left out: %s is of step %d as well. %s", second.name, first, step, why)
    return second if runs[0] == runs[1] and _number(first.stem) is None else first


def _with_weights(path: Path) -> set[Path]:
    """Folders whose ``config.json`` describes weights: not that of a scheduler or a tokenizer."""
    return {path, *(item for item in path.iterdir() if re.match("unet|transformer|text_encoder|vae", item.name))}


def _is_whole(file: Path) -> bool:
    """By the sizes that its header says (safetensors), by its end (torch: a zip file), or not empty."""
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        return size > 0 and (zipfile.is_zipfile(file) or not _begins_as_zip(file))
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 + length:
            return False
        try:
            header = json.loads(opened.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def _begins_as_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"
