"""What was measured: on one denoiser at fixed noisy latents, and on one probe at one event; to disk and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.probes import Probe


@dataclass(frozen=True)
class Measurement:
    """What one denoiser says at fixed noisy latents.

    Attributes:
        rho: retained variance, mean over channels; samples of shape ``(levels, n, h, w)``, n replicates.
            ``None`` where the network was run forward only.
        epsilon: shape ``(levels, draws, c, h, w)``, float32.
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

    def first_draws(self, draws: int) -> Measurement:
        """The first noise draws. Replicates come draw by draw, so theirs are the first ones."""
        if self.rho is None:
            return Measurement(None, self.epsilon[:, :draws])
        blocks = self.rho.samples.shape[-3] // self.draws
        return Measurement(self.rho.first_replicates(draws * blocks), self.epsilon[:, :draws])

    def at_levels(self, indices: Sequence[int]) -> Measurement:
        """The noise levels with these indices."""
        rho = None if self.rho is None else CurvatureMap(self.rho.samples[list(indices)])
        return Measurement(rho, self.epsilon[list(indices)])

    @property
    def measured_rho(self) -> CurvatureMap:
        """``rho``, which must be there.

        Raises:
            ValueError: the network was run forward only.
        """
        if self.rho is None:
            raise ValueError("no retained variance: the network was run forward only")
        return self.rho


OPTIONAL = ("unconditional", "baseline", "unconditional_baseline")  # measurements that an observation may lack


@dataclass(frozen=True)
class Observation:
    """All that was measured on one probe at one event.

    Attributes:
        probe: what was looked at.
        timesteps: one per noise level.
        now: the current model with the probe's prompt.
        unconditional: the current model without it, at the same noisy latents; ``None`` where it was not looked at.
        baseline: the earlier model with the prompt; ``None`` where there is nothing earlier.
        baseline_step: the optimizer step of ``baseline``; ``None`` where it has none (LoRA off, or weights from a
            file).
        eps: the true noise, shape of ``now.epsilon``; ``None`` where it is unknown, at the last sampling step.
        image: RGB uint8 ``(H, W, 3)``: the training image, or the first of the prompt's generations.
        unconditional_baseline: the earlier model without the prompt, at the noise draws of ``unconditional``; ``None``
            where either was not looked at.
        generations: all that a prompt probe's prompt generated, RGB uint8 ``(n, H, W, 3)``; ``None`` for a reference
            probe.
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
        found = {"now": self.now, **{name: getattr(self, name) for name in OPTIONAL}}
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


def observation_to_tensors(observation: Observation) -> dict[str, Tensor]:
    """An observation as safetensors can hold it. What the probe says itself is left out."""
    o = observation
    tensors = to_tensors(o.measurements)
    tensors["timesteps"] = torch.tensor(o.timesteps)
    if o.baseline_step is not None:
        tensors["baseline_step"] = torch.tensor(o.baseline_step)
    if o.eps is not None:
        tensors["eps"] = o.eps
    if o.image is not None:
        tensors["image"] = torch.from_numpy(o.image.copy())
    if o.generations is not None:
        tensors["generations"] = torch.from_numpy(o.generations.copy())
    return tensors


def observation_from_tensors(tensors: Mapping[str, Tensor], probe: Probe) -> Observation:
    """The inverse of ``observation_to_tensors``.

    Raises:
        KeyError: a tensor is missing.
    """
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
