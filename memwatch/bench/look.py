"""One event: memwatch's own measurements of every item, what the model generates, and what the rivals need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memwatch.bench.bright_ending import bright_ending
from memwatch.bench.copies import Generated, copy_ratios, generate, nearest_ratios
from memwatch.bench.items import PLANTED
from memwatch.bench.protocol import (
    CURVATURE,
    GENERATION,
    NUM_SEEDS,
    PROMPT_DRAWS,
    PUBLISHED,
    PUBLISHED_VECTORS,
    RENOISED,
    SEED_DRAWS,
    Bench,
)
from memwatch.config import LevelsConfig
from memwatch.denoiser import Conditioning
from memwatch.measure.curvature import test_vectors, value_and_diag_jacobian
from memwatch.measure.measure import measure
from memwatch.measure.measurement import to_tensors
from memwatch.measure.views import View, prompt_view, reference_view, sample, seeded
from memwatch.measure.weights import swapped


def look(
    bench: Bench, earlier: Mapping[str, Tensor] | None = None, last: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain numbers of one event.

    ``NAME/...`` is an item under its caption, ``null/NAME/...`` the same without the caption.

    Args:
        earlier: weights of the starting model; with them prompt probes are measured as well.
        last: whether the published procedure is run, too, and prompt probes by it.
    """
    tensors = _measured(bench, "", bench.views)
    tensors |= _measured(bench, "null/", [replace(view, conditioning=bench.unconditional) for view in bench.views])
    numbers: dict[str, Any] = {}
    if not any(item.kind in PLANTED for item in bench.items):
        return tensors, numbers  # nothing could be copied
    generated, numbers["wen"] = generate(bench)
    numbers["copy_ratio"] = copy_ratios(bench, generated)
    numbers["nearest_ratio"] = nearest_ratios(bench, generated)
    tensors |= {f"{name}/bright_ending": value for name, value in bright_endings(bench, generated).items()}
    pictures = {name: [g.picture for g in group] for name, group in generated.items() if name in numbers["copy_ratio"]}
    tensors |= {f"{name}/generated": torch.stack(group) for name, group in pictures.items()}
    if earlier is not None and bench.prompts:
        tensors |= renoised(bench, earlier)
        if last:
            tensors |= published(bench, earlier) | prompted(bench, earlier)
    return tensors, numbers


def _measured(bench: Bench, prefix: str, views: Sequence[View]) -> dict[str, Tensor]:
    """Measurements of the views as tensors; epsilon in half precision, which halves the files."""
    found = {f"{prefix}{view.key}": measure(bench.denoiser, view, CURVATURE, bench.seed) for view in views}
    return to_tensors({name: replace(m, epsilon=m.epsilon.half()) for name, m in found.items()})


def bright_endings(bench: Bench, generated: Mapping[str, list[Generated]]) -> dict[str, Tensor]:
    """Bright Ending attention of every item at the last step (timestep 1), on the finest grid ``(h, w)``.

    It is the mean over the item's generations.
    """
    (tokenizer,) = bench.parts.tokenizers
    maps = {}
    for p in bench.prepared:
        end = tokenizer(p.probe.prompt).input_ids.index(tokenizer.eos_token_id)
        found = [bright_ending(bench.denoiser, g.x_last, 1, p.conditioning, end) for g in generated[p.name][:NUM_SEEDS]]
        maps[p.name] = torch.from_numpy(np.mean(found, axis=0))
    return maps


def prompted(bench: Bench, earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """memwatch's own prompt probes, at the last step of a generation.

    ``prompt/NAME``, ``prompt_null/NAME`` by the unconditional branch, and ``prompt_first/NAME`` by the earlier weights
    at the same noisy latents.
    """
    scheduler, side = bench.parts.scheduler, bench.latent_shape[-1]
    arguments = (bench.unconditional, bench.denoiser, scheduler, GENERATION, PROMPT_DRAWS, side)
    views = [prompt_view(p, *arguments)[0] for p in bench.prepared]
    without = [replace(view, conditioning=bench.unconditional) for view in views]
    found = _measured(bench, "prompt/", views) | _measured(bench, "prompt_null/", without)
    with swapped(bench.denoiser.model, earlier):
        return found | _measured(bench, "prompt_first/", views)


def renoised(bench: Bench, earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prompt probes whose finished generations are noised again and looked at as pictures.

    ``renoised/NAME/SEED``, ``renoised_null/...`` by the unconditional branch, ``renoised_first/...`` and
    ``renoised_first_null/...`` by the earlier weights, at the same noisy latents. Generation ``SEED`` has
    ``SEED_DRAWS[SEED]`` noise draws of a level.
    """
    views = []
    for p in bench.prompts:
        for seed, draws in enumerate(SEED_DRAWS):
            x = torch.randn(1, *bench.latent_shape, generator=seeded("generation", seed))
            s = sample(bench.denoiser, bench.parts.scheduler, GENERATION, x, [p.conditioning], bench.unconditional)
            name = replace(p.probe, name=f"{p.name}/{seed}")
            generated = replace(p, probe=name, latents=s.latents[0].cpu())
            views.append(
                reference_view(generated, bench.denoiser, LevelsConfig(timesteps=RENOISED, draws=draws), bench.seed)
            )
    without = [replace(view, conditioning=bench.unconditional) for view in views]
    found = _measured(bench, "renoised/", views) | _measured(bench, "renoised_null/", without)
    with swapped(bench.denoiser.model, earlier):
        return found | _measured(bench, "renoised_first/", views) | _measured(bench, "renoised_first_null/", without)


def published(bench: Bench, earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published procedure (Kim & Lee, ICML 2026): DDIM 50, guidance 7.5, last step, 16 Rademacher vectors.

    ``published_snapshot`` and ``published_null`` are the curvature differences, clipped at 0; ``published_score`` and
    ``published_score_null`` the score differences. All are maps ``(h, w)``: channel sums, mean over the item's seeds.
    """
    scheduler, side = bench.parts.scheduler, bench.latent_shape[-1]
    maps = {}
    for p, item in zip(bench.prepared, bench.items, strict=True):
        found = []
        for seed in range(2 if item.kind in PLANTED else 1):
            seeded_probe = replace(p, probe=replace(p.probe, seed=seed))
            view, _ = prompt_view(seeded_probe, bench.unconditional, bench.denoiser, scheduler, PUBLISHED, 1, side)
            found.append(_published_maps(bench, view, earlier, seed))
        for key in found[0]:
            maps[f"{p.name}/published_{key}"] = torch.stack([f[key] for f in found]).mean(0)
    return maps


def _published_maps(bench: Bench, view: View, earlier: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    x, t = view.noisy_latents[0], torch.tensor(view.timesteps)
    vectors = test_vectors(PUBLISHED_VECTORS, (x.shape[1], x.shape[2], x.shape[3]), seeded("published", seed))[:, None]

    def of(conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        rows = bench.denoiser.stack([conditioning])
        return value_and_diag_jacobian(lambda x: bench.denoiser(x, t, rows), x, vectors)

    (eps, products), (eps_null, products_null) = of(view.conditioning), of(bench.unconditional)
    with swapped(bench.denoiser.model, earlier):
        eps_earlier, products_earlier = of(view.conditioning)
    return {
        "snapshot": (products - products_earlier).mean(0)[0].sum(0).clamp(min=0),
        "null": (products - products_null).mean(0)[0].sum(0).clamp(min=0),
        "score": (eps - eps_earlier)[0].square().sum(0),
        "score_null": (eps - eps_null)[0].square().sum(0),
    }
