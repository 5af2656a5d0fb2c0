"""Images: read from whatever holds them, to latents, and back to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from memwatch.measure.captions import ProbeError
from memwatch.measure.probes import Probe

DEEP = ("I", "F")  # beginnings of PIL's modes with more than 8 bits, which its own conversion cuts off at 255
OVER = 0.1  # floats may lie so far beyond [0, 1] and [-1, 1], as resizing leaves them


def decoded(raw: Any, side: int | None = None) -> Image.Image:
    """RGB picture of what a row holds, turned as its EXIF data say.

    Numbers are read by their type: uint8 as it is, bool as black and white, uint16 over its 65,536 levels. Other whole
    numbers are levels up to 255, or up to 65,535 where one of them is larger. Floats lie in [0, 1]; in [-1, 1] where
    any is negative, as training scripts normalise; and are levels up to 255 where any is above 1.1. PIL pictures of 16
    and 32 bits are such numbers, too.

    Args:
        raw: a file, its bytes, a PIL picture, an array or tensor (channels last or first), or nested lists of numbers;
            anything else is a ``ValueError``. Reading a file may raise anything.
        side: pixels that the shorter side must have at least; JPEG files may then be decoded at a half or less.
    """
    if isinstance(raw, str | Path | bytes):
        with Image.open(BytesIO(raw) if isinstance(raw, bytes) else raw) as picture:
            if side is not None:
                picture.draft("RGB", (side, side))
            return decoded(picture)
    if isinstance(raw, Image.Image):
        turned = ImageOps.exif_transpose(raw)
        deep = turned.mode.startswith(DEEP)
        return (Image.fromarray(_levels(np.asarray(turned))) if deep else turned).convert("RGB")
    if not isinstance(raw, np.ndarray | Tensor | list):
        raise ValueError(f"a {type(raw).__name__} is no image")
    if isinstance(raw, Tensor):
        raw = (raw.float() if raw.is_floating_point() else raw).detach().cpu()  # numpy has no bfloat16
    values = np.asarray(raw)
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[-1] not in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 2 and values.shape[2:] != (3,):
        raise ValueError(f"numbers of shape {values.shape} are no image")
    return Image.fromarray(_levels(values)).convert("RGB")


def _levels(values: np.ndarray) -> np.ndarray:
    """uint8 levels of numbers of any type, see ``decoded``."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind not in "buif" or not np.isfinite(values).all():
        raise ValueError(f"numbers that are not finite, or of type {values.dtype}, are no image")
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if kind == "b":
        scaled = values * 255.0
    elif kind == "f" and -1 - OVER <= low < 0 and high <= 1 + OVER:
        scaled = (values + 1) * 127.5
    elif kind == "f" and low >= 0 and high <= 1 + OVER:
        scaled = values * 255
    elif kind in "ui" and (values.dtype.newbyteorder("=") == np.uint16 or (low >= 0 and 255 < high <= 65535)):
        scaled = values / 257
    elif low >= 0 and high <= 255:
        scaled = values
    else:
        allowed = "whole numbers in 0..255 or 0..65535, floats in [0, 1], [-1, 1] or [0, 255]"
        raise ValueError(f"numbers of type {values.dtype} from {low:g} to {high:g} are no image; allowed: {allowed}")
    levels: np.ndarray = np.clip(np.round(scaled), 0, 255).astype(np.uint8)
    return levels


def read_image(probe: Probe) -> Image.Image:
    """The probe's image, RGB, see ``decoded``; a ``ProbeError`` where it cannot be read."""
    try:
        return decoded(probe.image)
    except Exception as error:  # PIL has its own for broken, cut off and huge files, some of them no OSError
        what = str(probe.image) if isinstance(probe.image, str | Path) else f"a {type(probe.image).__name__}"
        why = str(error) or type(error).__name__
        raise ProbeError(f"probe {probe.name!r}: cannot read image {what!r}: {why}") from error


def cropped(picture: Image.Image, resolution: int) -> np.ndarray:
    """RGB uint8 ``(resolution, resolution, 3)``: the short side resized and the middle cropped, as scripts do."""
    if picture.size != (resolution, resolution):
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return np.asarray(picture)


def to_pixels(images: Sequence[np.ndarray]) -> Tensor:
    """RGB uint8 images as an autoencoder takes them: ``(n, 3, H, W)`` float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def encode_images(images: Sequence[np.ndarray], vae: Any) -> Tensor:
    """z_0 of RGB uint8 images, the posterior's mode, scaled as the denoiser expects: ``(n, c, h, w)`` float32, CPU.

    Without a VAE it is the pixels in [-1, 1].
    """
    pixels = to_pixels(images).contiguous()  # kernels, and with them rounding, depend on the memory format
    if vae is None:
        return pixels
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    latents: Tensor = ((mode - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor).float()
    return latents.cpu()


@torch.no_grad()
def decode_latents(latents: Tensor, vae: Any) -> np.ndarray:
    """RGB uint8 ``(H, W, 3)`` of ``latents`` ``(c, h, w)``. Without a VAE they are pixels in [-1, 1]."""
    pixels = latents
    if vae is not None:
        shift = getattr(vae.config, "shift_factor", None) or 0
        z = latents[None].to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
        pixels = vae.decode(z).sample[0].float()
    result: np.ndarray = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return result
