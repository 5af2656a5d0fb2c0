"""Images: read from disk, to latents, and back to pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from memwatch.measure.probes import Probe, ProbeError

logger = logging.getLogger("memwatch")


def read_image(probe: Probe, resolution: int) -> np.ndarray:
    """The probe's image as RGB uint8 ``(resolution, resolution, 3)``.

    The short side is resized and the middle is cropped, as training scripts do.

    Raises:
        ProbeError: the file is missing or is no image.
    """
    try:
        picture = probe.image if isinstance(probe.image, Image.Image) else Image.open(str(probe.image))
        picture = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError on some broken files
        raise ProbeError(f"probe {probe.name!r}: cannot read image {str(probe.image)!r}: {error}") from error
    if picture.size != (resolution, resolution):
        size = f"{picture.width}x{picture.height}"
        logger.warning("probe %r: image of %s px is resized and cropped to %d px", probe.name, size, resolution)
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
    """z_0 of RGB uint8 images, scaled as the denoiser expects: ``(n, c, h, w)`` float32 on the CPU.

    It is the posterior's mode, so there is no randomness. Without a VAE it is the pixels in [-1, 1].
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
