"""What a follower meets: a trainer that saves while it waits, on a clock that stands still otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from support import trainers as by
from support.builders import SMALL, picture
from support.processes import new_process

from memwatch import Probe, load_config
from memwatch.scan.follow import Follow
from memwatch.scan.scan import Scan
from memwatch.scan.trainer_folder import Checkpoint

QUICK = SMALL | {"strict": False, "proof": {"enabled": False}}


class Script:
    """Time that passes by waiting alone; at each wait the next thing happens."""

    def __init__(self, *happens: Callable[[], object]) -> None:
        self.happens, self.now, self.naps = list(happens), 0.0, 0

    def sleep(self, seconds: float) -> None:
        self.now, self.naps = self.now + seconds, self.naps + 1
        if self.happens:
            self.happens.pop(0)()

    def monotonic(self) -> float:
        return self.now


def nothing() -> None:
    """A wait in which nothing happens."""


def interrupt() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


def save_loras(pretrained: Path, folder: Path, steps: tuple[int, ...] = (2, 4, 6)) -> dict[int, Path]:
    """Random LoRAs by step, as kohya names them."""
    folder.mkdir(exist_ok=True)
    unet = by.with_lora(UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet"), ["to_q", "to_v"])
    files = {}
    for step in steps:
        by.fill(unet, seed=step)
        files[step] = folder / f"run-step{step:08d}.safetensors"
        save_file(by.kohya(by.factors_of(unet), "lora_unet_"), files[step], {"ss_steps": str(step)})
    return files


def probes() -> list[Probe]:
    return [Probe("a photo of a cat", picture(0), name="cat"), Probe("a photo of a dog", picture(1), name="dog")]


def following(
    folder: Path,
    pretrained: Path,
    output: Path,
    script: Script,
    *,
    config: dict[str, Any] = QUICK,
    keep_going: bool = False,
    idle: float | None = 5.0,
    **given: Any,
) -> Follow:
    """A follower as the command makes it, in a process of its own; it has not begun."""
    new_process()
    settings = load_config(config, output_dir=str(output))
    given = {"probes": probes()} | given
    accelerator = Accelerator(cpu=True)

    def open_scan(first: Checkpoint) -> Scan:
        return Scan(accelerator, [first], str(pretrained), config=settings, **given)

    base, waits = Checkpoint.of(0, pretrained), {"poll": 1.0, "idle": idle, "clock": script}
    return Follow(accelerator, folder, open_scan, base=base, keep_going=keep_going, **waits)


def steps_in(output: Path) -> list[int]:
    """Of the events in a history."""
    return [row["step"] for row in rows_in(output)]


def rows_in(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "history.jsonl").read_text(encoding="utf-8").splitlines()]
