"""Reading a configuration: files, overrides, and what is said of keys and values that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from memwatch.config import ConfigError, LevelsConfig, MemWatchConfig
from memwatch.config_file import load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SECTIONS = ("levels", "curvature", "signals", "sampling", "regions", "alerts", "proof", "stop", "snapshots", "heatmap")


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


def test_round_trip_through_yaml(tmp_path):
    config = load_config({"every_steps": 7, "probes": ["a", "b"], "levels": {"timesteps": [1, 2]}, "resolution": 512})
    path = tmp_path / "c.yaml"
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items() if k != "levels"}
    path.write_text(yaml.safe_dump(values))
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
    sections = {"heatmap": {"max_factor": 4}, "levels": {"timesteps": [1, 2]}}
    config = load_config(sections | {"output_dir": Path("a/b"), "probes": ["x"]})
    assert isinstance(config.heatmap.max_factor, float)
    assert config.levels.timesteps == (1, 2)
    assert config.output_dir == str(Path("a/b"))
    assert config.probes == ("x",)
    assert load_config({"resolution": None, "probes": "folder"}).probes == "folder"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("every_step", "every_steps"),
        ("outputdir", "output_dir"),
        ("level", "levels"),
        ("control", "controls"),
        ("levels.timestep", "levels.timesteps"),
        ("curvature.vector", "curvature.vectors"),
        ("signals.term", "signals.terms"),
        ("signals.agianst", "signals.against"),
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
        ("every_steps", "10", "integer or null"),
        ("every_steps", 1.5, "integer or null"),
        ("every_steps", True, "integer or null"),
        ("full_every", None, "integer"),
        ("output_dir", 3, "text"),
        ("probes", 3, "text or list of text or null"),
        ("picked", ["a"], "text or null"),
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


BEFORE = {  # signals.decide of version 0.1 -> terms, against
    "log_ratio": ("variance", "snapshot"),
    "log_ratio_null": ("variance", "unconditional"),
    "loss_log_ratio": ("loss", "snapshot"),
    "both": ("both", "snapshot"),
    "both_baselines": ("both", "both"),
}


@pytest.mark.parametrize("value", BEFORE)
def test_the_old_key_names_the_new_ones(value):
    terms, against = BEFORE[value]
    message = f"config key 'signals.decide' ('{value}') is replaced by: {{terms: {terms}, against: {against}}}"
    for source, overrides in [({"signals": {"decide": value}}, {}), (None, {"signals": {"decide": value}})]:
        with pytest.raises(ConfigError) as caught:
            load_config(source, **overrides)
        assert str(caught.value) == message
    config = load_config({"signals": {"terms": terms, "against": against}})  # what it says can be used
    assert (config.signals.terms, config.signals.against) == (terms, against)


def test_the_old_key_with_another_value_names_all_new_ones():
    with pytest.raises(ConfigError) as caught:
        load_config({"signals": {"decide": "score"}})
    for old, (terms, against) in BEFORE.items():
        assert f"{old} is now {{terms: {terms}, against: {against}}}" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "key", "instead"),
    [
        ({"dataset": "train"}, "dataset", r"call memwatch.pick\(dataset\) before transforms and DataLoader"),
        ({"pick": {"hold_out": 20}}, "pick", "memwatch.pick takes probes, controls and columns; see also rotation"),
        ({"on_memorized": "drop"}, "on_memorized", "'memwatch clean' writes the training set without what is stored"),
        ({"signals": {"null_draws": 2}}, "signals.null_draws", "at all noise draws"),
    ],
)
def test_a_key_that_is_gone_says_what_takes_its_place(given, key, instead):
    for source, overrides in ((given, {}), (None, given)):
        with pytest.raises(ConfigError, match=rf"config key '{key}' \(.*\) is gone: .*{instead}"):
            load_config(source, **overrides)


def test_a_data_set_that_is_passed_as_before_is_not_written_out():
    with pytest.raises(ConfigError, match="is gone: call memwatch.pick") as caught:
        load_config(None, dataset=[{"image": "x" * 1000}] * 1000)
    assert len(str(caught.value)) < 400


def test_the_default_is_what_the_old_default_is_now():
    signals = load_config(None).signals
    assert (signals.terms, signals.against) == BEFORE["both_baselines"]


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
