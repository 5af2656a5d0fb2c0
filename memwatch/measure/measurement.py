"""What was measured, to disk and back; and fingerprints of all that it depends on beside the model's weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memwatch.config import SCREEN_DRAWS, MemWatchConfig
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.prepare import PreparedProbe
from memwatch.measure.probes import Probe

UNCONDITIONAL = "//unconditional"  # after a probe's name: measured without its prompt
SCREEN = "//screen"  # at the end: run forward only, at the screen's noise draws


@dataclass(frozen=True)
class Measurement:
    """What one denoiser says at fixed noisy latents: epsilon ``(levels, draws, c, h, w)``, float32, and rho.

    rho is the retained variance, mean over channels: samples ``(levels, n, h, w)``. ``None`` where the network was run
    forward only.
    """

    rho: CurvatureMap | None
    epsilon: Tensor

    @property
    def draws(self) -> int:
        return self.epsilon.shape[1]

    @property
    def finite(self) -> bool:
        known = self.rho is None or bool(self.rho.samples.isfinite().all())
        return known and bool(self.epsilon.isfinite().all())


OPTIONAL = ("unconditional", "baseline", "unconditional_baseline")  # measurements that an observation may lack


@dataclass(frozen=True)
class Observation:
    """All that was measured on one probe at one event.

    Attributes:
        timesteps: one per noise level.
        now: the current model with the probe's prompt. unconditional: the same without it, at the same noisy latents;
            ``None`` where the prompt is empty or the model has no such branch.
        baseline, unconditional_baseline: the same of the earlier model; ``None`` where there is none.
        baseline_step: its optimizer step; ``None`` where it has none (LoRA off, or weights from a file).
        eps: the true noise, shape of ``now.epsilon``; ``None`` where it is unknown, at the last sampling step.
        image: RGB uint8 ``(H, W, 3)``: the training image, or the first of the prompt's generations.
        generations: those of a prompt probe, RGB uint8 ``(n, H, W, 3)``; ``None`` for a reference probe.
    """

    probe: Probe
    timesteps: tuple[float, ...]
    now: Measurement
    unconditional: Measurement | None = None
    baseline: Measurement | None = None
    baseline_step: int | None = None
    eps: Tensor | None = None
    image: np.ndarray | None = None
    unconditional_baseline: Measurement | None = None
    generations: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self.probe.name

    @property
    def has_curvature(self) -> bool:
        """Whether curvature was measured; otherwise the network was run forward only."""
        return self.now.rho is not None

    @property
    def finite(self) -> bool:
        return all(measurement.finite for measurement in self.measurements.values())

    @property
    def measurements(self) -> dict[str, Measurement]:
        """All that there are, by the names of the attributes."""
        found = {name: getattr(self, name) for name in ("now", *OPTIONAL)}
        return {name: measurement for name, measurement in found.items() if measurement is not None}


def to_tensors(measurements: Mapping[str, Measurement]) -> dict[str, Tensor]:
    """Measurements by name, as named tensors."""
    tensors = {f"{name}/rho": m.rho.samples for name, m in measurements.items() if m.rho is not None}
    return tensors | {f"{name}/epsilon": m.epsilon for name, m in measurements.items()}


def tensor_names(name: str) -> tuple[str, str]:
    """What ``to_tensors`` calls the tensors of the measurement of that name."""
    return f"{name}/rho", f"{name}/epsilon"


def from_tensors(tensors: Mapping[str, Tensor], name: str) -> Measurement | None:
    """The measurement of that name, float32; ``None`` where there is none."""
    rho, epsilon = map(tensors.get, tensor_names(name))
    return None if epsilon is None else Measurement(None if rho is None else CurvatureMap(rho), epsilon.float())


def observation_to_tensors(o: Observation) -> dict[str, Tensor]:
    """An observation less its probe, as safetensors can hold it."""
    tensors = to_tensors(o.measurements) | {"timesteps": torch.tensor(o.timesteps)}
    if o.baseline_step is not None:
        tensors["baseline_step"] = torch.tensor(o.baseline_step)
    if o.eps is not None:
        tensors["eps"] = o.eps
    for name, pixels in (("image", o.image), ("generations", o.generations)):
        if pixels is not None:
            tensors[name] = torch.from_numpy(pixels.copy())
    return tensors


def observation_from_tensors(tensors: Mapping[str, Tensor], probe: Probe) -> Observation:
    """The inverse of ``observation_to_tensors``; a ``KeyError`` where a tensor is missing."""
    now = from_tensors(tensors, "now")
    if now is None:
        raise KeyError("now/epsilon")
    step, image, generations = tensors.get("baseline_step"), tensors.get("image"), tensors.get("generations")
    return Observation(
        probe,
        tuple(tensors["timesteps"].tolist()),
        now,
        **{name: from_tensors(tensors, name) for name in OPTIONAL},
        baseline_step=None if step is None else int(step),
        eps=tensors.get("eps"),
        image=None if image is None else image.numpy(),
        generations=None if generations is None else generations.numpy(),
    )


def measured_under(config: MemWatchConfig, p: PreparedProbe) -> dict[str, Any]:
    """Settings that change what is measured on a probe, and what the probe is; as JSON takes it."""
    settings = config.to_dict()
    of_prompts = () if p.probe.is_reference else ("sampling", "resolution")  # an image has its own size
    kept = {key: settings[key] for key in ("levels", "curvature", "seed", "weights", "precision", *of_prompts)}
    del kept["curvature"]["batch_size"]  # it changes rounding only
    image = None if p.image is None else [list(p.image.shape), hashlib.sha256(p.image.tobytes()).hexdigest()]
    return kept | {"prompt": p.probe.prompt, "probe_seed": p.probe.seed, "image": image}


def digest(*parts: Any) -> str:
    """SHA-256 of anything that JSON takes, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(
    config: MemWatchConfig, p: PreparedProbe, mixed_precision: str = "no", prediction_type: str = "epsilon"
) -> str:
    """What must be the same for a probe to be compared with what was kept of it at an earlier event.

    A reference probe is compared with an earlier measurement. A prompt probe is measured anew under earlier weights, so
    that only what is kept counts: whose weights, and which prompt a trained text encoder was asked. accelerate's
    ``mixed_precision`` counts where measuring uses it.
    """
    if not p.probe.is_reference:
        return digest([config.weights, p.probe.prompt])
    precision = {"in": mixed_precision} if config.precision == "loop" else {}
    return digest(measured_under(config, p) | precision | {"reading": prediction_type})


def fingerprints(config: MemWatchConfig, probes: Sequence[PreparedProbe], *reading: str) -> dict[str, str]:
    """By name that of each probe; with ``UNCONDITIONAL`` and ``SCREEN`` after it those of its other measurements.

    ``reading``: mixed precision and prediction type, see ``fingerprint``.
    """
    found = {p.name: fingerprint(config, p, *reading) for p in probes}
    found |= {name + UNCONDITIONAL: digest(text) for name, text in found.items()}
    return found | {name + SCREEN: digest(text, SCREEN_DRAWS) for name, text in found.items()}
