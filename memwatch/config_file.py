"""Reads a configuration from YAML, a dict or a ``MemWatchConfig``, and names what is wrong with it."""

from __future__ import annotations

import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from memwatch.config import ConfigError, MemWatchConfig, require

FULL = "curvature is measured for probes that exceed the controls, and for everything at every eighth event"
ONE_RULE = "a probe is memorized by its p-value alone, see alerts.false_alarms_per_run"
WATCHED = "every memorized probe counts, at the event that calls it; see stop.num_probes and alerts"
REMOVED = {  # key of an earlier version: what takes its place
    "signals.decide": "set signals.terms (variance, loss, both) and signals.against (snapshot, unconditional, both)",
    "signals.null_draws": "the unconditional branch is measured at all noise draws",
    "dataset": "call memwatch.pick(dataset) before transforms and DataLoader, and pass what it returns as picked",
    "pick": "memwatch.pick takes probes, controls and columns; see also rotation",
    "on_memorized": "memwatch changes no dataloader; 'memwatch clean' writes the training set without what is stored",
    "screen": FULL,
    "full_every": FULL,
    "levels.screen_draws": "the screen takes one noise draw per level",
    "signals.unconditional": "the unconditional branch is always measured, where the model has one",
    "signals.combine": "noise levels are averaged",
    "regions": "a region is what reaches 1.1x and a share of the map's own peak",
    "snapshots": "the latest four events and the first stay usable as baselines, on disk",
    "heatmap": "the colour scale ends at 6x in every picture",
    "alerts.min_severity": ONE_RULE,
    "alerts.patience": ONE_RULE,
    "alerts.uncalibrated_severity": "without controls a probe is suspicious from 2x on",
    "proof.seeds": "a proof takes four generations per caption",
    "proof.num_inference_steps": "sampling.num_inference_steps holds for the proof as well",
    "proof.max_probes": "the four worst probes of an event are proved",
    "stop.patience": WATCHED,
    "stop.min_severity": ONE_RULE,
    "stop.max_p": "see alerts.false_alarms_per_run",
    "stop.verdict": WATCHED,
    "stop.checkpoint": "call accelerator.save_state where watch.should_stop is true",
}


def load_config(source: str | Path | Mapping[str, Any] | MemWatchConfig | None, **overrides: Any) -> MemWatchConfig:
    """Read a configuration.

    Args:
        source: a YAML file, a (nested) mapping, a ready configuration, or ``None`` for the defaults.
        overrides: top-level keys that replace the source's; a mapping is merged into the source's section.

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
        require(not merges or isinstance(section, Mapping), key, section, "a mapping")
        data[key] = {**section, **value} if merges else value
    config = _build(MemWatchConfig, data, "")
    assert isinstance(config, MemWatchConfig)
    return config


def _build(cls: type, data: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [item.name for item in fields(cls)]
    for key in data:
        if (why := REMOVED.get(f"{prefix}{key}")) is not None:
            shown = reprlib.repr(data[key])  # it may be a whole data set
            raise ConfigError(f"config key '{prefix}{key}' ({shown}) is gone: {why}")
        if key not in names:
            nearest = [f"{prefix}{name}" for name in difflib.get_close_matches(str(key), names, n=1, cutoff=0.7)]
            last, every = str(key).rpartition(".")[2], MemWatchConfig().to_dict()
            inside = [f"{section}.{last}" for section, part in every.items() if isinstance(part, dict) and last in part]
            nearest = [last] if last in every else inside or nearest
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(names)}"
            raise ConfigError(f"config key '{prefix}{key}' is unknown; {hint}")
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as ``hint`` wants it. Sections are built, lists become tuples, integers floats, and no more."""
    if is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        require(isinstance(value, Mapping), key, value, f"a mapping of {', '.join(item.name for item in fields(hint))}")
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
            require(math.isfinite(value), key, value, "a finite number")
        if isinstance(choice, type) and isinstance(value, choice) and (choice is bool or not isinstance(value, bool)):
            return value
    names = " or ".join("null" if c is types.NoneType else _type_name(c) for c in choices)
    raise ConfigError(f"config key '{key}': got {value!r}, allowed: {names}")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    return {int: "integer", float: "number", bool: "true or false", str: "text"}.get(hint, str(hint))
