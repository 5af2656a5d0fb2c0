"""Prepare: read and encode every probe once, before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memwatch.denoiser import Components, Conditioning, Denoiser
from memwatch.measure.images import encode_images, read_image
from memwatch.measure.probes import Probe, ProbeError
from memwatch.measure.shelf import shelved


@dataclass(frozen=True)
class PreparedProbe:
    """A probe ready to be looked at.

    Attributes:
        conditioning: of its prompt.
        image: RGB uint8 ``(H, W, 3)``; ``None`` for a prompt probe.
        latents: z_0, ``(c, h, w)`` float32 on the CPU; ``None`` for a prompt probe.
    """

    probe: Probe
    conditioning: Conditioning
    image: np.ndarray | None
    latents: Tensor | None

    @property
    def name(self) -> str:
        return self.probe.name


def named_as_controls(probes: Sequence[Probe]) -> list[Probe]:
    """The same probes as controls. The prefix ``control/`` keeps their names apart from those of the watched probes."""
    return [replace(probe, name=f"control/{probe.name}", is_control=True) for probe in probes]


def named_as_peers(probes: Sequence[Probe]) -> list[Probe]:
    """The same probes as peers, under the prefix ``peer/``."""
    return [replace(probe, name=f"peer/{probe.name}", is_peer=True) for probe in probes]


def prepare(
    probes: Sequence[Probe], denoiser: Denoiser, components: Components, resolution: int
) -> list[PreparedProbe]:
    """Encode every prompt and image.

    Args:
        resolution: side of the images, pixels.

    Raises:
        ProbeError: an image cannot be read, or the VAE has no finite latents of it.
    """
    return [_prepared(probe, denoiser, components, resolution) for probe in probes]


def _prepared(probe: Probe, denoiser: Denoiser, components: Components, resolution: int) -> PreparedProbe:
    denoiser.warn_if_cut(probe.prompt, components)
    conditioning = denoiser.encode(probe.prompt, components, resolution)
    if not probe.is_reference:
        return PreparedProbe(probe, conditioning, None, None)
    image = read_image(probe, resolution)
    latents = encode_images([image], components.vae)[0]
    if not latents.isfinite().all():
        raise ProbeError(f"probe {probe.name!r}: the VAE gives latents that are not finite; pass it in float32")
    return PreparedProbe(probe, conditioning, image, latents)


def on_shelf(prepared: Sequence[PreparedProbe], folder: Path) -> list[PreparedProbe]:
    """The same probes, with what is encoded of them on disk, see ``shelved``.

    A picture that came in memory is held no longer: its pixels are in ``image``, and the probe keeps a word for it.
    """
    tensors: dict[str, Tensor] = {}
    for i, p in enumerate(prepared):
        tensors |= {f"{i}/conditioning/{key}": tensor for key, tensor in p.conditioning.items()}
        tensors |= {} if p.image is None else {f"{i}/image": torch.from_numpy(p.image.copy())}
        tensors |= {} if p.latents is None else {f"{i}/latents": p.latents}
    kept = shelved(tensors, folder)

    def from_shelf(i: int, p: PreparedProbe) -> PreparedProbe:
        in_memory = isinstance(p.probe.image, Image.Image)
        return PreparedProbe(
            replace(p.probe, image=f"picture of {p.name}") if in_memory else p.probe,
            {key: kept[f"{i}/conditioning/{key}"] for key in p.conditioning},
            None if p.image is None else kept[f"{i}/image"].numpy(),
            None if p.latents is None else kept[f"{i}/latents"],
        )

    return [from_shelf(i, p) for i, p in enumerate(prepared)]
