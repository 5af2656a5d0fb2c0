"""The published procedure (Kim & Lee, ICML 2026, arXiv 2605.26756), pass by pass, and what each way of looking takes.

Its code (Gwangho99/mem-curv-diff) makes each of its four maps by itself. All of them sample by DDIM with guidance, two
rows per step, of which the first is without the prompt. A curvature map breaks off before the last step, runs the batch
of two there with its graph, and goes back through it once per test vector; against an earlier model through that one's
batch of two as well. A score map samples to the end, against an earlier model with both networks at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from evidence.runs.protocol import PUBLISHED, PUBLISHED_VECTORS
from torch import Tensor

STEPS, VECTORS, GUIDANCE = PUBLISHED.num_inference_steps, PUBLISHED_VECTORS, PUBLISHED.guidance_scale
BRANCHES = 2  # without the prompt, and with it
Network = Callable[[Tensor, Tensor], Tensor]  # (2, c, h, w), without the prompt and with it, and timestep -> output


@dataclass(frozen=True)
class Rows:
    """Rows that go through the network: one is one latent, forward or backward.

    Attributes:
        forward: without a graph. graph: forward with one. products: backward, one per test vector.
    """

    forward: int = 0
    graph: int = 0
    products: int = 0

    @property
    def passes(self) -> int:
        return self.forward + self.graph + self.products

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.forward + other.forward, self.graph + other.graph, self.products + other.products)

    def __mul__(self, times: int) -> Rows:
        return Rows(self.forward * times, self.graph * times, self.products * times)


def published_rows(steps: int = STEPS, vectors: int = VECTORS) -> dict[str, Rows]:
    """By map, what the published code runs.

    >>> {name: rows.passes for name, rows in published_rows().items()}
    {'null': 132, 'snapshot': 166, 'score null': 100, 'score snapshot': 200}
    """
    before = Rows(forward=BRANCHES * (steps - 1))
    there, whole = Rows(graph=BRANCHES, products=BRANCHES * vectors), Rows(forward=BRANCHES * steps)
    return {
        "null": before + there,
        "snapshot": before + there * 2,
        "score null": whole,
        "score snapshot": whole * 2,
    }


def all_maps(maps: dict[str, Rows]) -> Rows:
    """Their sum."""
    return sum(maps.values(), Rows())


def counted_leniently(steps: int = STEPS, vectors: int = VECTORS) -> int:
    """A count in the procedure's favour: a backward pass through a batch of two is one, a score map runs one network.

    >>> counted_leniently()
    450
    """
    rows = all_maps(published_rows(steps, vectors))
    return rows.passes - rows.products // BRANCHES - BRANCHES * steps


def shared_rows(steps: int = STEPS, vectors: int = VECTORS) -> Rows:
    """The same four maps from one trajectory, with nothing run twice: now with and without the prompt, and earlier.

    >>> shared_rows().passes
    149
    """
    looks = 3
    return Rows(BRANCHES * (steps - 1), looks, looks * vectors)


def reference_rows(latents: int, vectors: int, branches: int = BRANCHES) -> Rows:
    """memwatch's look at a reference probe; the baseline comes from the ledger.

    Args:
        latents: noisy latents, levels times draws.
    """
    return Rows(graph=latents * branches, products=latents * branches * vectors)


def prompt_rows(latents: int, vectors: int, seeds: int, steps: int, branches: int = BRANCHES) -> Rows:
    """memwatch's look at a prompt probe: generated with guidance, looked at now and under earlier weights."""
    return Rows(forward=BRANCHES * seeds * steps) + reference_rows(latents, vectors, branches) * 2


# --- the procedure itself --------------------------------------------------------------------------------------------


def published_maps(
    now: Network, earlier: Network, solver: Any, x: Tensor, generator: torch.Generator, vectors: int = VECTORS
) -> dict[str, Tensor]:
    """All four maps ``(h, w)``, one after the other, as the published code makes them.

    Args:
        now, earlier: give the network's own output.
        solver: DDIM, with its steps set; it must keep nothing of a trajectory.
        x: initial noise, ``(1, c, h, w)``.
    """

    def curvature(other: Network | None) -> Tensor:
        *before, last = solver.timesteps
        with torch.enable_grad():
            at = _walk([now], solver, x, before)[0].requires_grad_()
            rows = torch.cat([at, at])
            without, prompted = now(rows, last).chunk(BRANCHES)
            other_output = without if other is None else other(rows, last).chunk(BRANCHES)[1]
            difference = prompted - other_output
            total = torch.zeros_like(at)
            for _ in range(vectors):
                v = (torch.randint(2, at.shape, generator=generator).float() * 2 - 1).to(at)
                total += v * torch.autograd.grad(difference, at, v, retain_graph=True)[0]
        return (total / vectors)[0].sum(0).clamp(min=0)

    def score(other: Network | None) -> Tensor:
        networks = [now] if other is None else [now, other]
        outputs = [output.chunk(BRANCHES) for output in _walk(networks, solver, x, solver.timesteps)[1]]
        baseline = outputs[0][0] if other is None else outputs[1][1]
        return (outputs[0][1] - baseline)[0].square().sum(0)

    return {
        "null": curvature(None),
        "snapshot": curvature(earlier),
        "score null": score(None),
        "score snapshot": score(earlier),
    }


@torch.no_grad()
def _walk(
    networks: Sequence[Network], solver: Any, x: Tensor, timesteps: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Where guided sampling by the first network comes to, and the last outputs of all."""
    outputs: list[Tensor] = []
    for t in timesteps:
        rows = torch.cat([x, x])
        outputs = [network(rows, t) for network in networks]
        without, prompted = outputs[0].chunk(BRANCHES)
        x = solver.step(without + GUIDANCE * (prompted - without), t, x).prev_sample
    return x.clone(), outputs
