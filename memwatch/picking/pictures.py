"""Pictures: decoded from whatever a row holds, and cut to the square that training sees."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


def decoded(raw: Any, side: int | None = None) -> Image.Image:
    """RGB picture of what a row holds, turned as its EXIF data say.

    Args:
        raw: a file, its bytes, a PIL picture, an array or tensor (uint8, or floats in [0, 1] or [-1, 1]; channels last
            or first), or nested lists of such numbers.
        side: a smaller picture will do, if its shorter side has at least this many pixels: JPEG files are then decoded
            at a half, a quarter or an eighth.

    Raises:
        Exception: whatever reading it raises; ``ValueError`` when it is nothing of the above.
    """
    if isinstance(raw, str | Path | bytes):
        with Image.open(BytesIO(raw) if isinstance(raw, bytes) else raw) as picture:
            if side is not None:
                picture.draft("RGB", (side, side))
            return ImageOps.exif_transpose(picture).convert("RGB")
    if isinstance(raw, Image.Image):
        return ImageOps.exif_transpose(raw).convert("RGB")
    if isinstance(raw, np.ndarray | torch.Tensor | list):
        return Image.fromarray(_pixels(raw)).convert("RGB")
    raise ValueError(f"a {type(raw).__name__} is no image")


def square(picture: Image.Image, side: int) -> Image.Image:
    """The middle square, ``side`` pixels wide, as training scripts resize the short side and crop."""
    short = min(picture.size)
    left, top = (picture.width - short) / 2, (picture.height - short) / 2
    box = (left, top, left + short, top + short)
    return picture.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)


def _pixels(raw: Any) -> np.ndarray:
    """uint8 ``(H, W)`` or ``(H, W, 3)`` of an array, tensor or list."""
    values = raw.detach().cpu().numpy() if isinstance(raw, torch.Tensor) else np.asarray(raw)
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[-1] not in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 2 and values.shape[2:] != (3,):
        raise ValueError(f"numbers of shape {values.shape} are no image")
    if not np.isfinite(values).all():
        raise ValueError("numbers that are not finite are no image")
    if np.issubdtype(values.dtype, np.floating):
        values = (values + 1) * 127.5 if values.min() < 0 else values * 255
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
