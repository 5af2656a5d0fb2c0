"""Stage: tiny-sd with an earlier self, the items that are looked at, and both ways to look."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from evidence.old.exact import BASE, NOW, NULL, Design, Place, columns_of, jacobian_columns
from evidence.old.procedure import STEPS, published_maps
from evidence.worlds.bases import TINY_SD, read_base
from evidence.worlds.items import Item, Kind, looked_at
from evidence.worlds.sources import SIZE
from evidence.worlds.world import WORLDS
from torch import Tensor, nn

from memwatch.config import LevelsConfig, MemWatchConfig, SamplingConfig
from memwatch.denoiser import Components, Conditioning, StableDiffusion
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.batches import Batches
from memwatch.measure.measure import measure
from memwatch.measure.prepare import PreparedProbe, prepare
from memwatch.measure.probes import Probe
from memwatch.measure.views import View, generate, initial_noise, noised, reference_view, seeded
from memwatch.measure.weights import swapped, trainable

NUM_PIXELS = 16  # of a map: of these the exact diagonal is known
KINDS = (Kind.TEMPLATE, Kind.LOGO, Kind.VERBATIM, Kind.ORDINARY, Kind.HELD_OUT, Kind.LEARNED)  # one item of each


@dataclass(frozen=True)
class Stage:
    """The network that is looked at, with an earlier self, and the items.

    Attributes:
        earlier: its weights before training; ``None`` where no run lies there.
        says: what it is, for the page.
    """

    denoiser: StableDiffusion
    parts: Components
    earlier: Mapping[str, Tensor] | None
    prepared: Sequence[PreparedProbe]
    unconditional: Conditioning
    says: str

    @classmethod
    def of(cls, base: Path, runs: Path, num_items: int) -> Stage:
        """tiny-sd as a ``captions`` run in ``runs`` has left it; as it is where there is none."""
        tiny, parts = read_base(TINY_SD, base, runs)
        model: Any = tiny.model
        unet = model.to(memory_format=torch.contiguous_format)
        for module in unet.modules():  # before PyTorch 2.14 its forward mode takes nothing else
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        checkpoint = next(iter(sorted(runs.glob("captions-*/checkpoint.pt"))), None)
        earlier, says, seed = None, "tiny-sd as it is, since no run lies there; there is no earlier model", 0
        if checkpoint is not None:
            state = torch.load(checkpoint, weights_only=True)
            earlier, seed = trainable(unet), int(checkpoint.parent.name.rpartition("-")[2])
            unet.load_state_dict(state["weights"])
            says = f"tiny-sd after {state['step']} steps of {checkpoint.parent.name}, against the weights before them"
        denoiser = StableDiffusion(unet.eval().requires_grad_(False), NoiseSchedule.from_scheduler(parts.scheduler))
        items = list(some_items(looked_at(WORLDS["captions"].items(seed)), num_items))
        probes = [Probe(item.caption, item.probe, name=item.name) for item in items]
        prepared = prepare(probes, denoiser, parts, SIZE)
        return cls(denoiser, parts, earlier, prepared, denoiser.encode("", parts, SIZE), says)

    @property
    def model(self) -> nn.Module:
        return self.denoiser.model

    @property
    def side(self) -> int:
        """Of the latents."""
        latents = self.prepared[0].latents
        assert latents is not None
        return latents.shape[-1]

    def generated(self, p: PreparedProbe, sampling: SamplingConfig, levels: LevelsConfig, seeds: int) -> View:
        """A prompt's generations, noised again."""
        how = p.conditioning, self.unconditional, self.side, Batches(seeds)
        z = generate(self.denoiser, self.parts.scheduler, sampling, range(seeds), *how)
        return noised(p, z, self.denoiser, levels, 0)


def some_items(items: Sequence[Item], number: int) -> Iterator[Item]:
    """One of each kind, then another of each, until there are enough."""
    groups = [[item for item in items if item.kind is kind] for kind in KINDS]
    ranked = [group[i] for i in range(max(map(len, groups))) for group in groups if i < len(group)]
    return iter(ranked[:number])


def place_of(stage: Stage, view: View, tick: Callable[[], object]) -> Place:
    """The Jacobian's columns of ``NUM_PIXELS`` random pixels at a view's noisy latents; ``tick`` after each latent."""
    levels, draws, c, h, w = view.noisy_latents.shape
    denoiser = stage.denoiser
    pixels = torch.randperm(h * w, generator=seeded("pixels", view.key))[:NUM_PIXELS]
    columns = columns_of(pixels, (c, h, w))

    def at(x: Tensor, timestep: float, said: Conditioning) -> Tensor:
        timesteps = torch.full((len(columns),), timestep, device=denoiser.device)
        conditioning = denoiser.stack([said] * len(columns))
        found = jacobian_columns(lambda rows: denoiser(rows, timesteps, conditioning), x.to(denoiser.device), columns)
        tick()
        return found.cpu()

    def look(said: Conditioning) -> Tensor:
        pairs = zip(view.noisy_latents, view.timesteps, strict=True)
        found = [at(x[None], timestep, said) for of_level, timestep in pairs for x in of_level]
        return torch.stack(found).reshape(levels, draws, *found[0].shape)

    found = {NOW: look(view.conditioning), NULL: look(stage.unconditional)}
    if stage.earlier is not None:
        with swapped(stage.model, stage.earlier):
            found[BASE] = look(view.conditioning)
    return Place(denoiser.schedule, (c, h, w), view.timesteps, pixels, found)


# --- both ways to look ------------------------------------------------------------------------------------------------


def published_work(stage: Stage, p: PreparedProbe) -> Callable[[], dict[str, Tensor]]:
    """The published procedure on one prompt, with two networks in memory as its code has them."""
    from diffusers import DDIMScheduler

    earlier = copy.deepcopy(stage.model)
    if stage.earlier is not None:
        earlier.load_state_dict(stage.earlier)
    solver: Any = DDIMScheduler.from_config(stage.parts.scheduler.config)
    solver.set_timesteps(STEPS)
    conditioning = stage.denoiser.stack([stage.unconditional, p.conditioning])
    x = initial_noise(stage.denoiser, [0], stage.side).to(stage.denoiser.device)

    def network(denoiser: StableDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: denoiser.predict(x, t.to(x.device).expand(len(x)), conditioning)

    now, before = network(stage.denoiser), network(StableDiffusion(earlier, stage.denoiser.schedule))
    return lambda: published_maps(now, before, solver, x, torch.Generator().manual_seed(0))


def run_ours(
    p: PreparedProbe,
    stage: Stage,
    design: Design,
    levels: LevelsConfig,
    kind: str,
    config: MemWatchConfig,
    seeds: int,
) -> None:
    """memwatch's look at one probe: both branches now and, of a prompt probe, under earlier weights."""
    curvature = replace(design.curvature, batch_size=config.curvature.batch_size)
    if kind == "reference":
        view = reference_view(p, stage.denoiser, levels, 0)
    else:
        spread = replace(levels, draws=max(levels.draws, seeds))
        view = stage.generated(p, config.sampling, spread, seeds)
    without = replace(view, conditioning=stage.unconditional)
    batches = Batches(curvature.batch_size)
    for one in (view, without):
        measure(stage.denoiser, one, curvature, 0, batches)
    if kind == "prompt" and stage.earlier is not None:
        with swapped(stage.model, stage.earlier):
            for one in (view, without):
                measure(stage.denoiser, one, curvature, 0, batches)
