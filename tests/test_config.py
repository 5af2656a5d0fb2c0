import dataclasses
from pathlib import Path

import pytest
import yaml

from memwatch.config import ConfigError, LevelsConfig, MemWatchConfig, check, load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SECTIONS = ("levels", "curvature", "signals", "sampling", "regions", "alerts", "stop", "snapshots", "heatmap")


def nested(key, value):
    section, _, name = key.rpartition(".")
    return {section: {name: value}} if section else {name: value}


def test_defaults():
    assert load_config(None) == load_config({}) == MemWatchConfig()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_file_loads(path):
    assert isinstance(load_config(path), MemWatchConfig)


def test_there_are_shipped_files():
    assert "default.yaml" in [path.name for path in CONFIGS]


def test_default_file_is_the_defaults():
    assert load_config(next(path for path in CONFIGS if path.name == "default.yaml")) == MemWatchConfig()


def test_sections_listed_here_are_all_there_are():
    assert tuple(name for name, value in vars(MemWatchConfig()).items() if dataclasses.is_dataclass(value)) == SECTIONS


def test_round_trip_through_yaml(tmp_path):
    config = load_config({"every_steps": 7, "probes": ["a", "b"], "levels": {"timesteps": [1, 2]}, "resolution": 512})
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(
            {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items() if k != "levels"}
        )
    )
    assert load_config(path, levels={"timesteps": [1, 2]}) == config
    assert load_config(config.to_dict()) == config
    assert load_config(config) == config


def test_yaml_merged_with_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("every_steps: 10\ncurvature: {vectors: 16, tile: 4}\nalerts: {patience: 5}\n")
    config = load_config(path, every_steps=20, curvature={"tile": 8}, stop={"enabled": False})
    assert config.every_steps == 20
    assert (config.curvature.vectors, config.curvature.tile) == (16, 8)
    assert config.alerts.patience == 5
    assert not config.stop.enabled
    assert config.heatmap == MemWatchConfig().heatmap
    assert load_config(str(path)).every_steps == 10


def test_overrides_on_a_ready_configuration():
    config = load_config(MemWatchConfig(every_steps=3), levels={"draws": 2})
    assert (config.every_steps, config.levels.draws, config.levels.timesteps) == (3, 2, LevelsConfig().timesteps)
    assert load_config(None, levels=LevelsConfig(draws=9)).levels.draws == 9


def test_overrides_do_not_change_the_source():
    source = {"levels": {"draws": 3}}
    load_config(source, levels={"timesteps": [5]}, every_steps=2)
    assert source == {"levels": {"draws": 3}}


def test_conversions():
    config = load_config(
        {"heatmap": {"max_factor": 4}, "levels": {"timesteps": [1, 2]}, "output_dir": Path("a/b"), "probes": ["x"]}
    )
    assert isinstance(config.heatmap.max_factor, float)
    assert config.levels.timesteps == (1, 2)
    assert config.output_dir == str(Path("a/b"))
    assert config.probes == ("x",)
    assert load_config({"resolution": None, "probes": "folder"}).probes == "folder"


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemWatchConfig().every_steps = 3


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("every_step", "every_steps"),
        ("outputdir", "output_dir"),
        ("level", "levels"),
        ("control", "controls"),
        ("levels.timestep", "levels.timesteps"),
        ("curvature.vector", "curvature.vectors"),
        ("signals.decides", "signals.decide"),
        ("sampling.guidance", "sampling.guidance_scale"),
        ("regions.min_factors", "regions.min_factor"),
        ("alerts.patient", "alerts.patience"),
        ("stop.enable", "stop.enabled"),
        ("snapshots.keeps", "snapshots.keep"),
        ("heatmap.maxfactor", "heatmap.max_factor"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError, match=rf"config key '{key}' is unknown; did you mean '{nearest}'\?"):
        load_config(nested(key, 1))


def test_unknown_key_far_from_all_lists_them():
    with pytest.raises(ConfigError, match=r"config key 'heatmap.zzz' is unknown; known keys: max_factor"):
        load_config({"heatmap": {"zzz": 1}})
    with pytest.raises(ConfigError, match="'every_stepz' is unknown"):
        load_config(None, every_stepz=3)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("every_steps", "10", "integer"),
        ("every_steps", 1.5, "integer"),
        ("every_steps", True, "integer"),
        ("every_steps", None, "integer"),
        ("output_dir", 3, "text"),
        ("probes", 3, "text or list of text or null"),
        ("resolution", "big", "integer or null"),
        ("strict", 1, "true or false"),
        ("levels.timesteps", 61, "list of integer"),
        ("levels.draws", [4], "integer"),
        ("curvature.tile", 8.0, "integer"),
        ("signals.smooth", "3", "integer"),
        ("signals.unconditional", "yes", "true or false"),
        ("sampling.guidance_scale", "7", "number"),
        ("regions.min_area", None, "number"),
        ("alerts.max_p", True, "number"),
        ("stop.enabled", 0, "true or false"),
        ("snapshots.on_disk", "no", "true or false"),
        ("heatmap.max_factor", [8], "number"),
    ],
)
def test_wrong_type(key, value, allowed):
    with pytest.raises(ConfigError) as caught:
        load_config(nested(key, value))
    assert str(caught.value) == f"config key '{key}': got {value!r}, allowed: {allowed}"


