"""Probes: the fixed things we look at, and the views of them that a denoiser is measured on."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from memwatch.config import LevelsConfig, SamplingConfig
from memwatch.denoiser import Components, Conditioning, Denoiser

logger = logging.getLogger("memwatch")

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class ProbeError(ValueError):
    """A probe that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Probe:
    """What we look at.

    Attributes:
        prompt: caption of the image, or the prompt to generate from; unconditional models ignore it.
        image: makes it a *reference probe*: a file or an RGB image, usually from the training set. ``None``: a *prompt probe*.
        seed: of the prompt probe's initial noise.
        name: unique, used in keys and file names; made from the file name or the prompt when empty.
    """

    prompt: str
    image: str | Path | Image.Image | None = None
    seed: int = 0
    name: str = ""

    @property
    def is_reference(self) -> bool:
        return self.image is not None


def as_probes(source: Any, *, seed: int = 0) -> list[Probe]:
    """Probes from whatever the user has, with unique names.

    Args:
        source: an image folder (captions from ``metadata.jsonl``, or ``NAME.txt`` beside ``NAME.png``), a text file of prompts, a list of
            prompts and ``Probe``s, or a dataset whose rows have an image and a text (``image``; ``text``, ``caption`` or ``prompt``).
        seed: of prompts without a seed of their own.

    Raises:
        ProbeError: nothing found, or something is neither prompt nor image.
    """
    if source is None:
        return []
    if isinstance(source, Probe):
        probes = [source]
    elif isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            probes = _from_folder(path)
        elif path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            probes = [Probe(line.strip(), seed=seed) for line in lines if line.strip()]
        else:
            raise ProbeError(f"probes: {str(source)!r} is neither a folder nor a file (give single prompts as a list)")
    else:
        probes = [_from_item(item, i, seed) for i, item in enumerate(source)]
    if not probes:
        raise ProbeError(f"probes: {str(source)!r} holds no image and no prompt")
    return _named(probes)


def _from_folder(folder: Path) -> list[Probe]:
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        probes = []
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                probes.append(Probe(str(row.get("text", row.get("caption", ""))), folder / row["file_name"]))
            except (json.JSONDecodeError, KeyError, AttributeError) as error:
                raise ProbeError(
                    f"{metadata}, line {number}: expected an object with 'file_name' and 'text' ({error!r})"
                ) from error
        return probes
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    captions = [file.with_suffix(".txt") for file in files]
    return [
        Probe(c.read_text(encoding="utf-8").strip() if c.is_file() else "", file)
        for file, c in zip(files, captions, strict=True)
    ]


def _from_item(item: Any, index: int, seed: int) -> Probe:
    if isinstance(item, Probe):
        return item
    if isinstance(item, str):
        if not item.strip():
            raise ProbeError(f"probes: prompt {index} is empty")
        return Probe(item, seed=seed)
    if (
        isinstance(item, dict)
        and (text := next((item[key] for key in ("text", "caption", "prompt") if key in item), None)) is not None
    ):
        return Probe(str(text), item.get("image"), seed=int(item.get("seed", seed)), name=str(item.get("name", "")))
    raise ProbeError(
        f"probes: item {index} is a {type(item).__name__}; expected a prompt, a Probe or a row with 'image' and 'text'"
    )


def _named(probes: Iterable[Probe]) -> list[Probe]:
    """Names for those without, made unique by a number."""
    used: set[str] = set()
    named = []
    for probe in probes:
        base = probe.name or (Path(probe.image).stem if isinstance(probe.image, str | Path) else probe.prompt)
        base = re.sub(r"[^\w.-]+", "-", base).strip("-")[:60] or "probe"
        name, number = base, 2
        while name in used:
            name, number = f"{base}-{number}", number + 1
        used.add(name)
        named.append(replace(probe, name=name))
    return named


