"""Prepare: read and encode every probe once, before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memwatch.denoiser import Components, Conditioning, Denoiser
from memwatch.measure.disk_offload import shelved
from memwatch.measure.images import cropped, encode_images, read_image
from memwatch.measure.probes import Probe, ProbeError

logger = logging.getLogger("memwatch")


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
    probes: Sequence[Probe], denoiser: Denoiser, components: Components, resolution: int, *, says: bool = True
) -> list[PreparedProbe]:
    """Encode every prompt and image.

    Args:
        resolution: side of the images, pixels.
        says: whether this process, one of several, says which prompts are cut and how many images are resized.

    Raises:
        ProbeError: an image cannot be read, or the VAE has no finite latents of it.
    """
    resized: list[str] = []
    prepared = [_prepared(probe, denoiser, components, resolution, says, resized) for probe in probes]
    if says and resized:
        images = f"{len(resized)} of {sum(probe.is_reference for probe in probes)} images"
        logger.warning("memwatch: %s are resized and cropped to %d px, first %s", images, resolution, resized[0])
    return prepared


def _prepared(
    probe: Probe, denoiser: Denoiser, components: Components, resolution: int, says: bool, resized: list[str]
) -> PreparedProbe:
    """One of them; where its image has another size, ``resized`` grows."""
    if says:
        denoiser.warn_if_cut(probe.prompt, components)
    conditioning = denoiser.encode(probe.prompt, components, resolution)
    if not probe.is_reference:
        return PreparedProbe(probe, conditioning, None, None)
    picture = read_image(probe)
    if picture.size != (resolution, resolution):
        resized.append(f"that of {probe.name!r}, {picture.width}x{picture.height} px")
    image = cropped(picture, resolution)
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
        in_memory = p.probe.is_reference and not isinstance(p.probe.image, str | Path)
        return PreparedProbe(
            replace(p.probe, image=f"picture of {p.name}") if in_memory else p.probe,
            {key: kept[f"{i}/conditioning/{key}"] for key in p.conditioning},
            None if p.image is None else kept[f"{i}/image"].numpy(),
            None if p.latents is None else kept[f"{i}/latents"],
        )

    return [from_shelf(i, p) for i, p in enumerate(prepared)]
