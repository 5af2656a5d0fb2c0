"""Everything that is measured at one event of a benchmark run: memwatch's own views, generations, and the rivals' numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memwatch.bench.bright_ending import bright_ending
from memwatch.bench.items import PLANTED, SIZE, Item, general_batch
from memwatch.config import CurvatureConfig, LevelsConfig, SamplingConfig
from memwatch.curvature import test_vectors, value_and_diag_jacobian
from memwatch.denoiser import Components, Conditioning, StableDiffusion
from memwatch.measure import measure
from memwatch.probes import PreparedProbe, Probe, View, decode_latents, prepare, prompt_view, reference_view, seeded
from memwatch.signals import Measurement
from memwatch.snapshots import swapped, to_ledger

LEVELS = LevelsConfig(timesteps=(21, 61, 141, 301), draws=8)
CURVATURE = CurvatureConfig(vectors=4, tile=4, batch_size=32)
NULL_DRAWS = 2  # of the unconditional branch
GENERATION = SamplingConfig(num_inference_steps=20, guidance_scale=2.0)
PUBLISHED = SamplingConfig(num_inference_steps=50, guidance_scale=7.5)
PUBLISHED_VECTORS = 16
PROMPT_DRAWS = 4  # of vectors, at the one noisy latent of a prompt probe
NUM_SEEDS = 4  # generations of a planted item; one of every other
POOL = 256  # pictures that are no copies: a copy is nearer to its item than a third of its distance to the nearest of these


@dataclass(frozen=True)
class Bench:
    """What stays the same over a run's events."""

    denoiser: StableDiffusion
    parts: Components
    items: Sequence[Item]
    prepared: Sequence[PreparedProbe]
    views: Sequence[View]
    null: Conditioning
    pool: np.ndarray  # (POOL, SIZE, SIZE, 3) in [0, 1], as the autoencoder gives them back
    seed: int

    @classmethod
    def of(cls, denoiser: StableDiffusion, parts: Components, items: Sequence[Item], seed: int) -> Bench:
        prepared = prepare([Probe(i.caption, i.probe, name=i.name) for i in items], [], denoiser, parts, SIZE)
        views = [reference_view(p, denoiser, LEVELS, seed) for p in prepared]
        null = denoiser.encode("", parts, SIZE)
        others = [picture for _, picture in general_batch(seed + 5000, 0, POOL)]
        pool = as_decoded([np.asarray(picture) for picture in others], parts.vae)
        return cls(denoiser, parts, items, prepared, views, null, pool, seed)

    @cached_property
    def targets(self) -> dict[str, np.ndarray]:
        """Every item's probe as the autoencoder gives it back, ``(SIZE, SIZE, 3)`` in [0, 1]."""
        return {i.name: as_decoded([np.asarray(i.probe)], self.parts.vae)[0] for i in self.items}


