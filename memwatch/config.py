"""Configuration: one frozen dataclass a component, read from YAML. Every key is checked when it is read, and named when it is wrong."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

DECIDING = ("log_ratio", "log_ratio_null", "loss_log_ratio", "both", "both_baselines")
COMBINATIONS = ("adjacent_min", "mean", "max")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and what is allowed."""


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"config key '{key}': got {value!r}, allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """Noise levels at which reference probes are looked at.

    Attributes:
        timesteps: diffusion timesteps, increasing, each in 0..999; for rectified flow (SD 3, Flux) ``sigma = timestep / 1000``.
        draws: noise draws a level (for prompt probes: draws of test vectors), at least 1.
    """

    timesteps: tuple[int, ...] = (61, 141, 301)
    draws: int = 4

    def __post_init__(self) -> None:
        ok = (
            len(self.timesteps) > 0 and list(self.timesteps) == sorted(set(self.timesteps)) and min(self.timesteps) >= 0
        )
        check(ok, "levels.timesteps", self.timesteps, "one or more increasing timesteps, 0 or greater")
        check(self.draws >= 1, "levels.draws", self.draws, "1 or greater")


@dataclass(frozen=True, kw_only=True)
class CurvatureConfig:
    """How the diagonal of the Jacobian is estimated.

    Attributes:
        vectors: test vectors a noise draw.
        tile: vectors orthogonal over this many neighbouring coordinates; 1 is plain Rademacher.
        batch_size: noisy latents a forward pass (memory); halved by itself when memory runs out.
    """

    vectors: int = 4
    tile: int = 4
    batch_size: int = 8

    def __post_init__(self) -> None:
        check(self.vectors >= 1, "curvature.vectors", self.vectors, "1 or greater")
        ok = self.tile >= 1 and self.tile & (self.tile - 1) == 0 and self.vectors % self.tile == 0
        check(ok, "curvature.tile", self.tile, f"a power of two that divides curvature.vectors ({self.vectors})")
        check(self.batch_size >= 1, "curvature.batch_size", self.batch_size, "1 or greater")


@dataclass(frozen=True, kw_only=True)
class SignalsConfig:
    """Which map decides.

    Attributes:
        decide: ``log_ratio`` (of retained variances, snapshot baseline), ``log_ratio_null`` (unconditional baseline),
            ``loss_log_ratio`` (of denoising losses, snapshot baseline; reference probes only), ``both`` (mean of the first and the third), or
            ``both_baselines``: ``both`` against the snapshot or against the unconditional branch, whichever is smaller.
        baseline: the snapshot compared with: ``first``, ``previous``, ``lag:N`` (N events back), ``last_clean`` (the last event in which the
            probe raised no suspicion), ``base`` (LoRA off) or ``path:FILE`` (safetensors of trainable tensors).
        unconditional: look at the unconditional branch as well (of controls only where it decides); has no effect for models without one.
        null_draws: at how many of the noise draws, the first ones, the unconditional branch is looked at; rounded up to a divisor of
            ``levels.draws``.
        combine: noise levels to one map: ``adjacent_min``, ``mean`` or ``max``.
        smooth: side of the mean filter, latent pixels, odd.
    """

    decide: str = "both_baselines"
    baseline: str = "first"
    unconditional: bool = True
    null_draws: int = 2
    combine: str = "mean"
    smooth: int = 3

    def __post_init__(self) -> None:
        check(self.decide in DECIDING, "signals.decide", self.decide, ", ".join(DECIDING))
        name, argument = self.baseline_parts
        ok = (name in ("first", "previous", "last_clean", "base") and not argument) or (
            name == "path" and bool(argument)
        )
        ok = ok or (name == "lag" and argument.isdecimal() and int(argument) >= 1)
        check(ok, "signals.baseline", self.baseline, "first, previous, lag:N, last_clean, base, path:FILE")
        check(self.combine in COMBINATIONS, "signals.combine", self.combine, ", ".join(COMBINATIONS))
        check(self.smooth >= 1 and self.smooth % 2 == 1, "signals.smooth", self.smooth, "an odd number, 1 or greater")
        check(self.null_draws >= 1, "signals.null_draws", self.null_draws, "1 or greater")
        ok = self.unconditional or self.decide != "log_ratio_null"
        check(ok, "signals.unconditional", self.unconditional, "true, because signals.decide is log_ratio_null")

    @property
    def baseline_parts(self) -> tuple[str, str]:
        """``lag:3`` is ``("lag", "3")``; without an argument the second is empty."""
        name, _, argument = self.baseline.partition(":")
        return name, argument

    @property
    def baseline_is_fixed(self) -> bool:
        """Whether the baseline is one set of weights from outside the run, and not an earlier event of it."""
        return self.baseline_parts[0] in ("base", "path")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How prompt probes are sampled: by DDIM, as in the paper; rectified flow (SD 3, Flux) by Euler steps.

    Attributes:
        num_inference_steps: sampling steps; the maps are taken at the last one.
        guidance_scale: classifier-free guidance; 1 is none. Flux (distilled) and unconditional models are sampled without.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        check(self.num_inference_steps >= 2, "sampling.num_inference_steps", self.num_inference_steps, "2 or greater")
        check(self.guidance_scale >= 1, "sampling.guidance_scale", self.guidance_scale, "1 or greater")


@dataclass(frozen=True, kw_only=True)
class RegionsConfig:
    """What counts as a region of the deciding map.

    Attributes:
        min_factor: reduction factor from which a pixel belongs to a region, greater than 1.
        relative: share of the map's own peak, on the log scale, from which it does, in [0, 1); the stricter of the two counts. Where a map is
            smooth its edge runs through the middle of a slope, whatever the height: 0 has only ``min_factor`` count.
        min_area: smallest region, share of the image in [0, 1).
    """

    min_factor: float = 1.1
    relative: float = 0.35
    min_area: float = 0.01

    def __post_init__(self) -> None:
        check(self.min_factor > 1, "regions.min_factor", self.min_factor, "greater than 1")
        check(0 <= self.relative < 1, "regions.relative", self.relative, "0 or greater, below 1")
        check(0 <= self.min_area < 1, "regions.min_area", self.min_area, "0 or greater, below 1")


@dataclass(frozen=True, kw_only=True)
class AlertsConfig:
    """When a probe is suspicious, and when memorized.

    Attributes:
        max_p: largest p-value against the controls, in (0, 1].
        min_severity: smallest reduction factor of the strongest region, greater than 1. Controls decide; this only keeps trifles out.
        uncalibrated_severity: the same where there are no controls to judge by, greater than 1.
        patience: events in a row until suspicious becomes memorized, at least 1.
    """

    max_p: float = 0.05
    min_severity: float = 1.1
    uncalibrated_severity: float = 2.0
    patience: int = 2

    def __post_init__(self) -> None:
        check(0 < self.max_p <= 1, "alerts.max_p", self.max_p, "greater than 0, at most 1")
        check(self.min_severity > 1, "alerts.min_severity", self.min_severity, "greater than 1")
        check(
            self.uncalibrated_severity > 1, "alerts.uncalibrated_severity", self.uncalibrated_severity, "greater than 1"
        )
        check(self.patience >= 1, "alerts.patience", self.patience, "1 or greater")


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When training is stopped early.

    Attributes:
        enabled: whether memwatch may end the run (through ``guard`` or ``should_stop``).
        num_probes: memorized probes that it takes.
        patience: events in a row with that many, at least 1.
        min_severity: only memorized probes of at least this severity count, greater than 1.
        max_p: only memorized probes with at most this p-value count, in (0, 1].
    """

    enabled: bool = True
    num_probes: int = 1
    patience: int = 1
    min_severity: float = 1.5
    max_p: float = 0.05

    def __post_init__(self) -> None:
        check(self.num_probes >= 1, "stop.num_probes", self.num_probes, "1 or greater")
        check(self.patience >= 1, "stop.patience", self.patience, "1 or greater")
        check(self.min_severity > 1, "stop.min_severity", self.min_severity, "greater than 1")
        check(0 < self.max_p <= 1, "stop.max_p", self.max_p, "greater than 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class SnapshotsConfig:
    """Earlier weights (prompt probes only) and the ledger of earlier measurements (reference probes).

    Attributes:
        keep: how many of the latest events stay usable as baselines, beside the pinned first one; at least 1.
        on_disk: weights go to ``output_dir/snapshots`` as safetensors; false keeps them in CPU memory (then they do not survive a resume).
    """

    keep: int = 4
    on_disk: bool = True

    def __post_init__(self) -> None:
        check(self.keep >= 1, "snapshots.keep", self.keep, "1 or greater")


@dataclass(frozen=True, kw_only=True)
class HeatmapConfig:
    """Pictures.

    Attributes:
        max_factor: variance reduction factor at the top of the colour scale, the same in every picture; greater than 1.
    """

    max_factor: float = 6.0

    def __post_init__(self) -> None:
        check(self.max_factor > 1, "heatmap.max_factor", self.max_factor, "greater than 1")


@dataclass(frozen=True, kw_only=True)
class MemWatchConfig:
    """Everything that can be set. Relative paths are relative to the working directory.

    Attributes:
        every_steps: optimizer steps between events, at least 1.
        output_dir: where history, maps, pictures, ledger and snapshots go.
        probes: image folder, text file of prompts (one a line), or a list of prompts; the ``probes`` argument goes first.
        controls: the same, held out from training; without them alerts are uncalibrated.
        resolution: side of probe images in pixels, a multiple of the autoencoder's scale; null takes the model's own.
        seed: of noise draws, test vectors and prompt probes without a seed of their own.
        weights: ``live``, or ``ema`` to watch the averaged weights (needs the ``ema`` argument).
        strict: raise on errors that would otherwise switch a part of memwatch off with a warning.
    """

    every_steps: int = 500
    output_dir: str = "memwatch"
    probes: str | tuple[str, ...] | None = None
    controls: str | tuple[str, ...] | None = None
    resolution: int | None = None
    seed: int = 0
    weights: str = "live"
    strict: bool = False
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    signals: SignalsConfig = field(default_factory=SignalsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    regions: RegionsConfig = field(default_factory=RegionsConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    snapshots: SnapshotsConfig = field(default_factory=SnapshotsConfig)
    heatmap: HeatmapConfig = field(default_factory=HeatmapConfig)

    def __post_init__(self) -> None:
        check(self.every_steps >= 1, "every_steps", self.every_steps, "1 or greater")
        check(bool(self.output_dir), "output_dir", self.output_dir, "a folder's path")
        check(self.resolution is None or self.resolution >= 8, "resolution", self.resolution, "8 or greater, or null")
        check(self.weights in ("live", "ema"), "weights", self.weights, "live, ema")
        replicates = self.levels.draws * self.curvature.vectors // self.curvature.tile
        allowed = f"2 or greater with curvature.vectors = curvature.tile = {self.curvature.tile}: one replicate has no error bar"
        check(replicates >= 2, "levels.draws", self.levels.draws, allowed)
        ok = self.levels.draws >= 2 or self.signals.decide in ("log_ratio", "log_ratio_null")
        check(
            ok,
            "levels.draws",
            self.levels.draws,
            f"2 or greater with signals.decide = {self.signals.decide}: a loss has one replicate a draw",
        )
        ok = self.null_draws >= 2 or self.signals.decide != "both_baselines"
        check(
            ok,
            "signals.null_draws",
            self.signals.null_draws,
            "2 or greater with signals.decide = both_baselines: one replicate has no error bar",
        )

    @property
    def null_draws(self) -> int:
        """Noise draws of the unconditional branch: a divisor of all draws."""
        draws, wanted = self.levels.draws, min(self.signals.null_draws, self.levels.draws)
        return next(n for n in range(wanted, draws + 1) if draws % n == 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as YAML would hold it."""
        return asdict(self)


def load_config(source: str | Path | Mapping[str, Any] | MemWatchConfig | None, **overrides: Any) -> MemWatchConfig:
    """Read a configuration.

    Args:
        source: a YAML file, a (nested) mapping, a ready configuration, or ``None`` for the defaults.
        overrides: top-level keys that go before the source's; a section given as a mapping is merged into the source's section.

    Raises:
        ConfigError: unknown key (the nearest known one is named), wrong type, or a value that is not allowed.
    """
    if isinstance(source, MemWatchConfig):
        data: Any = source.to_dict()
    elif isinstance(source, str | Path):
        try:
            data = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {source}: {error}") from error
    else:
        data = source
    data = {} if data is None else data
    if not isinstance(data, Mapping):
        raise ConfigError(f"config: got {type(data).__name__}, allowed: a mapping of keys to values")
    data = dict(data)
    for key, value in overrides.items():
        section = asdict(data[key]) if is_dataclass(data.get(key)) else data.get(key)
        merges = isinstance(value, Mapping) and section is not None
        check(not merges or isinstance(section, Mapping), key, section, "a mapping")
        data[key] = {**section, **value} if merges else value
    config = _build(MemWatchConfig, data, "")
    assert isinstance(config, MemWatchConfig)
    return config


def _build(cls: type, data: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [item.name for item in fields(cls)]
    for key in data:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{nearest[0]}'?" if nearest else f"known keys: {', '.join(names)}"
            raise ConfigError(f"config key '{prefix}{key}' is unknown; {hint}")
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as ``hint`` wants it: sections are built, lists become tuples, integers become floats; nothing else is guessed."""
    if is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        check(isinstance(value, Mapping), key, value, f"a mapping of {', '.join(item.name for item in fields(hint))}")
        return _build(hint, value, f"{key}.")
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        if typing.get_origin(choice) is tuple and isinstance(value, list | tuple):
            item = typing.get_args(choice)[0]
            return tuple(_convert(item, element, f"{key}[{i}]") for i, element in enumerate(value))
        if choice is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, Path) and choice is str:
            return str(value)
        if choice is float and isinstance(value, float):
            check(math.isfinite(value), key, value, "a finite number")
        if isinstance(choice, type) and isinstance(value, choice) and (choice is bool or not isinstance(value, bool)):
            return value
    names = " or ".join("null" if c is types.NoneType else _type_name(c) for c in choices)
    raise ConfigError(f"config key '{key}': got {value!r}, allowed: {names}")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    return {int: "integer", float: "number", bool: "true or false", str: "text"}.get(hint, str(hint))
