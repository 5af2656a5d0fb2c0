"""Prepare: before training, put the model behind one signature, and read and encode every probe once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memwatch.config import MemWatchConfig, require
from memwatch.denoiser import Components, Conditioning, Denoiser, dtype_of, family_of, load_components
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.captions import ProbeError
from memwatch.measure.images import cropped, encode_images, read_image
from memwatch.measure.lora_off import why_not_base
from memwatch.measure.probes import Probe
from memwatch.measure.weights import kept_on_disk
from memwatch.ranks import Ranks

logger = logging.getLogger("memwatch")

NO_PROMPT = "/no prompt"  # stands for the unconditional branch among the names of probes


def adapt(
    model: nn.Module,
    forward_module: nn.Module,
    pretrained: Any,
    given: Components,
    config: MemWatchConfig,
    ranks: Ranks,
    has_prompts: bool,
) -> tuple[Denoiser, Components, int, int]:
    """The model behind one signature, the parts of its pipeline, and the side of the images and of the latents.

    A setting that does not fit the bare ``model`` or the way it lies on the ranks is a ``ConfigError``.
    """
    allowed = "variance with prompt probes and sampling.look: last_step, where the true noise is unknown"
    ok = config.signals.terms != "loss" or config.sampling.look == "generation" or not has_prompts
    require(ok, "signals.terms", config.signals.terms, allowed)
    ranks.require(config, has_prompts)
    family = family_of(model)
    with ranks.unpartitioned():
        parts = load_components(
            pretrained,
            given,
            needs_vae=not family.in_pixels,
            text_encoders=family.text_encoders,
            optional=family.optional,
            device=ranks.accelerator.device,
            dtype=dtype_of(model),
        )
    denoiser = family(model, NoiseSchedule.from_scheduler(parts.scheduler))
    denoiser.model, denoiser.reuse_graph = forward_module, ranks.reuse_graph
    denoiser.precision = ranks.mixed_precision if config.precision == "loop" else nullcontext
    last, timesteps = denoiser.schedule.num_train_timesteps - 1, config.levels.timesteps
    require(max(timesteps) <= last, "levels.timesteps", timesteps, f"timesteps up to {last}")
    scale = 2 ** (len(parts.vae.config.block_out_channels) - 1) if parts.vae is not None else 1
    resolution, unit = config.resolution or (denoiser.sample_size or 0) * scale, scale * denoiser.patch
    ok = resolution > 0 and resolution % unit == 0
    require(ok, "resolution", config.resolution, f"a multiple of {unit} (the model names no size)")
    return denoiser, parts, resolution, resolution // scale


def require_of_model(config: MemWatchConfig, model: nn.Module, text_encoders: Sequence[Any], ema: Any) -> None:
    """Refuse (``ConfigError``) the base where switching LoRA off does not give it, and averages that there are not."""
    weights, baseline = config.weights, config.signals.baseline
    why = why_not_base((model, *text_encoders)) if baseline == "base" else None
    require(why is None, "signals.baseline", baseline, f"first or another one, since {why}")
    require(ema is not None or weights == "live", "weights", weights, "live, since no ema was passed")
    averaged = len(ema.shadow_params) if weights == "ema" else 0
    sizes = {len(list(model.parameters())), sum(p.requires_grad for p in model.parameters())}
    has = f"the EMA averages {averaged} tensors and the model has {' or '.join(map(str, sizes))}"
    require(weights == "live" or averaged in sizes, "weights", weights, f"live, since {has}")


@dataclass(frozen=True)
class PreparedProbe:
    """A probe with its prompt encoded; of a reference probe with its image, RGB uint8 ``(H, W, 3)``, and latents.

    The latents are z_0, ``(c, h, w)`` float32 on the CPU.
    """

    probe: Probe
    conditioning: Conditioning
    image: np.ndarray | None
    latents: Tensor | None

    @property
    def name(self) -> str:
        return self.probe.name


def prepare(
    probes: Sequence[Probe], denoiser: Denoiser, components: Components, resolution: int, *, says: bool = True
) -> list[PreparedProbe]:
    """Encode every prompt and image; one that cannot be is a ``ProbeError``. ``resolution``: side of images, pixels.

    ``says``: whether this process, one of several, says which prompts are cut and how many images are resized.
    """
    resized: list[str] = []
    prepared: list[PreparedProbe] = []
    for probe in probes:
        if says:
            denoiser.warn_if_cut(probe.prompt, components)
        conditioning = denoiser.encode(probe.prompt, components, resolution)
        if not probe.is_reference:
            prepared.append(PreparedProbe(probe, conditioning, None, None))
            continue
        picture = read_image(probe)
        if picture.size != (resolution, resolution):
            resized.append(f"that of {probe.name!r}, {picture.width}x{picture.height} px")
        image = cropped(picture, resolution)
        latents = encode_images([image], components.vae)[0]
        if not latents.isfinite().all():
            raise ProbeError(f"probe {probe.name!r}: the VAE gives latents that are not finite; pass it in float32")
        prepared.append(PreparedProbe(probe, conditioning, image, latents))
    if says and resized:
        images = f"{len(resized)} of {sum(probe.is_reference for probe in probes)} images"
        logger.warning("%s are resized and cropped to %d px, first %s", images, resolution, resized[0])
    return prepared


def offloaded(prepared: Sequence[PreparedProbe], folder: Path) -> list[PreparedProbe]:
    """The same probes, with what is encoded of them on disk, and without the pictures that came in memory."""
    tensors: dict[str, Tensor] = {}
    for i, p in enumerate(prepared):
        tensors |= {f"{i}/conditioning/{key}": tensor for key, tensor in p.conditioning.items()}
        tensors |= {} if p.image is None else {f"{i}/image": torch.from_numpy(p.image.copy())}
        tensors |= {} if p.latents is None else {f"{i}/latents": p.latents}
    kept, mapped = kept_on_disk(tensors, folder), []
    for i, p in enumerate(prepared):
        in_memory = p.probe.is_reference and not isinstance(p.probe.image, str | Path)
        probe = replace(p.probe, image=f"picture of {p.name}") if in_memory else p.probe
        image = None if p.image is None else kept[f"{i}/image"].numpy()
        said = {key: kept[f"{i}/conditioning/{key}"] for key in p.conditioning}
        mapped.append(PreparedProbe(probe, said, image, kept.get(f"{i}/latents")))
    return mapped


class WatchList:
    """Every probe of a run, and which of them are measured at an event.

    Attributes:
        prepared: watched probes first, then controls.
        unconditional: conditioning of the branch without a prompt; ``None`` where the model has no such branch.
        resolution: side of the images, pixels.
    """

    config: MemWatchConfig
    denoiser: Denoiser
    resolution: int
    prepared: list[PreparedProbe]
    unconditional: Conditioning | None
    _rotated_in: frozenset[str] = frozenset()

    @property
    def probes(self) -> list[PreparedProbe]:
        """What is measured at this event: everything but the rows that are not rotated in."""
        return [p for p in self.prepared if not p.probe.in_rotation or p.name in self._rotated_in]

    @property
    def fixed(self) -> list[PreparedProbe]:
        """What is measured at every event."""
        return [p for p in self.prepared if not p.probe.in_rotation]

    @property
    def rotation(self) -> list[PreparedProbe]:
        """The rows in the rotation, in their order."""
        return [p for p in self.prepared if p.probe.in_rotation]

    def rotate(self, event: int, kept: Collection[str]) -> None:
        """Choose the rows for the run's event of that number; none for 0, the baseline.

        Rows named in ``kept`` stay besides the new ones, at most as many as those.
        """
        rows, count = [p.name for p in self.rotation], self.config.rotation.per_event
        begin = (event - 1) * count
        new = [rows[i % len(rows)] for i in range(begin, begin + count)] if rows and event > 0 else []
        stay = [name for name in rows if name in kept and event > 0]
        self._rotated_in = frozenset(new + stay[:count])

    @property
    def has_controls(self) -> bool:
        return any(p.probe.is_control for p in self.prepared)

    def knows_prompt(self, p: PreparedProbe) -> bool:
        """Whether the model has an unconditional branch that is asked something else than the probe's prompt."""
        a, b = p.conditioning, self.unconditional
        return b is not None and not (a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a))

    def caption_of(self, probe: Probe) -> str:
        """What its image would be generated from; nothing where the model takes no prompts."""
        return probe.prompt if self.denoiser.text_encoders else ""

    def encoded_by(self, parts: Components, probes: Sequence[PreparedProbe] | None = None) -> dict[str, Conditioning]:
        """The conditioning of ``probes``, by default all, and of ``NO_PROMPT``, if there is, by these text encoders."""
        asked = self.prepared if probes is None else probes
        said = {p.name: self.denoiser.encode(p.probe.prompt, parts, self.resolution) for p in asked}
        without = self.denoiser.encode_unconditional(parts, self.resolution)
        return said if without is None else said | {NO_PROMPT: without}