def read_image(probe: Probe, resolution: int) -> np.ndarray:
    """The probe's image as RGB uint8 ``(resolution, resolution, 3)``: short side resized, middle cropped, as training scripts do.

    Raises:
        ProbeError: the file is missing or is no image.
    """
    try:
        picture = probe.image if isinstance(probe.image, Image.Image) else Image.open(str(probe.image))
        picture = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError on some broken files
        raise ProbeError(f"probe {probe.name!r}: cannot read image {str(probe.image)!r}: {error}") from error
    if picture.size != (resolution, resolution):
        logger.warning(
            "probe %r: image of %dx%d px is resized and cropped to %d px", probe.name, *picture.size, resolution
        )
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        picture = picture.resize(
            (resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
    return np.asarray(picture)


@dataclass(frozen=True)
class PreparedProbe:
    """A probe ready to be looked at.

    Attributes:
        conditioning: of its prompt.
        image: RGB uint8 ``(H, W, 3)``; ``None`` for a prompt probe.
        latents: z_0, ``(c, h, w)`` float32 on the CPU; ``None`` for a prompt probe.
        is_control: held out, gives the null.
    """

    probe: Probe
    conditioning: Conditioning
    image: np.ndarray | None
    latents: Tensor | None
    is_control: bool

    @property
    def name(self) -> str:
        return self.probe.name


@torch.no_grad()
def encode_image(image: np.ndarray, vae: Any) -> Tensor:
    """z_0 of an RGB uint8 image, scaled as the denoiser expects: ``(c, h, w)`` float32 on the CPU; the posterior's mode, no randomness.

    Without a VAE, the pixels in [-1, 1].
    """
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    if vae is None:
        return pixels[0]
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    latents: Tensor = (
        ((mode - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor)[0].float().cpu()
    )
    return latents


@torch.no_grad()
def decode_latents(latents: Tensor, vae: Any) -> np.ndarray:
    """RGB uint8 ``(H, W, 3)`` of ``latents`` ``(c, h, w)``; without a VAE they are pixels in [-1, 1]."""
    pixels = latents
    if vae is not None:
        z = latents[None].to(vae.device, vae.dtype) / vae.config.scaling_factor + (
            getattr(vae.config, "shift_factor", None) or 0
        )
        pixels = vae.decode(z).sample[0].float()
    result: np.ndarray = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return result


def prepare(
    probes: Sequence[Probe], controls: Sequence[Probe], denoiser: Denoiser, components: Components, resolution: int
) -> list[PreparedProbe]:
    """Encode every prompt and image once. Names of controls get the prefix ``control/`` so that they never clash with probes.

    Raises:
        ProbeError: an image cannot be read, or the VAE has no finite latents of it.
    """
    prepared = []
    for probe, is_control in [*((p, False) for p in probes), *((c, True) for c in controls)]:
        image = read_image(probe, resolution) if probe.is_reference else None
        latents = encode_image(image, components.vae) if image is not None else None
        if latents is not None and not latents.isfinite().all():
            raise ProbeError(f"probe {probe.name!r}: the VAE gives latents that are not finite; pass it in float32")
        denoiser.warn_if_cut(probe.prompt, components)
        named = replace(probe, name=f"control/{probe.name}") if is_control else probe
        prepared.append(
            PreparedProbe(named, denoiser.encode(probe.prompt, components, resolution), image, latents, is_control)
        )
    return prepared


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator that depends on ``parts`` alone: not on rank, batch or order."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class View:
    """Noisy latents of one probe at every level and draw, with what belongs to them.

    Attributes:
        key: names the view; its test vectors depend on it, so baseline and now share them.
        noisy_latents: ``(levels, draws, c, h, w)`` float32 on the CPU.
        timesteps: one a level; whole numbers, but for prompt probes of rectified flow.
        eps: the true noise, same shape; ``None`` for a prompt probe.
        conditioning: of the probe, or of the unconditional branch.
    """

    key: str
    noisy_latents: Tensor
    timesteps: tuple[float, ...]
    eps: Tensor | None
    conditioning: Conditioning

    def beside(self, null: Conditioning, draws: int) -> View:
        """The same noisy latents, the first draws of them, for the unconditional branch."""
        return replace(self, noisy_latents=self.noisy_latents[:, :draws], conditioning=null)


def fixed_noise(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The true noise of a reference probe, ``(levels, draws, c, h, w)``: it depends on name and seed alone."""
    return torch.randn(tuple(shape), generator=seeded(seed, "noise", name))


def reference_view(prepared: PreparedProbe, denoiser: Denoiser, levels: LevelsConfig, seed: int) -> View:
    """Known latents under fixed noise at fixed levels: the same at every event."""
    assert prepared.latents is not None
    z_0 = prepared.latents
    eps = fixed_noise(prepared.name, (len(levels.timesteps), levels.draws, *z_0.shape), seed)
    noisy = [
        denoiser.schedule.add_noise(z_0.expand_as(e), e, torch.full((len(e),), t))
        for e, t in zip(eps, levels.timesteps, strict=True)
    ]
    return View(prepared.name, torch.stack(noisy), levels.timesteps, eps, prepared.conditioning)


@torch.no_grad()
def prompt_view(
    prepared: PreparedProbe,
    null: Conditioning | None,
    denoiser: Denoiser,
    scheduler: Any,
    sampling: SamplingConfig,
    draws: int,
    side: int,
) -> tuple[View, Tensor]:
    """Sample with guidance up to the last step and look there (Kim & Lee 2026: DDIM, x_t before step ``num_inference_steps - 1``).

    Families without classifier-free guidance are sampled by their conditional branch alone, rectified flow by Euler steps.

    Returns:
        The view, its draws sharing one x_t, and the finished latents ``(c, h, w)`` for showing.
    """
    sampler = denoiser.sampler(scheduler, sampling.num_inference_steps, side)
    generator = torch.Generator().manual_seed(prepared.probe.seed)
    x = torch.randn(1, denoiser.latent_channels, side, side, generator=generator) * getattr(
        sampler, "init_noise_sigma", 1.0
    )
    x_t = x = x.to(denoiser.device)
    branches = [null, prepared.conditioning] if denoiser.guided and null is not None else [prepared.conditioning]
    conditioning = denoiser.stack(branches)
    for t in sampler.timesteps:
        x_t = x
        timesteps = t.to(denoiser.device).expand(len(branches))
        output = denoiser.predict(
            x.expand(len(branches), -1, -1, -1).to(denoiser.dtype), timesteps, conditioning
        ).float()
        unconditional, conditional = output[:1], output[-1:]
        x = sampler.step(unconditional + sampling.guidance_scale * (conditional - unconditional), t, x).prev_sample
    noisy = x_t.cpu()[None].expand(1, draws, -1, -1, -1)
    return View(prepared.name, noisy, (sampler.timesteps[-1].item(),), None, prepared.conditioning), x[0].cpu()
