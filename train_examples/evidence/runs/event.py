"""One event: what memwatch would measure, what the twins are compared by, and what the model generates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from evidence.runs.generations import generate
from evidence.runs.protocol import CURVATURE, DRAWS, Bench
from evidence.worlds.items import PLANTED, Kind
from torch import Tensor

from memwatch.config import LevelsConfig
from memwatch.measure.images import encode_images
from memwatch.measure.measure import Batches, measure, run_forward
from memwatch.measure.measurement import Measurement, to_tensors
from memwatch.measure.views import View, noised
from memwatch.measure.weights import swapped

Generations = Mapping[str, list[Tensor]]
PROMPTED = (*PLANTED, Kind.HELD_OUT)  # whose captions are prompt probes as well


def truths(bench: Bench) -> dict[str, Tensor]:
    """Denoising loss of every item on noise that memwatch never uses: ``truth/NAME``, ``(levels, draws, h, w)``."""
    found = {}
    batches = Batches(CURVATURE.batch_size * 4)
    for view in bench.truths:
        seen, _ = run_forward(bench.denoiser, view, None, batches)
        assert view.eps is not None
        found[f"truth/{view.key}"] = (seen.epsilon - view.eps).square().mean(2).half()
    return found


def forward(bench: Bench) -> dict[str, Tensor]:
    """Epsilon of every item at all noise draws: ``NAME`` under its caption, ``null/NAME`` without."""
    found: dict[str, Measurement] = {}
    batches = Batches(CURVATURE.batch_size * 4)
    for view in bench.views:
        now, without = run_forward(bench.denoiser, view, bench.branch_of(view), batches)
        found[view.key] = now
        if without is not None:
            found[f"null/{view.key}"] = without
    return packed(found)


def curvature(bench: Bench) -> dict[str, Tensor]:
    """Retained variance of what has a mask or is compared with it, beside what ``forward`` says of it."""
    kinds = {item.name: item.kind for item in bench.items}
    views = [view for view in bench.views if kinds[view.key] is not Kind.ORDINARY]
    branches = [(view, bench.branch_of(view)) for view in views]
    without = [replace(v, conditioning=b) for v, b in branches if b is not None]
    found = measured(bench, "", views) | measured(bench, "null/", without)
    return {key: value for key, value in found.items() if key.endswith("/rho")}


def measured(bench: Bench, prefix: str, views: Sequence[View]) -> dict[str, Tensor]:
    batches = Batches(CURVATURE.batch_size * 2)
    return packed({f"{prefix}{v.key}": measure(bench.denoiser, v, CURVATURE, bench.seed, batches) for v in views})


def packed(found: Mapping[str, Measurement]) -> dict[str, Tensor]:
    """As tensors; epsilon in half precision, which halves the files."""
    return to_tensors({name: replace(m, epsilon=m.epsilon.half()) for name, m in found.items()})


def generations(bench: Bench, names: Collection[str]) -> tuple[dict[str, Tensor], Generations]:
    """What the captions of these items generate: pictures ``NAME/generated``, and the generations themselves."""
    chosen = replace(bench, items=[item for item in bench.items if item.name in names])
    generated = generate(chosen)
    first = {item.caption: item.name for item in reversed(chosen.items)}  # the first item of each caption
    tensors = {f"{name}/generated": torch.stack(generated[name]) for name in first.values()}
    return tensors, generated


def renoised(bench: Bench, generated: Generations, earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prompt probes: an item's generations are noised again and looked at as pictures, each at one draw of a level.

    ``renoised/NAME``, ``renoised_null/NAME`` by the unconditional branch, ``renoised_first/NAME`` and
    ``renoised_first_null/NAME`` by the earlier weights, at the same noisy latents.
    """
    kinds = {i.name: i.kind for i in bench.items}
    levels = LevelsConfig(timesteps=tuple(map(int, bench.views[0].timesteps)), draws=DRAWS)
    views = []
    for p in (p for p in bench.prepared if kinds[p.name] in PROMPTED):
        latents = encode_images([g.numpy() for g in generated[p.name][:DRAWS]], bench.parts.vae)
        views.append(noised(p, latents, bench.denoiser, levels, bench.seed))
    assert bench.unconditional is not None
    without = [replace(view, conditioning=bench.unconditional) for view in views]
    found = measured(bench, "renoised/", views) | measured(bench, "renoised_null/", without)
    with swapped(bench.denoiser.model, earlier):
        return found | measured(bench, "renoised_first/", views) | measured(bench, "renoised_first_null/", without)
