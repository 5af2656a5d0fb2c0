"""One seeded, resumable fine-tune of a base on a planted set, looked at along the way."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from evidence.runs import event
from evidence.runs.protocol import DRAWS, Bench, event_file
from evidence.runs.trainer import Trainer
from evidence.worlds.bases import read_base
from evidence.worlds.items import PLANTED, Item, Kind, batch, looked_at
from evidence.worlds.world import WORLDS, Plan
from torch import Tensor, nn
from tqdm import tqdm

from memwatch.config import LevelsConfig
from memwatch.measure.lora_off import lora_off
from memwatch.measure.weights import trainable, write_safetensors

GENERATE_FROM = 0.2  # share of the steps from which items are generated
COMPARE_EVERY = 4  # events between two at which the twins are compared: what chance shows hardly changes
CURVATURE_EVERY = 10  # the same of curvature, where a plan asks for it: it costs ten times as much


@dataclass(frozen=True)
class Run:
    """One training: a world (see ``world.WORLDS``), a seed, and which of the twins it is."""

    seed: int
    world: str
    half: str = "a"

    @property
    def name(self) -> str:
        return f"{self.world}-{self.seed}{self.half}"


def add_lora(unet: nn.Module, rank: int, seed: int) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    adapter: Any = unet
    adapter.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def commit() -> str:
    """The commit of memwatch that is running, ``+`` where files differ from it; its version outside of a clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[3])]
    ours = ("status", "--porcelain", "--", "memwatch", "train_examples/evidence")
    try:
        name, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short=10", "HEAD"), ours)
        )
    except (OSError, subprocess.CalledProcessError):
        return version("memwatch")
    return name + "+" * bool(changed)


@dataclass
class Training:
    """What a run holds while it trains."""

    run: Run
    plan: Plan
    home: Path
    items: list[Item]
    trainer: Trainer
    bench: Bench
    start: Mapping[str, Tensor]

    @classmethod
    def of(cls, run: Run, tiny_sd: Path, folder: Path, plan: Plan | None = None) -> Training:
        """From its last checkpoint, or from the beginning."""
        world = WORLDS[run.world]
        plan, home = plan or world.plan, folder / run.name
        home.mkdir(parents=True, exist_ok=True)
        denoiser, parts = read_base(world.base, tiny_sd, folder)
        if world.lora:
            add_lora(denoiser.model, plan.lora_rank, run.seed)
        items = world.items(run.seed)
        said = dataclasses.asdict(plan) | dataclasses.asdict(run) | {"commit": commit()}
        (home / "run.json").write_text(json.dumps(said), encoding="utf-8")
        start = lora_off(denoiser.model) or trainable(denoiser.model)
        trainer = Trainer(denoiser, parts, plan.steps, plan.learning_rate, run.seed, plan.last_rate)
        denoiser.model.train()
        if (checkpoint := home / "checkpoint.pt").is_file():
            trainer.load(checkpoint)
        bench = Bench.of(
            denoiser,
            parts,
            looked_at(items),
            run.seed,
            LevelsConfig(timesteps=plan.timesteps, draws=DRAWS),
        )
        return cls(run, plan, home, items, trainer, bench, start)

    def train_to(self, step: int) -> None:
        dropout = WORLDS[self.run.world].dropout
        run = self.run
        with tqdm(total=step, initial=self.trainer.step, desc=run.name, mininterval=5) as bar:
            while self.trainer.step < step:
                pairs = batch(self.items, run.half, run.seed, self.trainer.step, self.plan.batch_size, dropout)
                loss = self.trainer.train_on([picture for _, picture in pairs], [caption for caption, _ in pairs])
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def look(self) -> None:
        """Measure everything that the report needs at this step, and keep a checkpoint."""
        step = self.trainer.step
        started = time.perf_counter()
        self.trainer.save(self.home / "checkpoint.pt")
        self.bench.denoiser.model.eval()
        tensors = event.forward(self.bench)
        if self.plan.curvature and self.is_due(CURVATURE_EVERY):
            tensors |= event.curvature(self.bench)
        if self.compares:
            tensors |= event.truths(self.bench)
        if step == 0:
            targets = self.bench.targets
            tensors |= {f"target/{name}": torch.from_numpy(picture).half() for name, picture in targets.items()}
        if names := self.generated_now():
            made, generated = event.generations(self.bench, names)
            tensors |= made
            if self.trainer.step == self.plan.steps and WORLDS[self.run.world].prompts:
                tensors |= event.renoised(self.bench, generated, self.start)
        self.bench.denoiser.model.train()
        self.keep(event_file(self.home, step), tensors, {"step": step, "seconds": time.perf_counter() - started})

    def is_due(self, every: int) -> bool:
        """Whether this event is one of every so many, or the last."""
        return self.trainer.step // self.plan.every % every == 0 or self.trainer.step == self.plan.steps

    @property
    def compares(self) -> bool:
        """Whether the twins are compared at this event: now and then, and at last."""
        return self.is_due(COMPARE_EVERY)

    def generated_now(self) -> list[str]:
        """Whose captions are asked: planted items of this half, now and then of both, at last of what is held out."""
        step, plan = self.trainer.step, self.plan
        if step < GENERATE_FROM * plan.steps:
            return []
        kinds = (*PLANTED, Kind.HELD_OUT) if step == plan.steps else PLANTED
        planted = [item for item in self.bench.items if item.kind in kinds]
        return [item.name for item in planted if self.compares or item.half in ("", self.run.half)]

    def keep(self, file: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """The numbers last: with them an event is whole."""
        write_safetensors(file, tensors)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(numbers), encoding="utf-8")
        part.replace(file.with_suffix(".json"))


def run_one(run: Run, tiny_sd: Path, folder: Path, plan: Plan | None = None) -> None:
    """Train and look, from where it was interrupted. Writes ``folder/NAME/event_NNNNN.safetensors`` and ``.json``.

    Args:
        plan: instead of the world's own.
    """
    if (folder / run.name / "whole").is_file():
        return
    training = Training.of(run, tiny_sd, folder, plan)
    for step in training.plan.events:
        if not event_file(training.home, step).with_suffix(".json").is_file():
            training.train_to(step)
            training.look()
    (training.home / "whole").touch()
