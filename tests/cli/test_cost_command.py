"""The command ``memwatch cost``: a table with every kind of event; what cannot be done is one clear line."""

from __future__ import annotations

import json
import re

import pytest
from support.builders import CONFIG
from support.processes import new_process

from memwatch.bench.events import FIRST, FULL, SCREENED, USUAL, Numbers, event_passes, multiplied, varied
from memwatch.cli import main
from memwatch.config_file import load_config
from memwatch.measure.measure import count_passes
from memwatch.pace import CHOSEN

SCREENING = CONFIG | {"screen": True, "every_steps": None, "curvature": {"vectors": 2, "tile": 2}}


@pytest.fixture
def cost(pretrained, tmp_path, capsys):
    """Runs the command with settings; its exit code and what it printed."""

    def run(*arguments, model=pretrained, settings=SCREENING):
        new_process()
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        code = main(["cost", str(model), "--device", "cpu", "--config", str(file), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_table_has_every_event_and_the_passes_of_count_passes(cost):
    code, out, _ = cost("--probes", 3, "--controls", 5, "--prompts", 2, "--brief", "--step-seconds", 0.5)
    assert code == 0
    passes = count_passes(load_config(SCREENING), 8, 2)
    rows = {line.split(" | ")[1]: line.split(" | ") for line in out.splitlines() if line.startswith("| as given | ")}
    assert rows[SCREENED][2] == f"{passes.of_event(0):.0f}"
    assert rows[USUAL][2] == f"{passes.of_event(CHOSEN):.0f}"
    assert rows[FULL][2] == f"{passes.of_event(1):.0f}"
    assert "times 8 (reference) and 2 (prompt)" in out
    assert "A step of the loop takes 0.5 s (--step-seconds). In a run of 2000 steps" in out
    assert "memwatch step" not in out


def test_numbers_as_json(cost):
    code, out, _ = cost("--probes", 2, "--controls", 0, "--steps", 300, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["probes"] == {"references": 2, "prompts": 0}
    assert found["loop"]["known"] == "timed: this model, batch 1, AdamW on all parameters"
    names = [setting["name"] for setting in found["settings"]]
    assert names == ["as given", *(s.name for s in varied(load_config(SCREENING)))]
    for setting in found["settings"]:
        assert set(setting["events"]) == {FIRST, SCREENED, USUAL, FULL}
        assert all(event["seconds"] > 0 for event in setting["events"].values())
        assert setting["ledger_bytes"] > 0
        assert setting["weights_bytes"] > 0  # of the screened first event
        assert 25 <= setting["pace"]["every_steps"] <= 75  # four events in 300 steps


def test_without_a_screen_every_event_is_full(cost):
    code, out, _ = cost("--probes", 2, "--brief", "--step-seconds", 1, settings=CONFIG)
    assert code == 0
    events = [line.split(" | ")[1] for line in out.splitlines() if line.startswith("| as given | ")]
    assert events[:2] == [FIRST, FULL]
    assert "| as given | 2 steps |" in out  # the user's own interval


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "--steps: got 0, allowed: 1 or greater"),
        (["--probes", -1], "--probes: got -1, allowed: 0 or greater"),
        (["--probes", 0, "--controls", 0], "--probes: got 0, allowed: 1 or greater, since there are no controls"),
        (["--step-seconds", "nan"], "--step-seconds: got nan, allowed: greater than 0"),
        (["--batch-size", 0], "--batch-size: got 0, allowed: 1 or greater"),
        (["--dtype", "int8"], "--dtype: got 'int8', allowed: float32, float16, bfloat16"),
        (["--device", "tpu"], "--device: got 'tpu', allowed: cpu"),
    ],
)
def test_bad_options_are_one_clear_line(cost, arguments, message):
    code, out, err = cost(*arguments)
    said = [line for line in err.splitlines() if line.startswith("memwatch cost: ")]
    assert (code, out, len(said)) == (2, "", 1)
    assert message in said[0]


def test_an_unknown_model_is_one_clear_line(cost, tmp_path):
    for model in (tmp_path / "none", tmp_path):
        code, _, err = cost(model=model)
        assert code == 2
        assert re.search(r"memwatch cost: MODEL: got .*, allowed: the folder or hub id of a diffusers pipeline", err)


# --- passes and seconds ----------------------------------------------------------------------------------------------


def test_the_first_event_looks_at_prompts_once():
    config = load_config(SCREENING)
    passes, references = count_passes(config, 4, 3), count_passes(config, 4, 0)
    found = event_passes(config, Numbers(4, 3), branches=2)
    assert found[FIRST] == references.screen + (passes.screen - references.screen) / 2 + passes.sampling
    full = event_passes(load_config(CONFIG), Numbers(4, 3), branches=2)
    assert set(full) == {FIRST, FULL}
    assert full[FIRST] < full[FULL] == count_passes(load_config(CONFIG), 4, 3).of_event(1)


def test_what_one_more_costs_is_never_negative():
    assert multiplied(3.0, 5.0, 10) == 21
    assert multiplied(5.0, 4.0, 10) == 3 + 20
