"""The folder of a trainer: its checkpoints with their steps, and which comes next."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from memwatch.denoiser.log_filter import is_new
from memwatch.measure.measurement import digest
from memwatch.scan.weight_files import is_weights, metadata_of

logger = logging.getLogger("memwatch")

FOLDER = re.compile(r"(checkpoint|step|epoch)[-_](\d+)")
MODEL = ("unet", "transformer", "model_index.json", "adapter_config.json")  # text_encoder_2 has none of these
NO_CHECKPOINT = re.compile(  # optimizers, states, text encoders beside the model, and files that are a folder's own
    r"optimizer|[-_.]state|(^|[-_.])(scheduler|vae|ema|clip_[lg]|t5xxl)$"
    r"|^(pytorch_lora_weights|adapter_model|model(_\d+|-\d+-of-\d+)?|diffusion_pytorch_model.*)$"
)
NUMBER = (  # what trainers put into names, the surest first: kohya's steps, OneTrainer's, then any number at the end
    re.compile(r"[-_]step(\d+)$"),
    re.compile(r"-save-(\d+)(-\d+)*$"),
    re.compile(r"[-_](\d+)$"),
)
NUMBER_AT_END = re.compile(r"([-_](step)?\d+|-save-[\d-]+)$")


def stamp(source: str) -> str:
    """A digest of names, sizes and times of a local source's weight files; another stamp means other weights."""
    path = Path(source)
    files = sorted(filter(is_weights, path.rglob("*"))) if path.is_dir() else [path] if path.is_file() else []
    return digest([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step.

    Attributes:
        step: optimizer step, or epoch where the trainer's names count those.
        source: anything that ``memwatch.scan.checkpoints`` knows.
        stamp: of its files as they were found.
    """

    step: int
    source: str
    stamp: str

    @classmethod
    def of(cls, step: int, source: object) -> Self:
        """The checkpoint as it is there now."""
        return cls(step, str(source), stamp(str(source)))

    @property
    def is_there(self) -> bool:
        """Whether its files are still those that were found."""
        return stamp(self.source) == self.stamp

    @property
    def keys(self) -> set[object]:
        """What identifies it: its files, and its step and place.

        A last file without a number moves to another step while the run goes on; a file that a trainer overwrites has
        another step each time.
        """
        return {(self.source, self.stamp), (self.step, self.source)}


# --- what is in the folder --------------------------------------------------------------------------------------------


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """Every checkpoint in a folder, smallest step first; one per step.

    Known are ``checkpoint-N``, ``step-N`` and ``epoch-N`` folders, numbered folders with a model inside, and files of
    safetensors and ckpt. The step of a file is what the trainer has written into it (kohya's ``ss_steps``, ai-toolkit's
    ``training_info``), else the number in its name, which may count epochs. A file with neither is the last one, which
    comes one step after all others.
    """
    steps: dict[int, Path] = {}
    last: list[Path] = []
    for path in filter(_is_checkpoint, sorted(folder.iterdir())):
        step = _step_of(path)
        if step is None:
            last.append(path)
        else:
            steps[step] = _one_of(steps[step], path, step) if step in steps else path
    for path in last:
        steps[max(steps, default=-1) + 1] = path
    return [Checkpoint.of(step, path) for step, path in sorted(steps.items())]


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        has_model = any((path / name).exists() for name in MODEL)
        return FOLDER.fullmatch(path.name) is not None or (has_model and _number(path.name) is not None)
    return path.suffix in (".safetensors", ".ckpt") and not NO_CHECKPOINT.search(path.stem)


def _step_of(path: Path) -> int | None:
    """The step from the file itself, or from its name."""
    if path.is_dir():
        match = FOLDER.fullmatch(path.name)
        return int(match[2]) if match else _number(path.name)
    metadata = metadata_of(path)
    if metadata.get("ss_steps", "").isdecimal():
        return int(metadata["ss_steps"])
    try:
        return int(json.loads(metadata["training_info"])["step"])
    except (KeyError, TypeError, ValueError):
        return _number(path.stem)


def _number(name: str) -> int | None:
    match = next((match for pattern in NUMBER if (match := pattern.search(name))), None)
    return int(match[1]) if match else None


def _one_of(first: Path, second: Path, step: int) -> Path:
    """Of two checkpoints of a step: the numbered one, where the other is the run's last file; of two runs the first."""
    runs = [NUMBER_AT_END.sub("", path.stem) for path in (first, second)]
    if runs[0] != runs[1] and is_new("memwatch", f"{first} {second}"):
        why = "does the folder hold two runs?"
        logger.warning("%s is left out: %s also has step %d; %s", second.name, first, step, why)
    return second if runs[0] == runs[1] and _number(first.stem) is None else first


# --- which comes next -------------------------------------------------------------------------------------------------


class Arrivals:
    """Finds new checkpoints by comparing polls.

    Attributes:
        last_step: the greatest step that was scanned; ``None`` before the first.
    """

    def __init__(self) -> None:
        self._done: set[object] = set()
        self._waiting: list[Checkpoint] = []
        self.last_step: int | None = None

    def poll(self, found: Sequence[Checkpoint]) -> tuple[Checkpoint | None, list[tuple[Checkpoint, str]]]:
        """Compare every checkpoint in the folder, smallest step first, with the poll before.

        Returns:
            The new one of the smallest step, if its files have not changed since the poll before; and new ones that
            cannot be scanned any more, with the reason.
        """
        before = self._waiting
        new = [c for c in found if not self._is_done(c)]
        late = [c for c in new if self.last_step is not None and c.step <= self.last_step]
        self._waiting = [c for c in new if c not in late]
        there = set[object]().union(*(c.keys for c in found))
        gone = [c for c in before if not self._is_done(c) and c.keys.isdisjoint(there)]
        self._done.update(*(c.keys for c in (*late, *gone)))
        skipped = [(c, "was deleted before memwatch could read it") for c in gone]
        skipped += [(c, f"appeared after step {self.last_step} was scanned") for c in late]
        return next((c for c in self._waiting[:1] if c in before), None), skipped

    def done(self, checkpoint: Checkpoint) -> None:
        """It was scanned; only greater steps are new from now on."""
        self._done |= checkpoint.keys
        self.last_step = checkpoint.step if self.last_step is None else max(self.last_step, checkpoint.step)

    def give_up(self, checkpoint: Checkpoint) -> None:
        """Pass it over until its files change."""
        self._done.add((checkpoint.source, checkpoint.stamp))

    def _is_done(self, checkpoint: Checkpoint) -> bool:
        return not checkpoint.keys.isdisjoint(self._done)
