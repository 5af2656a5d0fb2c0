"""The configuration: read from files and arguments, every value checked, and named when it is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.builders import SCREENS

from memwatch.config import FULL_EVERY, ConfigError, LevelsConfig, MemWatchConfig
from memwatch.config_file import REMOVED, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SECTIONS = [item.name for item in dataclasses.fields(MemWatchConfig) if dataclasses.is_dataclass(item.default_factory)]


def nested(key, value):
    section, _, name = key.rpartition(".")
    return {section: {name: value}} if section else {name: value}


NAN = float("nan")
BAD = {
    "every_steps": [0, -1],
    "max_train_steps": [0],
    "overhead": [0.0, 1.0, NAN],
    "output_dir": [""],
    "resolution": [0, 7],
    "weights": ["EMA", ""],
    "precision": ["bf16", ""],
    "rotation.rows": [-1],
    "rotation.per_event": [-1],
    "levels.timesteps": [[], [2, 1], [1, 1], [-1, 2]],
    "levels.draws": [0],
    "curvature.vectors": [0],
    "curvature.tile": [0, -2, 3],
    "curvature.batch_size": [0],
    "signals.terms": ["score", ""],
    "signals.against": ["first", ""],
    "signals.smooth": [0, 2, -1],
    "signals.baseline": ["", "last", "lag", "lag:", "lag:0", "lag:-1", "lag:x", "first:1", "path", "path:"],
    "sampling.look": ["first_step", ""],
    "sampling.seeds": [0],
    "sampling.num_inference_steps": [1],
    "sampling.guidance_scale": [0.5],
    "alerts.false_alarms_per_run": [0.0, 1.0, NAN],
    "alerts.max_p": [0.0, 1.1, NAN],
    "alerts.webhook": ["$", "$no-name"],
    "stop.num_probes": [0],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_value_names_key_value_and_what_is_allowed(key, value):
    section, _, name = key.rpartition(".")
    kind = type(getattr(MemWatchConfig(), section)) if section else MemWatchConfig
    with pytest.raises(ConfigError) as caught:
        load_config(nested(key, value))
    shown = tuple(value) if isinstance(value, list) else value
    assert str(caught.value).startswith(f"config key '{key}': got {shown!r}, allowed: ")
    if value != float("inf"):  # a configuration made in Python is checked alike
        with pytest.raises(ConfigError, match=f"config key '{key}': got "):
            kind(**{name: value})


def test_values_that_exclude_each_other():
    with pytest.raises(ConfigError, match=r"levels.draws.*one replicate has no error bar"):
        load_config({"levels": {"draws": 1}})
    single = {"levels": {"draws": 1}, "curvature": {"vectors": 16}}  # 4 replicates of the variance, one of the loss
    assert load_config(single, signals={"terms": "variance"}).levels.draws == 1
    with pytest.raises(ConfigError, match=r"levels.draws': got 1, allowed: 2 or greater with signals.terms = loss"):
        load_config(single, signals={"terms": "loss"})
    with pytest.raises(ConfigError, match=r"sampling.seeds': got 4, allowed: 1, because sampling.look is last_step"):
        load_config({"sampling": {"look": "last_step"}})
    with pytest.raises(ConfigError, match=r"stop.require_copy': got True, allowed: false, because proof.enabled is"):
        load_config({"stop": {"require_copy": True}, "proof": {"enabled": False}})


@pytest.mark.parametrize(("draws", "wanted", "expected"), [(8, 4, 4), (2, 4, 2), (9, 4, 3), (6, 4, 3), (5, 4, 1)])
def test_seeds_are_rounded_down_to_a_divisor(draws, wanted, expected):
    assert load_config({"levels": {"draws": draws}, "sampling": {"seeds": wanted}}).seeds == expected


@pytest.mark.parametrize(
    ("settings", "screens"),
    [
        ({}, True),
        ({"signals": {"baseline": "base"}}, True),
        ({"signals": {"baseline": "previous"}}, False),
        ({"signals": {"terms": "variance"}}, False),
        ({"sampling": {"look": "last_step", "seeds": 1}}, False),
    ],
)
def test_a_screen_takes_a_loss_and_a_baseline_that_stays(settings, screens, monkeypatch):
    monkeypatch.setattr(MemWatchConfig, "screens", SCREENS)
    config = load_config(settings)
    assert config.screens is screens
    full = [n for n in range(2 * FULL_EVERY + 1) if config.is_full_event(n)]
    assert full == ([FULL_EVERY, 2 * FULL_EVERY] if screens else list(range(2 * FULL_EVERY + 1)))


def test_a_webhook_is_a_secret():
    config = load_config({"alerts": {"webhook": "https://hooks.example.com/services/T0/secret?key=1"}})
    assert config.to_show()["alerts"]["webhook"] == "https://hooks.example.com/..."
    assert load_config({"alerts": {"webhook": "$HOOK"}}).to_show()["alerts"]["webhook"] == "$HOOK"
    with pytest.raises(ConfigError) as caught:
        load_config({"alerts": {"webhook": "ftp://host/secret"}})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_file_loads(path):
    assert (load_config(path) == MemWatchConfig()) == (path.name == "default.yaml")
    assert load_config(None) == load_config({}) == MemWatchConfig()


def test_round_trip_through_yaml(tmp_path):
    config = load_config({"every_steps": 7, "probes": ["a", "b"], "levels": {"timesteps": [1, 2]}, "resolution": 512})
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(config.to_dict()))  # JSON is YAML
    assert load_config(path) == load_config(config.to_dict()) == load_config(config) == config


def test_overrides_are_merged_and_change_no_source(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("every_steps: 10\ncurvature: {vectors: 16, tile: 4}\nalerts: {max_p: 0.5}\n")
    config = load_config(str(path), every_steps=20, curvature={"tile": 8}, stop={"enabled": False})
    assert (config.every_steps, config.alerts.max_p, config.stop.enabled) == (20, 0.5, False)
    assert (config.curvature.vectors, config.curvature.tile) == (16, 8)
    source = {"levels": {"draws": 3}}
    assert load_config(source, levels={"timesteps": [5]}).levels == LevelsConfig(timesteps=(5,), draws=3)
    assert source == {"levels": {"draws": 3}}
    assert load_config(MemWatchConfig(every_steps=3), levels={"draws": 2}).levels == LevelsConfig(draws=2)
    assert load_config(None, levels=LevelsConfig(draws=9)).levels.draws == 9
    with pytest.raises(ConfigError, match="'levels': got 3"):
        load_config({"levels": 3}, levels={"draws": 2})


@pytest.mark.parametrize(("text", "message"), [("a: [1", "broken.yaml"), ("- 1\n", "got list, allowed: a mapping")])
def test_files_and_sources_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"config.*{message}"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "broken.yaml").write_text("")
    assert load_config(tmp_path / "broken.yaml") == MemWatchConfig()
    for source, said in ((tmp_path / "missing.yaml", r"config file .*missing\.yaml"), ([], "mapping"), (0, "mapping")):
        with pytest.raises(ConfigError, match=said):
            load_config(source)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("every_step", "did you mean 'every_steps'?"),
        ("signals.agianst", "did you mean 'signals.against'?"),
        ("max_p", "did you mean 'alerts.max_p'?"),
        ("stop.baseline", "did you mean 'signals.baseline'?"),
        ("alerts.max_q", "did you mean 'alerts.max_p'?"),
        ("proof.zzz", "known keys: enabled"),
    ],
)
def test_an_unknown_key_names_the_nearest_or_all(key, hint):
    with pytest.raises(ConfigError) as caught:
        load_config(nested(key, 1))
    assert str(caught.value) == f"config key '{key}' is unknown; {hint}"


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_key_says_what_replaces_it(key):
    assert "." in key or key not in SECTIONS
    for source, overrides in ((nested(key, 2), {}), (None, nested(key, 2))):
        with pytest.raises(ConfigError) as caught:
            load_config(source, **overrides)
        assert str(caught.value) == f"config key '{key}' (2) is gone: {REMOVED[key]}"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("every_steps", 1.5, "integer or null"),
        ("every_steps", True, "integer or null"),
        ("output_dir", 3, "text"),
        ("probes", 3, "text or list of text or null"),
        ("strict", 1, "true or false"),
        ("levels.timesteps", 61, "list of integer"),
        ("levels.draws", [4], "integer"),
        ("alerts.max_p", True, "number"),
        *((section, value, "a mapping of ") for section in SECTIONS for value in (3, None)),
    ],
)
def test_wrong_type(key, value, allowed):
    with pytest.raises(ConfigError) as caught:
        load_config(nested(key, value))
    assert str(caught.value).startswith(f"config key '{key}': got {value!r}, allowed: {allowed}")
    with pytest.raises(ConfigError, match=r"config key 'levels.timesteps\[1\]': got 'x', allowed: integer"):
        load_config({"levels": {"timesteps": [1, "x"]}})
