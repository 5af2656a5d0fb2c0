"""Scale: the comparison on a network of Stable Diffusion 1.5's size, and an event as it grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from evidence.old.cost import Search, plans, rows_of
from evidence.old.events import FULL, USUAL, Numbers, Setting, Workbench
from evidence.old.meter import clock_of, median_seconds
from evidence.old.procedure import Rows, all_maps, published_rows
from evidence.worlds.sources import SIZE
from torch import Tensor, nn
from tqdm.auto import tqdm

from memwatch.config import MemWatchConfig
from memwatch.measure.passes import count_passes
from memwatch.pace import CHOSEN

# --- a network of Stable Diffusion 1.5's size ------------------------------------------------------------------------


def sd15(device: torch.device) -> nn.Module:
    """Stable Diffusion 1.5's UNet with random weights; they do not change what a pass costs."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:  # of the size that keeps activations as they are: numbers close to 0 take CPUs longer
            bound = (3 / parameter[0].numel()) ** 0.5
            parameter.data.uniform_(-bound, bound, generator=generator)
        else:
            parameter.data.fill_(float(name.endswith("weight")))
    return unet  # type: ignore[no-any-return]


def timed_passes(unet: nn.Module, side: int, config: MemWatchConfig) -> dict[str, float]:
    """Seconds per row of a pass forward without a graph, with one, and backward to the input."""
    device = next(unet.parameters()).device
    batch = config.curvature.batch_size if device.type == "cuda" else 1  # a CPU gains nothing from more
    x, t = torch.randn(batch, 4, side, side, device=device), torch.full((batch,), 301, device=device)
    said = torch.randn(batch, 77, 768, device=device)

    def forward(x: Tensor) -> Tensor:
        output: Tensor = unet(x, t, encoder_hidden_states=said, return_dict=False)[0]
        return output

    @torch.no_grad()
    def without_graph() -> None:
        forward(x)

    repeats = 5 if device.type == "cuda" else 2
    clock = clock_of(device)
    found = {"batch": float(batch), "forward": median_seconds(without_graph, repeats, clock) / batch}
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        found["graph"] = median_seconds(lambda: forward(leaf), repeats, clock) / batch
        output, v = forward(leaf), torch.ones_like(x)
        backward = median_seconds(lambda: torch.autograd.grad(output, leaf, v, retain_graph=True), repeats, clock)
    return found | {"product": backward / batch}


def seconds_by_passes(rows: Rows, passes: Mapping[str, float]) -> float:
    """Rows times what each kind takes."""
    return rows.forward * passes["forward"] + rows.graph * passes["graph"] + rows.products * passes["product"]


def large(
    searches: Mapping[tuple[str, str], Search], sides: Sequence[int], config: MemWatchConfig, device: torch.device
) -> list[dict[str, Any]]:
    """The same comparison on a network of SD 1.5's size: single passes, timed, times their numbers."""
    if not sides:
        return []
    unet, found, steps = sd15(device), [], config.sampling.num_inference_steps
    for side in tqdm(sides, desc="SD 1.5-sized", unit="size", disable=None):
        passes = timed_passes(unet, side, config)
        theirs = seconds_by_passes(all_maps(published_rows()), passes)
        for kind, name, design, levels, seeds in plans(searches, config):
            if design is not None:
                rows = rows_of(kind, levels * design.draws, design.vectors, seeds, steps)
                ours = seconds_by_passes(rows, passes)
                row = {"latents": f"{side}x{side}", "probe": kind, "map": name, "passes": rows.passes}
                found.append(row | {"seconds": ours, "published": theirs, "faster": theirs / ours, "per_row": passes})
    return found


# --- curves ----------------------------------------------------------------------------------------------------------


def curves(
    accelerator: Any, model: nn.Module, base: Path, config: MemWatchConfig, numbers: Numbers
) -> dict[str, list[dict[str, Any]]]:
    """Cost of a full event and of a screened one, over the number of probes, levels, vectors and ranks."""
    clock = clock_of(accelerator.device)
    bench = Workbench(accelerator, model, str(base), SIZE, clock)
    axes: dict[str, list[tuple[int, MemWatchConfig, Numbers]]] = {"probes": [], "levels": [], "vectors": []}
    axes["probes"] = [(n, config, Numbers(n)) for n in (4, 16, 28, 64)]
    every = (61, 141, 221, 301, 401, 501, 601, 701)
    for n in (1, 2, 4, 8):
        levels = replace(config.levels, timesteps=every[:: 8 // n])
        axes["levels"].append((n, replace(config, levels=levels), numbers))
    for n in (1, 2, 4, 8):
        axes["vectors"].append((n, replace(config, curvature=replace(config.curvature, vectors=n)), numbers))
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, points in axes.items():
        for n, settings, looked in tqdm(points, desc=f"events over {axis}", unit="point", disable=None):
            cost = bench.measure(Setting(f"{axis}: {n}", settings), looked)
            events = {name: {"passes": e.passes, "seconds": e.seconds} for name, e in cost.events.items()}
            found.setdefault(axis, []).append({"n": n, "events": events})
    found["ranks"] = [{"n": n, "events": rank_passes(config, numbers, n)} for n in (1, 2, 4, 8)]
    return found


def rank_passes(config: MemWatchConfig, numbers: Numbers, ranks: int) -> dict[str, dict[str, float]]:
    """Of the rank that looks at the most probes."""
    passes = count_passes(config, -(-numbers.references // ranks), -(-numbers.prompts // ranks))
    return {USUAL: {"passes": passes.of_event(CHOSEN)}, FULL: {"passes": passes.of_event(1)}}
