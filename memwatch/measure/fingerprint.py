"""Fingerprint: everything that a measurement of a probe depends on beside the model's weights, in a few letters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from memwatch.config import MemWatchConfig
from memwatch.measure.prepare import PreparedProbe

UNCONDITIONAL = "//unconditional"  # after a probe's name: measured without its prompt
SCREEN = "//screen"  # at the end: run forward only, at the screen's noise draws


def measured_under(config: MemWatchConfig, p: PreparedProbe) -> dict[str, Any]:
    """Settings that change what is measured on a probe, and what the probe is; as JSON takes it.

    How many noisy latents go through the model at once (``curvature.batch_size``) changes only rounding.
    """
    settings = config.to_dict()
    of_prompts = () if p.probe.is_reference else ("sampling", "resolution")  # an image has its own size
    kept = {key: settings[key] for key in ("levels", "curvature", "seed", "weights", "precision", *of_prompts)}
    del kept["curvature"]["batch_size"]
    image = None if p.image is None else [list(p.image.shape), hashlib.sha256(p.image.tobytes()).hexdigest()]
    return kept | {"prompt": p.probe.prompt, "probe_seed": p.probe.seed, "image": image}


def digest(*parts: Any) -> str:
    """SHA-256 of anything that JSON takes, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(config: MemWatchConfig, p: PreparedProbe, mixed_precision: str = "no", reading: str = "epsilon") -> str:
    """What must be the same for a probe to be compared with what was kept of it at an earlier event.

    A reference probe is compared with an earlier measurement. A prompt probe is measured anew under earlier weights, so
    that only what is kept counts: whose weights, and which prompt a trained text encoder was asked.

    Args:
        mixed_precision: accelerate's name of the loop's; it counts where the look uses it.
        reading: the prediction type by which the output is read.
    """
    if not p.probe.is_reference:
        return digest([config.weights, p.probe.prompt])
    precision = {"in": mixed_precision} if config.precision == "loop" else {}
    return digest(measured_under(config, p) | precision | {"reading": reading})


def fingerprints(
    config: MemWatchConfig, probes: Sequence[PreparedProbe], mixed_precision: str = "no", reading: str = "epsilon"
) -> dict[str, str]:
    """By name that of each probe; with ``UNCONDITIONAL`` and ``SCREEN`` after it those of its other measurements."""
    found = {p.name: fingerprint(config, p, mixed_precision, reading) for p in probes}
    found |= {name + UNCONDITIONAL: digest(text) for name, text in found.items()}
    return found | {name + SCREEN: digest(text, 1) for name, text in found.items()}
