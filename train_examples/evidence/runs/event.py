"""One event: what memwatch would measure, what the model generates, and what the rivals need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from evidence.runs.bright_ending import bright_ending
from evidence.runs.generations import Generated, generate, nearest_ratios
from evidence.runs.protocol import (
    CURVATURE,
    DRAWS,
    GENERATION,
    PUBLISHED,
    PUBLISHED_VECTORS,
    Bench,
)
from evidence.worlds.items import PLANTED, Kind
from torch import Tensor

from memwatch.config import LevelsConfig
from memwatch.denoiser import Conditioning
from memwatch.measure.curvature import test_vectors, value_and_diag_jacobian
from memwatch.measure.images import encode_images
from memwatch.measure.measure import Batches, measure, run_forward
from memwatch.measure.measurement import Measurement, to_tensors
from memwatch.measure.views import View, noised, seeded
from memwatch.measure.weights import swapped

Generations = Mapping[str, list[Generated]]
ROWS = 16  # items at a time
PROMPTED = (*PLANTED, Kind.HELD_OUT)  # whose captions are prompt probes as well
GUIDED = {"published": PUBLISHED, "verified": GENERATION}  # the rivals' sampling: as published, and as copies are made


def truths(bench: Bench) -> dict[str, Tensor]:
    """Denoising loss of every item on noise that memwatch never uses: ``truth/NAME``, ``(levels, draws, h, w)``, half."""
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


def curvature(bench: Bench, names: Collection[str]) -> dict[str, Tensor]:
    """Retained variance of these items, beside what ``forward`` says of them."""
    views = [view for view in bench.views if view.key in names]
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
    tensors = {f"{name}/generated": torch.stack([g.picture for g in generated[name]]) for name in first.values()}
    return tensors, generated


# --- the last event only ---------------------------------------------------------------------------------------------


def of_rivals(
    bench: Bench, generated: Generations, earlier: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Maps at the last step of a generation, and guidance norms, as published and as copies are verified.

    The published procedure (Kim & Lee, ICML 2026) takes one generation of an item and 16 Rademacher vectors:
    ``NAME/HOW/snapshot`` and ``NAME/HOW/null`` are the curvature differences, clipped at 0, ``score`` and
    ``score_null`` the score differences, all channel sums ``(h, w)``. ``NAME/HOW/bright_ending`` is the attention of
    Chen et al. (ICLR 2025), where the network has cross-attention.

    Args:
        earlier: weights of the starting model.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    kinds = {i.name: i.kind for i in bench.items}
    asked = [p for p in bench.prepared if kinds[p.name] in PROMPTED]
    attends = hasattr(bench.denoiser.model, "down_blocks")
    for how, sampling in GUIDED.items():
        found = generated if how == "verified" else generate(bench, sampling, 1)
        numbers[f"wen {how}"] = {n: float(np.mean([g.guidance_norm for g in group])) for n, group in found.items()}
        for start in range(0, len(asked), ROWS):
            part = asked[start : start + ROWS]
            maps = published_maps(bench, [found[p.name][0] for p in part], [p.conditioning for p in part], earlier)
            tensors |= {f"{p.name}/{how}/{key}": maps[key][i].clone() for i, p in enumerate(part) for key in maps}
        for p in asked if attends else ():
            seen = attention(bench, found[p.name][:DRAWS], p.probe.prompt, p.conditioning)
            tensors[f"{p.name}/{how}/bright_ending"] = seen
    return tensors, numbers


def attention(bench: Bench, found: Sequence[Generated], prompt: str, conditioning: Conditioning) -> Tensor:
    """Bright Ending attention at timestep 1 on the finest grid, mean over generations."""
    (tokenizer,) = bench.parts.tokenizers
    end = tokenizer(prompt).input_ids.index(tokenizer.eos_token_id)
    maps = [bright_ending(bench.denoiser, g.x_last, 1, conditioning, end) for g in found]
    return torch.from_numpy(np.mean(maps, axis=0))


def published_maps(
    bench: Bench, found: Sequence[Generated], conditioning: Sequence[Conditioning], earlier: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The four maps of one generation per item, each ``(items, h, w)``."""
    x, t = torch.stack([g.x_last for g in found]), torch.tensor([g.timestep for g in found])
    c, h, w = bench.latent_shape
    vectors = test_vectors(PUBLISHED_VECTORS, (c, h, w), seeded("published", 0))
    vectors = vectors[:, None].expand(-1, len(x), -1, -1, -1)

    def of(conditioning: Sequence[Conditioning]) -> tuple[Tensor, Tensor]:
        rows = bench.denoiser.stack(conditioning)
        return value_and_diag_jacobian(lambda x: bench.denoiser(x, t, rows), x, vectors)

    assert bench.unconditional is not None
    (eps, products), (eps_null, products_null) = of(conditioning), of([bench.unconditional] * len(x))
    with swapped(bench.denoiser.model, earlier):
        eps_earlier, products_earlier = of(conditioning)
    return {
        "snapshot": (products - products_earlier).mean(0).sum(1).clamp(min=0),
        "null": (products - products_null).mean(0).sum(1).clamp(min=0),
        "score": (eps - eps_earlier).square().sum(1),
        "score_null": (eps - eps_null).square().sum(1),
    }


def renoised(bench: Bench, generated: Generations, earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prompt probes: an item's generations are noised again and looked at as pictures, each at one draw of a level.

    ``renoised/NAME``, ``renoised_null/NAME`` by the unconditional branch, ``renoised_first/NAME`` and
    ``renoised_first_null/NAME`` by the earlier weights, at the same noisy latents.
    """
    kinds, levels = {i.name: i.kind for i in bench.items}, LevelsConfig(timesteps=bench.views[0].timesteps, draws=DRAWS)  # type: ignore[arg-type]
    views = []
    for p in (p for p in bench.prepared if kinds[p.name] in PROMPTED):
        latents = torch.stack([latents_of(bench, g) for g in generated[p.name][:DRAWS]])
        views.append(noised(p, latents, bench.denoiser, levels, bench.seed))
    assert bench.unconditional is not None
    without = [replace(view, conditioning=bench.unconditional) for view in views]
    found = measured(bench, "renoised/", views) | measured(bench, "renoised_null/", without)
    with swapped(bench.denoiser.model, earlier):
        return found | measured(bench, "renoised_first/", views) | measured(bench, "renoised_first_null/", without)


def latents_of(bench: Bench, g: Generated) -> Tensor:
    """The finished latents of a generation, read from its picture as those of a training image are."""
    return encode_images([g.picture.numpy()], bench.parts.vae)[0]