def test_wrong_type_inside_a_list():
    with pytest.raises(ConfigError, match=r"config key 'levels.timesteps\[1\]': got 'x', allowed: integer"):
        load_config({"levels": {"timesteps": [1, "x"]}})
    with pytest.raises(ConfigError, match=r"config key 'probes\[0\]': got 1, allowed: text"):
        load_config({"probes": [1]})


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [3, "x", [1], None])
def test_a_section_is_a_mapping(section, value):
    with pytest.raises(ConfigError, match=rf"config key '{section}': got .*, allowed: a mapping of "):
        load_config({section: value})


BAD = {
    "every_steps": [0, -1],
    "output_dir": [""],
    "resolution": [0, 7],
    "weights": ["EMA", ""],
    "levels.timesteps": [[], [2, 1], [1, 1], [-1, 2]],
    "levels.draws": [0],
    "curvature.vectors": [0],
    "curvature.tile": [0, -2, 3, 16],
    "curvature.batch_size": [0],
    "signals.decide": ["score", ""],
    "signals.combine": ["min"],
    "signals.smooth": [0, 2, -1],
    "signals.baseline": ["", "last", "lag", "lag:", "lag:0", "lag:-1", "lag:x", "first:1", "path", "path:"],
    "sampling.num_inference_steps": [1],
    "sampling.guidance_scale": [0.5],
    "regions.min_factor": [1.0, 0.0, float("nan")],
    "regions.min_area": [-0.1, 1.0],
    "signals.null_draws": [0],
    "regions.relative": [-0.1, 1.0],
    "alerts.uncalibrated_severity": [1.0],
    "alerts.max_p": [0.0, 1.1, float("nan")],
    "alerts.min_severity": [1.0],
    "alerts.patience": [0],
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


@pytest.mark.parametrize(
    "baseline", ["first", "previous", "last_clean", "base", "lag:1", "lag:12", "path:a/b.safetensors"]
)
def test_good_baselines(baseline):
    assert load_config({"signals": {"baseline": baseline}}).signals.baseline == baseline


def test_null_branch_must_be_looked_at_to_decide():
    with pytest.raises(ConfigError, match=r"signals.unconditional.*true, because signals.decide is log_ratio_null"):
        load_config({"signals": {"decide": "log_ratio_null", "unconditional": False}})


def test_one_replicate_is_refused():
    with pytest.raises(ConfigError, match=r"levels.draws.*one replicate has no error bar"):
        load_config({"levels": {"draws": 1}})
    assert (
        load_config(
            {"levels": {"draws": 1}, "curvature": {"vectors": 16}, "signals": {"decide": "log_ratio"}}
        ).levels.draws
        == 1
    )
    with pytest.raises(ConfigError, match=r"signals.null_draws.*2 or greater with signals.decide = both_baselines"):
        load_config({"signals": {"null_draws": 1}})


@pytest.mark.parametrize(
    ("draws", "wanted", "expected"), [(8, 2, 2), (8, 3, 4), (9, 2, 3), (3, 2, 3), (4, 99, 4), (6, 6, 6)]
)
def test_null_draws_are_rounded_up_to_a_divisor(draws, wanted, expected):
    assert load_config({"levels": {"draws": draws}, "signals": {"null_draws": wanted}}).null_draws == expected


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"config file .*missing\.yaml"):
        load_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match=r"config file .*broken\.yaml"):
        load_config(broken)
    broken.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match=r"config: got list, allowed: a mapping"):
        load_config(broken)
    broken.write_text("")
    assert load_config(broken) == MemWatchConfig()


def test_check():
    check(True, "a", 1, "b")
    with pytest.raises(ValueError, match=r"^config key 'a': got 1, allowed: b$"):
        check(False, "a", 1, "b")


@pytest.mark.parametrize("source", [[], False, 0, "text-file"])
def test_a_source_that_is_no_mapping_is_refused(source, tmp_path):
    if source == "text-file":
        source = tmp_path / "list.yaml"
        source.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(source)


def test_an_override_does_not_hide_a_bad_section():
    with pytest.raises(ConfigError, match="'levels': got 3"):
        load_config({"levels": 3}, levels={"draws": 2})


def test_numbers_are_finite():
    with pytest.raises(ConfigError, match=r"'alerts.min_severity': got inf, allowed: a finite number"):
        load_config({"alerts": {"min_severity": float("inf")}})
