"""Exact: whole Jacobians of a small network at fixed noisy latents, and how far estimates of their diagonal are off.

Once a Jacobian is known, any estimator can be run on it for nothing: memwatch's own ``measure`` looks at a network that
is nothing but that matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from memwatch.config import CurvatureConfig
from memwatch.denoiser import Conditioning, Denoiser
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.measure import measure
from memwatch.measure.views import View, seeded

NOW, NULL, BASE = "now", "null", "base"  # with the prompt, without it, the earlier model with it
DIFFERENCES = (BASE, NULL)  # each less ``now`` is a map
REPEATS = 8  # sets of test vectors
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Design:
    """Noise draws of a level, and test vectors of each; all of a level are one block unless ``tile`` says otherwise."""

    draws: int
    vectors: int
    tile: int | None = None

    @property
    def curvature(self) -> CurvatureConfig:
        return CurvatureConfig(vectors=self.vectors, tile=self.tile or self.draws * self.vectors)

    def passes(self, levels: int, branches: int = 2) -> int:
        """Of one look at so many levels."""
        return levels * self.draws * branches * (1 + self.vectors)


@dataclass(frozen=True)
class Place:
    """Noisy latents of one item.

    Attributes:
        shape: ``(c, h, w)`` of a latent.
        timesteps: one per level.
        jacobians: by look, ``(levels, draws, n, n)`` with ``n = c * h * w``; row i is the derivative of output i.
    """

    schedule: NoiseSchedule
    shape: tuple[int, int, int]
    timesteps: tuple[float, ...]
    jacobians: Mapping[str, Tensor]

    @property
    def draws(self) -> int:
        return next(iter(self.jacobians.values())).shape[1]

    def sigma(self) -> Tensor:
        """``(levels,)``"""
        x = torch.zeros(len(self.timesteps), 1, 1, 1)
        return self.schedule.alpha_sigma(torch.tensor(self.timesteps), x)[1].flatten()

    def exact(self, look: str) -> Tensor:
        """Retained variance, mean over channels: ``(levels, draws, h, w)``."""
        return self._map(self.jacobians[look].diagonal(dim1=-2, dim2=-1))

    def rademacher(self, look: str, vectors: int, seed: int) -> Tensor:
        """The same, estimated by independent Rademacher vectors; looks share them."""
        jacobian = self.jacobians[look]
        shape = (vectors, *jacobian.shape[:3])
        v = torch.randint(2, shape, generator=seeded("published", seed)).float() * 2 - 1
        products = v * torch.einsum("kldi,ldij->kldj", v, jacobian)
        return self._map(products.mean(0))

    def estimated(self, look: str, design: Design, seed: int) -> Tensor:
        """The same by memwatch, mean over the design's draws: ``(levels, h, w)``; looks share test vectors."""
        network = KnownNetwork(self.jacobians[look][:, : design.draws].flatten(0, 1), self.schedule)
        names = torch.arange(len(network.jacobians)).float().reshape(len(self.timesteps), design.draws, 1, 1, 1)
        view = View("exact", names.expand(-1, -1, *self.shape).clone(), self.timesteps, None, {})
        return measure(cast(Denoiser, network), view, design.curvature, seed).measured_rho.mean

    def _map(self, diagonals: Tensor) -> Tensor:
        """Retained variance of diagonals ``(levels, draws, n)``."""
        rho = 1 - self.sigma()[:, None, None] * diagonals
        return rho.reshape(*rho.shape[:2], *self.shape).mean(2)


class KnownNetwork:
    """A denoiser whose Jacobian at each noisy latent is given; a latent carries its number in its first coordinate."""

    reuse_graph = True
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, jacobians: Tensor, schedule: NoiseSchedule) -> None:
        self.jacobians, self.schedule = jacobians, schedule

    def stack(self, items: Sequence[Conditioning]) -> Conditioning:
        return {}

    def __call__(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        number = x.detach()[:, 0, 0, 0].round().long()
        y = (self.jacobians[number] @ x.flatten(1)[..., None])[..., 0]
        return y.reshape(x.shape)


def jacobians(fn: Callable[[Tensor], Tensor], x: Tensor, tick: Callable[[], object] = lambda: None) -> Tensor:
    """Whole Jacobians ``(b, n, n)`` of ``fn`` at rows ``x`` that do not mix, by one backward pass per coordinate.

    >>> jacobians(lambda x: x.square(), torch.tensor([[[[1.0, 2.0]]]]))[0].tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        outputs = fn(x).flatten(1).sum(0)
        rows = []
        for i in range(len(outputs)):
            (row,) = torch.autograd.grad(outputs[i], x, retain_graph=i < len(outputs) - 1)
            rows.append(row.flatten(1))
            tick()
    return torch.stack(rows, dim=1)


# --- errors ----------------------------------------------------------------------------------------------------------


def published_error(place: Place, vectors: int) -> np.ndarray:
    """Mean squared error of the two difference maps at one noisy latent, over levels, pixels and repeats: ``(2,)``."""
    found = {
        look: torch.stack([place.rademacher(look, vectors, seed) - place.exact(look) for seed in range(REPEATS)])
        for look in (NOW, *DIFFERENCES)
        if look in place.jacobians
    }
    return _squares(found)


def design_error(place: Place, design: Design, pooled: bool) -> np.ndarray:
    """The same for memwatch, against the exact map of the same noisy latents.

    Args:
        pooled: the map is the mean over the levels; otherwise every level is one.
    """

    def off(look: str) -> Tensor:
        exact = place.exact(look)[:, : design.draws].mean(1)
        found = torch.stack([place.estimated(look, design, seed) - exact for seed in range(REPEATS)])
        return found.mean(1) if pooled else found

    return _squares({look: off(look) for look in (NOW, *DIFFERENCES) if look in place.jacobians})


def _squares(off: Mapping[str, Tensor]) -> np.ndarray:
    maps = [off[look] - off[NOW] for look in DIFFERENCES if look in off]
    return np.array([float(m.square().mean()) for m in maps])


def smallest(errors: Mapping[Any, np.ndarray], target: np.ndarray, costs: Mapping[Any, float]) -> Any | None:
    """The cheapest design whose error is not above the target on any map; ``None`` where none is good enough.

    Args:
        errors: by design, mean squares ``(items, maps)``. target: the same.

    >>> one, two = np.array([[4.0]]), np.array([[1.0]])
    >>> smallest({"one": one, "two": two}, np.array([[2.0]]), {"one": 1, "two": 2})
    'two'
    """
    wanted = target.mean(0)
    good = [design for design, error in errors.items() if (error.mean(0) <= wanted).all()]
    return min(good, key=lambda design: costs[design]) if good else None


def bootstrap(items: int, statistic: Callable[[np.ndarray], float | None], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a statistic of item numbers drawn with replacement; ``None`` where it often has no value."""
    rng = np.random.default_rng(seed)
    found = [statistic(rng.integers(0, items, items)) for _ in range(BOOTSTRAPS)]
    values = [value for value in found if value is not None]
    if len(values) < 0.975 * len(found):
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
