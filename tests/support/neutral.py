"""A loop with diffusers' arithmetic of epochs, steps and resumes, over every kind of dataloader, watched or not."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from support.builders import SMALL
from support.processes import new_process
from support.rows import make_rows
from torch.utils import data
from torch.utils.data import DataLoader

import memwatch

ROWS, BATCH, EPOCHS, RATE = 56, 8, 2, 1e-2
KINDS = (
    "shuffle",
    "persistent workers",
    "dispatch_batches",
    "split_batches",
    "seedable sampler",
    "own DistributedSampler",
    "batch_sampler",
    "IterableDataset",
    "weighted sampler",
)
CONFIG = SMALL | {"every_steps": 6, "rotation": {"rows": 0}, "proof": {"enabled": False}, "rollback": False}


class Rows(data.Dataset[dict[str, Any]]):
    """Rows with random flips and dropped captions, from Python's, NumPy's and torch's streams."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        latents = row["latents"].flip(-1) if random.random() < 0.5 else row["latents"]
        hidden = row["hidden"] * float(np.random.rand() > 0.2)
        return {"latents": latents + 0.01 * torch.randn(()), "hidden": hidden, "row": row["row"]}


class Stream(data.IterableDataset[dict[str, Any]]):
    """The same as a stream, in an order of its own."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in np.random.default_rng(3).permutation(len(self.rows)).tolist():
            yield self.rows[index]


def loader_of(kind: str, rows: Rows, accelerator: Accelerator) -> DataLoader[Any]:
    """A dataloader as a user makes it."""
    if kind == "own DistributedSampler":
        ranks = {"num_replicas": accelerator.num_processes, "rank": accelerator.process_index}
        return DataLoader(rows, BATCH, sampler=data.DistributedSampler(rows, **ranks, seed=5))
    if kind == "batch_sampler":
        return DataLoader(rows, batch_sampler=data.BatchSampler(data.RandomSampler(rows), BATCH, drop_last=False))
    if kind == "IterableDataset":
        return DataLoader(Stream(rows), BATCH)
    if kind == "weighted sampler":
        weights = [1.0 + i % 3 for i in range(len(rows))]
        return DataLoader(rows, BATCH, sampler=data.WeightedRandomSampler(weights, len(rows)))
    persistent = kind == "persistent workers"
    return DataLoader(rows, BATCH, shuffle=True, num_workers=int(persistent), persistent_workers=persistent)


def train(
    kind: str, picked: memwatch.Picked, pipeline: Any, folder: Path, *, watched: bool, resume: bool = False
) -> dict[str, Any]:
    """Train for ``EPOCHS`` on ``picked.train``, with ``resume`` from the checkpoint on; returns what this rank did.

    A loop that is not resumed leaves a checkpoint in the middle of the second epoch.
    """
    new_process()
    loading = DataLoaderConfiguration(
        dispatch_batches=True if kind == "dispatch_batches" else None,
        split_batches=kind == "split_batches",
        use_seedable_sampler=kind == "seedable sampler",
    )
    accelerator = Accelerator(cpu=True, dataloader_config=loading, step_scheduler_with_optimizer=True)
    set_seed(1)
    unet = UNet2DConditionModel.from_config(pipeline.unet.config).train()
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE)
    trained, ranks = Rows(picked.train), accelerator.num_processes
    loader = loader_of(kind, trained, accelerator)
    own = kind == "own DistributedSampler"
    batches = math.ceil(len(trained) / BATCH) if kind == "IterableDataset" else len(loader)
    of_each = batches if own or kind == "split_batches" else math.ceil(batches / ranks)
    max_train_steps = EPOCHS * of_each
    ticks = max_train_steps * (1 if kind == "split_batches" else ranks)  # of accelerate's schedule
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=ticks)
    unet, optimizer, scheduler = accelerator.prepare(unet, optimizer, scheduler)
    loader = loader if own else accelerator.prepare(loader)
    watch = None
    if watched:
        options = {"config": CONFIG, "output_dir": str(folder / "memwatch"), "max_train_steps": max_train_steps}
        watch = memwatch.MemWatch(accelerator, unet, pipeline, picked, scheduler=noise_scheduler, **options)
    streams = [repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().tolist()]
    first_epoch = skipped = global_step = 0
    middle = of_each + of_each // 3
    if resume:
        accelerator.load_state(str(folder / "checkpoint"))
        global_step, (first_epoch, skipped) = middle, divmod(middle, of_each)
    guard = watch.guard if watch is not None else lambda loader: loader
    whole, rows, rates = guard(loader), [], []
    for epoch in range(first_epoch, EPOCHS):
        active = guard(skip_first_batches(loader, skipped)) if epoch == first_epoch and skipped else whole
        assert kind == "IterableDataset" or epoch == first_epoch or len(active) == len(loader)
        if own:
            loader.sampler.set_epoch(epoch)
        for batch in active:
            rows.append([int(row) for row in batch["row"]])
            noise, timesteps = torch.randn_like(batch["latents"]), torch.randint(0, 1000, (len(batch["row"]),))
            noisy = noise_scheduler.add_noise(batch["latents"], noise, timesteps)
            loss = torch.nn.functional.mse_loss(unet(noisy, timesteps, batch["hidden"]).sample, noise)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            global_step += 1
            rates.append(scheduler.get_last_lr()[0])
            if watch is not None:
                watch.on_step_end(global_step)
            if global_step == middle and not resume:
                accelerator.save_state(str(folder / "checkpoint"))
            if global_step >= max_train_steps:
                break
    if watch is not None:
        watch.close()  # and not end_training: the next loop trains in the same group of processes
    accelerator.wait_for_everyone()
    named = accelerator.unwrap_model(unet).named_parameters()
    weights = {name: p.detach().double().flatten().tolist() for name, p in named}
    return {"rows": rows, "rates": rates, "steps": global_step, "streams": streams, "weights": weights}


def all_four(kind: str, picked: memwatch.Picked, pipeline: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Watched and not, fresh and resumed in the middle of an epoch."""
    found = {}
    for name, watched in (("alone", False), ("watched", True)):
        own = folder / f"{kind} {name}".replace(" ", "-")
        found[name] = train(kind, picked, pipeline, own, watched=watched)
        found[f"{name}, resumed"] = train(kind, picked, pipeline, own, watched=watched, resume=True)
    return found


def main() -> None:
    """On every rank: all that the kind named on the command line did, into a file per rank."""
    from diffusers import StableDiffusionPipeline

    folder, picked = Path(sys.argv[1]), memwatch.pick(make_rows(ROWS), probes=2, controls=11)
    found = all_four(sys.argv[3], picked, StableDiffusionPipeline.from_pretrained(sys.argv[2]), folder)
    file = folder / f"rank{Accelerator(cpu=True).process_index}.json"
    file.write_text(json.dumps(found | {"held out": list(picked.held_out)}), encoding="utf-8")


if __name__ == "__main__":
    main()
