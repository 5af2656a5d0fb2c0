"""Observations made by hand: a model that has lost freedom in the left half of a 4x4 map, and controls."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from PIL import Image

from memwatch import Probe
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation

BY_VARIANCE = {"signals": {"terms": "variance"}}  # the term of these observations, which have no loss
GREY = Image.fromarray(np.full((32, 32, 3), 128, np.uint8))


def measured(*levels: float | torch.Tensor, side: int = 4) -> Measurement:
    """Per level one mean, or map of means, of the retained variance; two replicates that differ by 0.002."""
    means = torch.stack([torch.as_tensor(level).expand(side, side) for level in levels])
    rho = means[:, None] + torch.tensor([-0.001, 0.001]).reshape(1, 2, 1, 1)
    return Measurement(CurvatureMap(rho), torch.zeros(len(levels), 2, 4, side, side))


def half_fallen(by: float) -> torch.Tensor:
    """Half of the freedom everywhere, and on the left ``by`` times less than that."""
    means = torch.full((4, 4), 0.5)
    means[:, :2] /= by
    return means


def seen(
    name: str = "a", fallen: float = 5.0, *, reference: bool = True, control: bool = False, **parts: Any
) -> Observation:
    """One probe, ``fallen`` times less free on the left than at step 0; ``parts`` go to ``Observation``."""
    probe = Probe(f"a photo of {name}", GREY if reference else None, name=name, is_control=control)
    parts = {"baseline": measured(0.5), "baseline_step": 0, "now": measured(half_fallen(fallen))} | parts
    return Observation(probe, (61,), **parts)


def controls(num: int, fallen: float, *, spread: float = 0.0, **kind: Any) -> list[Observation]:
    """``num`` controls that have all fallen alike, or by quantiles of a log-normal distribution of that ``spread``."""
    logs = [math.log(fallen) + spread * NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)]
    return [seen(f"control/{i}", math.exp(log), control=True, **kind) for i, log in enumerate(logs)]