def look(bench: Bench, earlier: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain numbers of one event.

    Args:
        earlier: weights of the starting model; with them the published procedure is run as well.
    """
    measured, nulls = {}, {}
    for view in bench.views:
        measured[view.key] = measure(bench.denoiser, [view], CURVATURE, bench.seed)[0]
        nulls[f"null/{view.key}"] = measure(
            bench.denoiser, [view.beside(bench.null, NULL_DRAWS)], CURVATURE, bench.seed
        )[0]
    tensors = to_ledger({key: compact(m) for key, m in (measured | nulls).items()})
    numbers: dict[str, Any] = {}
    generated, numbers["wen"] = generate(bench)
    numbers["copy_ratio"] = copy_ratios(bench, generated)
    numbers["nearest_ratio"] = nearest_ratios(bench, generated)
    tensors |= {f"{name}/bright_ending": value for name, value in bright_endings(bench, generated).items()}
    tensors |= {f"{name}/generated": torch.stack([g.picture for g in group]) for name, group in generated.items()}
    if earlier is not None:
        tensors |= published(bench, earlier) | prompted(bench, earlier)
    return tensors, numbers


def compact(m: Measurement) -> Measurement:
    return replace(m, epsilon=m.epsilon.half())


@dataclass(frozen=True)
class Generated:
    """One generation: ``picture`` uint8 ``(SIZE, SIZE, 3)``, and ``x_last`` the noisy latents before the last step."""

    picture: Tensor
    x_last: Tensor


@torch.no_grad()
def generate(bench: Bench, chunk: int = 32) -> tuple[dict[str, list[Generated]], dict[str, float]]:
    """Generations of every item and the Wen et al. 2024 norm: mean over steps and seeds of ``|eps(x, c) - eps(x, null)|``."""
    rows = [
        (p, seed)
        for p, item in zip(bench.prepared, bench.items, strict=True)
        for seed in range(NUM_SEEDS if item.kind in PLANTED else 1)
    ]
    found: dict[str, list[Generated]] = {p.name: [] for p in bench.prepared}
    norms: dict[str, list[float]] = {p.name: [] for p in bench.prepared}
    side = bench.views[0].noisy_latents.shape[-1]
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        ddim = bench.denoiser.sampler(bench.parts.scheduler, GENERATION.num_inference_steps, side)
        x = torch.cat(
            [
                torch.randn(1, *bench.views[0].noisy_latents.shape[2:], generator=seeded("generation", seed))
                for _, seed in part
            ]
        )
        both = bench.denoiser.stack([bench.null] * len(part) + [p.conditioning for p, _ in part])
        norm, x_last = torch.zeros(len(part)), x
        for t in ddim.timesteps:
            x_last = x
            unconditional, conditional = bench.denoiser.predict(
                torch.cat([x, x]), torch.full((2 * len(x),), int(t)), both
            ).chunk(2)
            norm += (conditional - unconditional).flatten(1).norm(dim=1) / len(ddim.timesteps)
            x = ddim.step(unconditional + GENERATION.guidance_scale * (conditional - unconditional), t, x).prev_sample
        for i, (p, _) in enumerate(part):
            found[p.name].append(Generated(torch.from_numpy(decode_latents(x[i], bench.parts.vae)), x_last[i]))
            norms[p.name].append(float(norm[i]))
    return found, {name: float(np.mean(values)) for name, values in norms.items()}


def copy_ratios(bench: Bench, generated: Mapping[str, list[Generated]]) -> dict[str, list[float]]:
    """For every generation of a planted item how near it is inside the item's mask: the measure of what is stored."""
    planted = [i for i in bench.items if i.kind in PLANTED]
    return {
        i.name: _distance_ratios(bench.targets[i.name], generated[i.name], i.mask, unexposed(bench.pool, i.mask))
        for i in planted
    }


def nearest_ratios(bench: Bench, generated: Mapping[str, list[Generated]]) -> dict[str, list[float]]:
    """The same for every item over the whole picture: what one can measure without knowing a mask (f_mem's own way)."""
    everywhere = np.ones((SIZE, SIZE), dtype=bool)
    others = unexposed(bench.pool, everywhere)
    return {i.name: _distance_ratios(bench.targets[i.name], generated[i.name], everywhere, others) for i in bench.items}


def _distance_ratios(
    target: np.ndarray, generated: Sequence[Generated], mask: np.ndarray, others: np.ndarray
) -> list[float]:
    """Distance to the target over distance to the nearest other picture (``unexposed`` already), on the mask's pixels of unexposed pictures.

    Below 1/3 is a copy (the 1/3 rule: Yoon et al. 2023; Bonnaire et al. 2025).
    """
    (target,) = unexposed(target[None], mask)
    pictures = unexposed(np.stack([g.picture.numpy() / 255 for g in generated]), mask)
    own = [np.linalg.norm(target - x) for x in pictures]
    nearest = [np.linalg.norm(others - x, axis=(1, 2)).min() for x in pictures]
    return [float(a / b) for a, b in zip(own, nearest, strict=True)]


def unexposed(pictures: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pixels ``(n, pixels, 3)`` inside a mask without the mean of each channel and with unit contrast.

    A copy is one at any exposure: sampling of a small model leaves brightness to the initial noise, whose signal-to-noise ratio is not zero.
    """
    pixels = pictures[:, mask].astype(np.float64)
    pixels = pixels - pixels.mean(1, keepdims=True)
    scaled: np.ndarray = pixels / np.sqrt(np.square(pixels).mean((1, 2), keepdims=True) + 1e-8)
    return scaled


def pixel_values(pictures: Sequence[np.ndarray]) -> Tensor:
    """RGB uint8 pictures as an autoencoder takes them: ``(n, 3, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def as_decoded(pictures: Sequence[np.ndarray], vae: Any) -> np.ndarray:
    """Pictures through the autoencoder and back, ``(n, SIZE, SIZE, 3)`` in [0, 1]: the autoencoder's own loss is nobody's copying error."""
    back = torch.cat(
        [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in torch.split(pixel_values(pictures), 32)]
    )
    decoded: np.ndarray = ((back.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    return decoded


def bright_endings(bench: Bench, generated: Mapping[str, list[Generated]]) -> dict[str, Tensor]:
    """Bright Ending attention of every item at the last step (timestep 1), mean over its generations; ``(h, w)`` of the finest grid."""
    (tokenizer,) = bench.parts.tokenizers
    maps = {}
    for p in bench.prepared:
        end = tokenizer(p.probe.prompt).input_ids.index(tokenizer.eos_token_id)
        found = [bright_ending(bench.denoiser, g.x_last, 1, p.conditioning, end) for g in generated[p.name]]
        maps[p.name] = torch.from_numpy(np.mean(found, axis=0))
    return maps


def published(bench: Bench, earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published procedure (Kim & Lee, ICML 2026): DDIM 50, guidance 7.5, last step, 16 Rademacher vectors; maps ``(h, w)`` clipped at 0.

    ``published_snapshot`` and ``published_null`` are the curvature differences, ``published_score`` and ``published_score_null`` the score
    differences; channel sums, mean over the item's seeds.
    """
    side = bench.views[0].noisy_latents.shape[-1]
    maps = {}
    for p, item in zip(bench.prepared, bench.items, strict=True):
        found = []
        for seed in range(2 if item.kind in PLANTED else 1):
            seeded_probe = replace(p, probe=replace(p.probe, seed=seed))
            view, _ = prompt_view(seeded_probe, bench.null, bench.denoiser, bench.parts.scheduler, PUBLISHED, 1, side)
            found.append(_published_maps(bench, view, earlier, seed))
        for key in found[0]:
            maps[f"{p.name}/{key}"] = torch.stack([f[key] for f in found]).mean(0)
    return maps


def prompted(bench: Bench, earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """memwatch's own prompt probes, at the last step of a generation: ``prompt/NAME``, ``prompt_first/NAME`` by the earlier weights at the
    same noisy latents, ``prompt_null/NAME`` by the unconditional branch."""
    side = bench.views[0].noisy_latents.shape[-1]
    arguments = (bench.null, bench.denoiser, bench.parts.scheduler, GENERATION, PROMPT_DRAWS, side)
    views = [prompt_view(p, *arguments)[0] for p in bench.prepared]

    def measured(prefix: str, views: Sequence[View]) -> dict[str, Measurement]:
        return {
            f"{prefix}/{view.key}": compact(measure(bench.denoiser, [view], CURVATURE, bench.seed)[0]) for view in views
        }

    found = measured("prompt", views) | measured(
        "prompt_null", [view.beside(bench.null, PROMPT_DRAWS) for view in views]
    )
    with swapped(bench.denoiser.model, earlier):
        found |= measured("prompt_first", views)
    return to_ledger(found)


def _published_maps(bench: Bench, view: View, earlier: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    x, t = view.noisy_latents[0], torch.tensor(view.timesteps)
    vectors = test_vectors(PUBLISHED_VECTORS, (x.shape[1], x.shape[2], x.shape[3]), seeded("published", seed))[:, None]
    conditional, null = bench.denoiser.stack([view.conditioning]), bench.denoiser.stack([bench.null])
    eps_now, j_now = value_and_diag_jacobian(lambda x: bench.denoiser(x, t, conditional), x, vectors)
    eps_null, j_null = value_and_diag_jacobian(lambda x: bench.denoiser(x, t, null), x, vectors)
    with swapped(bench.denoiser.model, earlier):
        eps_earlier, j_earlier = value_and_diag_jacobian(lambda x: bench.denoiser(x, t, conditional), x, vectors)
    return {
        "published_snapshot": (j_now - j_earlier).mean(0)[0].sum(0).clamp(min=0),
        "published_null": (j_now - j_null).mean(0)[0].sum(0).clamp(min=0),
        "published_score": (eps_now - eps_earlier)[0].square().sum(0),
        "published_score_null": (eps_now - eps_null)[0].square().sum(0),
    }
