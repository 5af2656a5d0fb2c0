"""Fingerprint: everything that a measurement of a probe depends on beside the model's weights, in a few letters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from memwatch.config import MemWatchConfig
from memwatch.measure.prepare import PreparedProbe

UNCONDITIONAL = "//unconditional"  # after a probe's name: measured without its prompt


def measured_under(config: MemWatchConfig, p: PreparedProbe) -> dict[str, Any]:
    """Settings that change what is measured on a probe, and what the probe is; as JSON takes it.

    How many noisy latents go through the model at once (``curvature.batch_size``) changes only rounding.
    """
    settings = config.to_dict()
    of_prompts = () if p.probe.is_reference else ("sampling", "resolution")  # an image has its own size
    kept = {key: settings[key] for key in ("levels", "curvature", "seed", "weights", *of_prompts)}
    del kept["curvature"]["batch_size"]
    image = None if p.image is None else [list(p.image.shape), hashlib.sha256(p.image.tobytes()).hexdigest()]
    return kept | {"prompt": p.probe.prompt, "probe_seed": p.probe.seed, "image": image}


def digest(*parts: Any) -> str:
    """SHA-256 of anything that JSON takes, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(config: MemWatchConfig, p: PreparedProbe) -> str:
    """What must be the same for a probe to be compared with what was kept of it at an earlier event.

    A reference probe is compared with an earlier measurement. A prompt probe is measured anew under earlier weights, so
    that only what is kept counts: whose weights, and which prompt a trained text encoder was asked.
    """
    return digest(measured_under(config, p) if p.probe.is_reference else [config.weights, p.probe.prompt])


def fingerprints(config: MemWatchConfig, probes: Sequence[PreparedProbe]) -> dict[str, str]:
    """By name that of each probe; by name and ``UNCONDITIONAL`` that of what is measured without its prompt."""
    found = {p.name: fingerprint(config, p) for p in probes}
    return found | {name + UNCONDITIONAL: digest(text) for name, text in found.items()}
