"""Exact: columns of a small network's Jacobian at fixed noisy latents, and how far estimates of its diagonal are off.

The columns of a pixel are all that an estimate of its diagonal depends on. Once they are known, any estimator can be
run on them for nothing: memwatch's own ``measure`` looks at a network that is nothing but that matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from evidence.old.procedure import reference_rows
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        return reference_rows(levels * self.draws, self.vectors, branches).passes


@dataclass(frozen=True)
class Place:
    """Noisy latents of one item.

    Attributes:
        shape: ``(c, h, w)`` of a latent.
        timesteps: one per level.
        pixels: numbers of those whose columns are known, each with all its channels.
        jacobians: by look, ``(levels, draws, n, c * pixels)`` with ``n = c * h * w``: derivatives of every output, by
            the inputs of ``columns``.
    """

    schedule: NoiseSchedule
    shape: tuple[int, int, int]
    timesteps: tuple[float, ...]
    pixels: Tensor
    jacobians: Mapping[str, Tensor]

    @property
    def draws(self) -> int:
        return next(iter(self.jacobians.values())).shape[1]

    @property
    def columns(self) -> Tensor:
        """The known inputs, channel by channel."""
        return columns_of(self.pixels, self.shape)

    def sigma(self) -> Tensor:
        """``(levels,)``"""
        x = torch.zeros(len(self.timesteps), 1, 1, 1)
        return self.schedule.alpha_sigma(torch.tensor(self.timesteps), x)[1].flatten()

    def exact(self, look: str) -> Tensor:
        """Retained variance, mean over channels: ``(levels, draws, pixels)``."""
        known = self.columns
        return self._mean(self.jacobians[look][:, :, known, torch.arange(len(known))])

    def rademacher(self, look: str, vectors: int, seed: int) -> Tensor:
        """The same, estimated by independent Rademacher vectors; looks share them."""
        jacobian = self.jacobians[look]
        shape = (vectors, *jacobian.shape[:3])
        v = torch.randint(2, shape, generator=seeded("published", seed)).float() * 2 - 1
        products = v[..., self.columns] * torch.einsum("kldi,ldij->kldj", v, jacobian)
        return self._mean(products.mean(0))

    def estimated(self, look: str, design: Design, seed: int) -> Tensor:
        """The same by memwatch, mean over the design's draws: ``(levels, pixels)``; looks share test vectors."""
        network = KnownNetwork(self.jacobians[look][:, : design.draws].flatten(0, 1), self.columns, self.schedule)
        names = torch.arange(len(network.jacobians)).float().reshape(len(self.timesteps), design.draws, 1, 1, 1)
        view = View("exact", names.expand(-1, -1, *self.shape).clone(), self.timesteps, None, {})
        rho = measure(cast(Denoiser, network), view, design.curvature, seed).measured_rho.mean
        return rho.flatten(1)[:, self.pixels]

    def _mean(self, diagonals: Tensor) -> Tensor:
        """Retained variance of diagonals ``(levels, draws, c * pixels)``, mean over channels."""
        rho = 1 - self.sigma()[:, None, None] * diagonals
        return rho.reshape(*rho.shape[:2], self.shape[0], -1).mean(2)


def columns_of(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Numbers of all channels of these pixels among a latent's coordinates, channel by channel."""
    c, h, w = shape
    return (torch.arange(c)[:, None] * h * w + pixels).flatten()


class KnownNetwork:
    """A denoiser whose Jacobian at each noisy latent is given; a latent carries its number in its first coordinate."""

    reuse_graph = True
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, jacobians: Tensor, columns: Tensor, schedule: NoiseSchedule) -> None:
        self.jacobians, self.columns, self.schedule = jacobians, columns, schedule

    def stack(self, items: Sequence[Conditioning]) -> Conditioning:
        return {}

    def __call__(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        number = x.detach()[:, 0, 0, 0].round().long()
        y = (self.jacobians[number] @ x.flatten(1)[:, self.columns, None])[..., 0]
        return y.reshape(x.shape)


def jacobian_columns(fn: Callable[[Tensor], Tensor], x: Tensor, columns: Tensor) -> Tensor:
    """Columns of the Jacobian ``(n, columns)`` of ``fn`` at ``x``, by forward mode: exact up to rounding.

    Args:
        fn: maps ``(b, ...)`` to the same shape, row by row.
        x: one row, ``(1, ...)``.

    >>> jacobian_columns(lambda x: x.square(), torch.tensor([[1.0, 2.0]]), torch.tensor([1])).tolist()
    [[0.0], [4.0]]
    """
    ad: Any = forward_ad  # without annotations
    one_hot = torch.nn.functional.one_hot(columns, x[0].numel()).to(x).reshape(-1, *x.shape[1:])
    with torch.no_grad(), warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), ad.dual_level():
        warnings.filterwarnings("ignore", message=".*torch.jit.script")  # torch's own use of it
        rows = x.expand_as(one_hot).contiguous()
        tangents: Tensor = ad.unpack_dual(fn(ad.make_dual(rows, one_hot))).tangent
    return tangents.flatten(1).T.contiguous()


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
        found = design_off(place, look, design)
        return found.mean(1) if pooled else found

    return _squares({look: off(look) for look in (NOW, *DIFFERENCES) if look in place.jacobians})


def design_off(place: Place, look: str, design: Design, repeats: int = REPEATS) -> Tensor:
    """Estimate minus exact, mean over the design's draws: ``(repeats, levels, pixels)``."""
    exact = place.exact(look)[:, : design.draws].mean(1)
    return torch.stack([place.estimated(look, design, seed) - exact for seed in range(repeats)])


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
