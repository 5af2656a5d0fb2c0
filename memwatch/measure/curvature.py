"""Diagonal of a Jacobian by Hutchinson's estimator, and maps that carry their error. Knows nothing of diffusion.

``diag(J) = E[v * (J^T v)]`` for test vectors with ``E[v v^T] = 1`` (Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007).
Reverse mode only: one forward pass, then one vector-Jacobian product per test vector. ``J`` need not be symmetric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.linalg import hadamard
from torch import Tensor


def test_vectors(num: int, shape: tuple[int, int, int], generator: torch.Generator, *, tile: int = 1) -> Tensor:
    """Test vectors of entries +1 and -1.

    ``tile = 1`` gives independent Rademacher vectors. ``tile = K`` gives blocks of K vectors that are orthogonal over
    every group of K neighbouring coordinates (all channels first, then columns, then rows), from the rows of a Hadamard
    matrix times one random sign per coordinate and block. Jacobians of convolutional networks decay with distance, so
    the cancelled neighbours were most of the error; the random signs keep the estimate unbiased.

    Args:
        num: how many; a multiple of ``tile``.
        shape: ``(c, h, w)``.
        generator: CPU generator; the same state gives the same vectors on every device.
        tile: a power of two.

    Returns:
        Shape ``(num, c, h, w)``, float32, on the CPU. Consecutive blocks of ``tile`` vectors are independent of each
        other.

    Raises:
        ValueError: ``tile`` is no power of two, or does not divide ``num``.

    >>> v = test_vectors(4, (4, 8, 8), torch.Generator().manual_seed(0), tile=4)
    >>> one_pixel = v[:, :, 0, 0]
    >>> torch.equal(one_pixel.T @ one_pixel, 4 * torch.eye(4))
    True
    """
    if tile < 1 or tile & (tile - 1) or num % tile:
        raise ValueError(f"tile must be a power of two that divides the number of test vectors ({num}), got {tile}")
    c, h, w = shape
    signs = torch.randint(2, (num // tile, 1, c, h, w), generator=generator).float() * 2 - 1
    depth = min(tile, 1 << (c - 1).bit_length())  # channels, rounded up to a power of two
    across = 1 << ((tile // depth).bit_length() // 2)  # columns of a tile; at least as many as rows
    down = tile // depth // across
    channel, row, column = torch.meshgrid(torch.arange(c), torch.arange(h), torch.arange(w), indexing="ij")
    index = channel % depth + depth * (column % across) + depth * across * (row % down)
    pattern = torch.from_numpy(hadamard(tile)).float()[:, index]
    return (signs * pattern).reshape(num, c, h, w)


test_vectors.__test__ = False  # type: ignore[attr-defined]  # a name of the field, not a pytest test


def value_and_diag_jacobian(
    fn: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor, *, reuse_graph: bool = True
) -> tuple[Tensor, Tensor]:
    """``fn(x)`` and, for every test vector v, the products ``v * (J^T v)``: their mean estimates ``diag(J)``.

    Args:
        fn: maps ``(b, ...)`` to the same shape; row i of its output depends on row i of ``x`` only.
        x: shape ``(b, ...)``, floating point. Not modified; gradients are kept out of every ``.grad``.
        vectors: shape ``(K, b, ...)``.
        reuse_graph: call ``fn`` once and go back through it for every vector. False calls it once per vector, as FSDP1
            and ZeRO-3 need: they free the gathered parameters after the first backward pass.

    Returns:
        ``fn(x)`` detached, and products of shape ``(K, b, ...)``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if vectors.shape[1:] != x.shape:
        raise ValueError(f"vectors must have shape (K, {', '.join(map(str, x.shape))}), got {tuple(vectors.shape)}")
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = fn(x.view_as(x))  # a view, because FSDP1's hooks on frozen layers refuse a leaf
        if y.shape != x.shape:
            raise ValueError(f"fn must return the shape of its input {tuple(x.shape)}, got {tuple(y.shape)}")
        products = []
        for k, v in enumerate(vectors):
            output = y if reuse_graph or k == 0 else fn(x.view_as(x))
            products.append(v * torch.autograd.grad(output, x, v, retain_graph=reuse_graph and k < len(vectors) - 1)[0])
    return y.detach(), torch.stack(products)


def diag_jacobian(fn: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor) -> Tensor:
    """Hutchinson products ``v * (J^T v)``, shape ``(K, b, ...)``; see ``value_and_diag_jacobian``.

    >>> v = test_vectors(1, (1, 2, 2), torch.Generator().manual_seed(0))
    >>> diag_jacobian(lambda x: 3 * x, torch.zeros(1, 1, 2, 2), v[:, None]).unique()
    tensor([3.])
    """
    return value_and_diag_jacobian(fn, x, vectors)[1]


@dataclass(frozen=True)
class CurvatureMap:
    """A map estimated by independent replicates: its mean and the standard error of that mean.

    Attributes:
        samples: shape ``(..., n, h, w)``; the n replicates are independent given the input.

    The difference of two maps made with the same test vectors is taken replicate by replicate: its error is *paired*,
    and a map minus itself is exactly zero.

    >>> one = CurvatureMap(torch.tensor([0.25, 0.75]).reshape(2, 1, 1))
    >>> one.mean.item(), one.sem.item(), (one - one).sem.item()
    (0.5, 0.25, 0.0)
    """

    samples: Tensor

    @property
    def mean(self) -> Tensor:
        """Shape ``(..., h, w)``."""
        return self.samples.mean(-3)

    @property
    def sem(self) -> Tensor:
        """Standard error of the mean, shape ``(..., h, w)``; infinite for a single replicate."""
        n = self.samples.shape[-3]
        if n == 1:
            return torch.full_like(self.mean, torch.inf)
        error: Tensor = self.samples.std(-3) / n**0.5
        return error

    def __sub__(self, other: CurvatureMap) -> CurvatureMap:
        return CurvatureMap(self.samples - other.samples)

    def first_replicates(self, n: int) -> CurvatureMap:
        """The first n replicates."""
        return CurvatureMap(self.samples[..., :n, :, :])

    def repeated(self, n: int) -> CurvatureMap:
        """The same mean and standard error in n replicates, so that maps of unlike n can be joined.

        Args:
            n: a multiple of what there is.

        Raises:
            ValueError: n is no such multiple, or a single replicate is to become several (its error is unknown).
        """
        k = self.samples.shape[-3]
        if n == k:
            return self
        if n % k or k < 2:
            raise ValueError(f"{k} replicates cannot be repeated to {n}")
        mean = self.samples.mean(-3, keepdim=True)
        deviations = (self.samples - mean) * ((n - 1) / (k - 1)) ** 0.5
        return CurvatureMap((mean + deviations).repeat_interleave(n // k, dim=-3))

    def smooth(self, size: int) -> CurvatureMap:
        """Mean over ``size x size`` neighbours (odd), fewer at the border. Each replicate by itself, so errors stay."""
        flat = self.samples.reshape(-1, 1, *self.samples.shape[-2:])
        pooled = torch.nn.functional.avg_pool2d(flat, size, stride=1, padding=size // 2, count_include_pad=False)
        return CurvatureMap(pooled.reshape(self.samples.shape))
