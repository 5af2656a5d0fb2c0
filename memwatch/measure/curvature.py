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


def colours(shape: tuple[int, int, int], num: int) -> Tensor:
    """Colours in ``0..num - 1``, a power of two, of coordinates ``(c, h, w)``: those of one colour lie far apart.

    Bit by bit: a checkerboard, then its rows, then a checkerboard twice as coarse, and so on (hierarchical probing,
    Stathopoulos, Laeuchli & Orginos 2013): pixels of one colour are ``sqrt(num)`` apart, and the colours of a smaller
    ``num`` are the low bits of a larger one. Every channel shifts the colours (exclusive or), so that a pixel's
    channels differ too. Bits after the channel's own are exclusive ors of earlier ones, or another channel's next pixel
    would keep its colour.

    >>> colours((1, 4, 4), 4)[0].tolist()
    [[0, 1, 0, 1], [3, 2, 3, 2], [0, 1, 0, 1], [3, 2, 3, 2]]
    """
    channel, row, column = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    depth = max(2, (shape[0] - 1).bit_length())
    shift = [channel >> k & 1 for k in range(depth)]
    colour = torch.zeros(shape, dtype=torch.long)
    for k in range(num.bit_length() - 1):
        pixel = (row if k % 2 else row ^ column) >> k // 2
        colour |= ((pixel ^ shift[k]) & 1) << k
        shift.append(shift[k] ^ shift[k + 1])
    return colour


def test_vectors(num: int, shape: tuple[int, int, int], generator: torch.Generator, *, tile: int = 1) -> Tensor:
    """Test vectors ``(num, c, h, w)`` of entries +1 and -1, float32 on the CPU, in independent blocks of ``tile``.

    Vector k of a block is ``v_k[i] = s[i] * H[k, colour[i]]``: one random sign s per coordinate, rows of a Hadamard
    matrix H, and the colours of ``colours``. Then ``sum_k v_k[i] v_k[j] = 0`` wherever the colours of i and j differ:
    in the mean over a block such pairs cancel, and these near neighbours are most of the error, as Jacobians decay with
    distance. The signs keep every single product unbiased. ``tile = 1`` gives independent Rademacher vectors.

    The first vectors of a block, a power of two of them, are a smaller block themselves; the last block may be cut
    short. ``tile`` must be a power of two, else it is a ``ValueError``.
    """
    if tile < 1 or tile & (tile - 1):
        raise ValueError(f"tile must be a power of two, got {tile}")
    signs = torch.randint(2, (-(-num // tile), 1, *shape), generator=generator).float() * 2 - 1
    pattern = torch.from_numpy(hadamard(tile)).float()[:, colours(shape, tile)]
    return (signs * pattern).reshape(-1, *shape)[:num]


test_vectors.__test__ = False  # type: ignore[attr-defined]  # a name of the field, not a pytest test


def value_and_diag_jacobian(
    fn: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor, *, reuse_graph: bool = True
) -> tuple[Tensor, Tensor]:
    """``fn(x)`` and, for every test vector v, the products ``v * (J^T v)``: their mean estimates ``diag(J)``.

    Args:
        fn: maps ``(b, ...)`` to the same shape; row i of its output depends on row i of ``x`` only.
        x: shape ``(b, ...)``. Not modified; gradients are kept out of every ``.grad``.
        vectors: ``(K, b, ...)``, as the products are. Shapes that do not fit are a ``ValueError``.
        reuse_graph: call ``fn`` once and go back through it for every vector. False calls it once per vector, as FSDP1
            and ZeRO-3 need: they free the gathered parameters after the first backward pass.

    >>> v = test_vectors(1, (1, 2, 2), torch.Generator().manual_seed(0))
    >>> value_and_diag_jacobian(lambda x: 3 * x, torch.zeros(1, 1, 2, 2), v[:, None])[1].unique()
    tensor([3.])
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


@dataclass(frozen=True)
class CurvatureMap:
    """A map estimated by n replicates ``(..., n, h, w)``: its mean and the standard error of that mean.

    Replicates are independent, or parts of one block of test vectors; there errors cancel between them, and the
    standard error is an upper bound. The difference of two maps made with the same test vectors is taken replicate by
    replicate: its error is *paired*, and a map minus itself is exactly zero.

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

    def smooth(self, size: int) -> CurvatureMap:
        """Mean over ``size x size`` neighbours (odd), fewer at the border. Each replicate by itself, so errors stay."""
        flat = self.samples.reshape(-1, 1, *self.samples.shape[-2:])
        pooled = torch.nn.functional.avg_pool2d(flat, size, stride=1, padding=size // 2, count_include_pad=False)
        return CurvatureMap(pooled.reshape(self.samples.shape))
