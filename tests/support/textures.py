"""Pictures with something to recognize everywhere."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter


def textures(count: int, seed: int = 0) -> np.ndarray:
    """Blurred noise, uint8 ``(count, 64, 64, 3)``: something to recognize everywhere."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((count, 64, 64, 3)), (0, 2, 2, 0))
    return (128 + 40 * noise / noise.std()).clip(0, 255).astype(np.uint8)
