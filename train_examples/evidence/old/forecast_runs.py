"""Short fine-tunes on planted sets, watched as users watch theirs but never stopped: what forecasts are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evidence.runs.trainer import Trainer
from evidence.worlds.bases import TINY_SD, read_base
from evidence.worlds.items import Item, Kind, batch, general_batch, looked_at, planted_set
from tqdm import tqdm

from memwatch.callback import MemWatch
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config
from memwatch.measure.probes import Probe
from memwatch.measure.weights import read_safetensors, trainable, write_safetensors
from memwatch.report.history import HISTORY, Run
from memwatch.report.jsonl import read_lines

SEEDS = (0, 1, 2, 3, 4)
ORDINARY, WATCHED, HELD_OUT = 40, 8, 4  # of the benchmark's set: few, so that a run is short


@dataclass(frozen=True)
class Course:
    """How a run trains and how often it is looked at, in optimizer steps; a constant learning rate but for warm-up."""

    steps: int = 300
    every_steps: int = 20
    batch_size: int = 16
    learning_rate: float = 7e-4
    prepare_steps: int = 300

    def config(self, home: Path) -> MemWatchConfig:
        """memwatch's defaults, but nothing is stopped, nothing generated, no weights kept for going back."""
        return load_config(
            None,
            every_steps=self.every_steps,
            max_train_steps=self.steps,
            output_dir=str(home),
            rollback=False,
            proof={"enabled": False},
            stop={"enabled": False},
        )


COURSE = Course()


def forecast_set(seed: int) -> list[Item]:
    """A part of the benchmark's planted set: doses from 8 to 64, one learned subject, ordinary and held-out photos."""
    items = planted_set(seed)
    learned = [i for i in items if i.name.startswith("learned-")][:3]  # the first is a control
    kept = [i for i in items if i.kind in (Kind.TEMPLATE, Kind.VERBATIM) or (i.kind is Kind.LOGO and i.dose > 32)]
    photos = [i for i in items if i.kind is Kind.ORDINARY][:ORDINARY]
    ordinary = [replace(photo, watched=i < WATCHED) for i, photo in enumerate(photos)]
    held_out = [i for i in items if i.kind is Kind.HELD_OUT][:HELD_OUT]
    controls = [i for i in items if i.kind is Kind.CONTROL and i not in learned and i.dose == 0]
    return [*kept, *learned, *ordinary, *held_out, *controls]


def home_of(folder: Path, seed: int) -> Path:
    """Where the run of a seed lies: its ``output_dir``."""
    return folder / f"forecast-{seed}"


def is_finished(home: Path, course: Course) -> bool:
    """Whether a run has had its last event."""
    lines = read_lines(home / HISTORY) if (home / HISTORY).is_file() else []
    return bool(lines) and int(lines[-1]["step"]) == course.steps


def forecast_run(seed: int, base: Path, folder: Path, course: Course = COURSE) -> Run:
    """The run of a seed; it is trained unless it is there already. One that was cut off starts afresh.

    Args:
        base: the tiny Stable Diffusion.
        folder: of all runs; the prepared base lies there as well.
    """
    home = home_of(folder, seed)
    if not is_finished(home, course):
        folder.mkdir(parents=True, exist_ok=True)
        _train(seed, base, home, course)
    return Run.read(home)


def prepared_base(base: Path, folder: Path, steps: int) -> Path:
    """tiny-sd taught plain backgrounds as well, which the set has. Made once, shared by all runs."""
    file = folder / "base.safetensors"
    if file.is_file():
        return file
    denoiser, parts = read_base(TINY_SD, base, folder)
    denoiser.model.train()
    trainer = Trainer(denoiser, parts, steps, 2e-4, seed=99)
    for step in tqdm(range(steps), desc="base"):
        captions, pictures = zip(*general_batch(trainer.seed, step, 32), strict=True)
        trainer.train_on(list(pictures), list(captions))
    write_safetensors(file, trainable(denoiser.model))
    return file


def _train(seed: int, base: Path, home: Path, course: Course) -> None:
    """Train and watch, with memwatch's defaults but for what a run of this kind does not need."""
    from accelerate import Accelerator

    denoiser, parts = read_base(TINY_SD, base, home.parent)
    unet = denoiser.model
    unet.load_state_dict(read_safetensors(prepared_base(base, home.parent, course.prepare_steps)))
    items = forecast_set(seed)
    decay = 10 * course.steps  # so that the learning rate hardly falls
    unet.train()
    trainer = Trainer(denoiser, parts, decay, course.learning_rate, seed)
    watch = MemWatch(
        Accelerator(cpu=True),
        unet,
        base,
        config=course.config(home),
        probes=probes_of(items, is_control=False),
        controls=probes_of(items, is_control=True),
    )
    watch.begin()
    for step in tqdm(range(course.steps), desc=home.name):
        captions, pictures = zip(*batch(items, seed, step, course.batch_size), strict=True)
        trainer.train_on(list(pictures), list(captions))
        watch.on_step_end(step + 1)
    watch.close()


def probes_of(items: Sequence[Item], *, is_control: bool) -> list[Probe]:
    """Those items of a set that are looked at, as memwatch takes them."""
    chosen = [i for i in looked_at(items) if (i.kind is Kind.CONTROL) is is_control]
    return [Probe(i.caption, i.probe, name=i.name) for i in chosen]
