"""``memwatch scan`` under test: a trained folder to scan, and the command with what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from support.builders import CONFIG, Loop, picture
from support.processes import new_process

from memwatch import Probe
from memwatch.cli import main
from memwatch.measure.observer import Observer


def train_watched(pretrained: Path, images: Path, folder: Path) -> Path:
    """A fine-tune that memwatch watched, as diffusers' scripts leave it, with a checkpoint folder at every event.

    ``checkpoint-0``, ``-2`` and ``-4`` hold a ``unet``; ``pipeline`` is the last one, whole; ``controls`` is an image.
    """
    loop = Loop(pretrained, folder, lr=1e-2)
    watch = loop.watch(pretrained, str(images), controls=[Probe("held out", picture(9), name="h")], config=CONFIG)

    def save(loop):
        if loop.step % 2 == 0:
            loop.bare.save_pretrained(folder / f"checkpoint-{loop.step}" / "unet")

    save(loop)
    watch.begin()
    loop.run(watch, 4, each=save)
    StableDiffusionPipeline.from_pretrained(pretrained, unet=loop.bare).save_pretrained(folder / "pipeline")
    controls = folder / "controls"
    controls.mkdir()
    picture(9).save(controls / "h.png")
    (controls / "h.txt").write_text("held out", encoding="utf-8")
    new_process()
    return folder


def scan_into(output: Path, *arguments: object, settings: str | None) -> tuple[int, list[str]]:
    """Run the command; its exit code, and the names of the probes in the order in which they were measured."""
    new_process()
    measured: list[str] = []
    real = Observer.measure

    def counting(self, view):
        measured.append(view.key)
        return real(self, view)

    command = ["scan", *map(str, arguments), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "measure", counting)
        code = main([*command, "--config", settings] if settings else command)
    return code, measured
