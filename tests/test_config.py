"""The configuration: every value is checked, and named when it is wrong."""

from __future__ import annotations

import dataclasses

import pytest

from memwatch.config import ConfigError, MemWatchConfig, SignalsConfig, require
from memwatch.config_file import load_config

SECTIONS = (
    *("rotation", "levels", "curvature", "signals", "sampling", "regions"),
    *("alerts", "proof", "stop", "snapshots", "heatmap"),
)


def nested(key, value):
    section, _, name = key.rpartition(".")
    return {section: {name: value}} if section else {name: value}


def test_sections_listed_here_are_all_there_are():
    assert tuple(name for name, value in vars(MemWatchConfig()).items() if dataclasses.is_dataclass(value)) == SECTIONS


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemWatchConfig().every_steps = 3


BAD = {
    "every_steps": [0, -1],
    "rotation.rows": [-1],
    "rotation.per_event": [-1],
    "alerts.webhook": ["$", "$no-name"],
    "stop.verdict": ["", "inconclusive"],
    "output_dir": [""],
    "resolution": [0, 7],
    "weights": ["EMA", ""],
    "precision": ["bf16", ""],
    "levels.timesteps": [[], [2, 1], [1, 1], [-1, 2]],
    "levels.draws": [0],
    "curvature.vectors": [0],
    "curvature.tile": [0, -2, 3],
    "curvature.batch_size": [0],
    "signals.terms": ["score", "", "log_ratio"],
    "signals.against": ["first", ""],
    "signals.combine": ["min"],
    "signals.smooth": [0, 2, -1],
    "signals.baseline": ["", "last", "lag", "lag:", "lag:0", "lag:-1", "lag:x", "first:1", "path", "path:"],
    "sampling.look": ["first_step", ""],
    "sampling.seeds": [0],
    "sampling.num_inference_steps": [1],
    "sampling.guidance_scale": [0.5],
    "regions.min_factor": [1.0, 0.0, float("nan")],
    "regions.min_area": [0.0, 0.015, 1.0],
    "regions.relative": [-0.1, 1.0],
    "alerts.false_alarms_per_run": [0.0, 1.0, float("nan")],
    "alerts.uncalibrated_severity": [1.0],
    "alerts.max_p": [0.0, 1.1, float("nan")],
    "alerts.min_severity": [1.0],
    "alerts.patience": [0],
    "proof.seeds": [0],
    "proof.num_inference_steps": [1],
    "proof.max_probes": [0],
    "stop.num_probes": [0],
    "stop.patience": [0],
    "stop.min_severity": [1.0],
    "stop.max_p": [0.0, 2.0],
    "snapshots.keep": [0],
    "heatmap.max_factor": [1.0, -2.0],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_bad_value_names_key_value_and_what_is_allowed(key, value):
    with pytest.raises(ConfigError) as caught:
        load_config(nested(key, value))
    shown = tuple(value) if isinstance(value, list) else value
    assert str(caught.value).startswith(f"config key '{key}': got {shown!r}, allowed: ")


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_configuration_made_in_python_is_checked_alike(key, value):
    section, _, name = key.rpartition(".")
    kind = type(getattr(MemWatchConfig(), section)) if section else MemWatchConfig
    with pytest.raises(ConfigError, match=f"config key '{key}': got "):
        kind(**{name: value})


@pytest.mark.parametrize(
    "baseline", ["first", "previous", "last_clean", "base", "lag:1", "lag:12", "path:a/b.safetensors"]
)
def test_good_baselines(baseline):
    assert load_config({"signals": {"baseline": baseline}}).signals.baseline == baseline


@pytest.mark.parametrize(
    ("baseline", "parts", "is_fixed"),
    [
        ("first", ("first", ""), False),
        ("lag:12", ("lag", "12"), False),
        ("base", ("base", ""), True),
        ("path:a:b.safetensors", ("path", "a:b.safetensors"), True),
    ],
)
def test_parts_of_a_baseline(baseline, parts, is_fixed):
    signals = SignalsConfig(baseline=baseline)
    assert (signals.baseline_parts, signals.baseline_is_fixed) == (parts, is_fixed)


def test_null_branch_must_be_looked_at_to_decide():
    with pytest.raises(ConfigError, match=r"signals.unconditional.*true, because signals.against is unconditional"):
        load_config({"signals": {"against": "unconditional", "unconditional": False}})


def test_one_replicate_is_refused():
    with pytest.raises(ConfigError, match=r"levels.draws.*one replicate has no error bar"):
        load_config({"levels": {"draws": 1}})


def test_a_key_that_is_gone_says_why():
    with pytest.raises(ConfigError, match=r"'signals.null_draws' \(2\) is gone: the unconditional branch is looked at"):
        load_config({"signals": {"null_draws": 2}})


@pytest.mark.parametrize(
    ("terms", "draws", "refused"),
    [
        ("variance", 1, None),
        ("loss", 1, "levels.draws"),
        ("both", 1, "levels.draws"),
        ("loss", 2, None),
        ("both", 2, None),
    ],
)
def test_what_decides_needs_two_replicates(terms, draws, refused):
    """16 vectors in blocks of 8: one draw has 2 replicates of the variance, but one of the loss."""
    given = {"levels": {"draws": draws}, "curvature": {"vectors": 16}, "signals": {"terms": terms}}
    if refused is None:
        assert load_config(given).levels.draws == draws
        return
    with pytest.raises(ConfigError, match=rf"config key '{refused}': got 1, allowed: 2 or greater with .*"):
        load_config(given)


@pytest.mark.parametrize(
    ("draws", "wanted", "expected"), [(8, 4, 4), (2, 4, 2), (9, 4, 3), (6, 4, 3), (5, 4, 1), (4, 1, 1)]
)
def test_seeds_are_rounded_down_to_a_divisor(draws, wanted, expected):
    assert load_config({"levels": {"draws": draws}, "sampling": {"seeds": wanted}}).seeds == expected


def test_the_last_step_is_looked_at_for_one_seed():
    with pytest.raises(ConfigError, match=r"sampling.seeds': got 4, allowed: 1, because sampling.look is last_step"):
        load_config({"sampling": {"look": "last_step"}})
    assert load_config({"sampling": {"look": "last_step", "seeds": 1}}).seeds == 1


def test_a_stop_cannot_wait_for_a_copy_that_nobody_looks_for():
    with pytest.raises(ConfigError, match=r"stop.require_copy': got True, allowed: false, because proof.enabled is"):
        load_config({"stop": {"require_copy": True}, "proof": {"enabled": False}})


def test_require():
    require(True, "a", 1, "b")
    with pytest.raises(ValueError, match=r"^config key 'a': got 1, allowed: b$"):
        require(False, "a", 1, "b")


def test_a_webhook_is_a_secret():
    config = load_config({"alerts": {"webhook": "https://hooks.example.com/services/T0/secret?key=1"}})
    assert config.to_show()["alerts"]["webhook"] == "https://hooks.example.com/..."
    assert load_config({"alerts": {"webhook": "$HOOK"}}).to_show()["alerts"]["webhook"] == "$HOOK"
    assert MemWatchConfig().to_show() == MemWatchConfig().to_dict()
    with pytest.raises(ConfigError) as caught:
        load_config({"alerts": {"webhook": "ftp://host/secret"}})
    assert "secret" not in str(caught.value)
