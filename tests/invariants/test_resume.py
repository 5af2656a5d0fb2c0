"""Resume equals never stopped: history, baselines, states and the stop survive ``save_state`` and ``load_state``."""

from __future__ import annotations

import json
import logging

import pytest
from support.builders import (
    EAGER,
    SCREENS,
    SMALL,
    Loop,
    assert_same,
    choose,
    history,
    maps,
    picture,
    probes_of_both_kinds,
    stop_at,
    without_time,
)

from memwatch import MemWatchConfig, Probe

ROWS = [Probe(f"row {i}", picture(20 + i), name=f"row{i}", row=i, in_rotation=True) for i in range(5)]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("kind", "baseline", "rows"),
    [
        ({"ema": True}, "previous", []),
        ({"lora": True, "checkpointing": True, "precision": "bf16"}, "last_clean", []),
        ({}, "first", ROWS),
    ],
    ids=["full", "lora", "screened, with rows in rotation"],
)
def test_resume_equals_never_stopped(kind, baseline, rows, pretrained, pipeline, tmp_path, monkeypatch):
    if rows:
        monkeypatch.setattr(MemWatchConfig, "screens", SCREENS)
        choose(monkeypatch, "row1", "row4", "poster", "control/a-dog")
    overrides = {
        "config": SMALL,
        "rotation": {"per_event": 2},
        "probes": [*probes_of_both_kinds(), *rows],
        "controls": [Probe("a dog", picture(5))],
        "signals": {"baseline": baseline, "against": "snapshot"},
        **EAGER,
        "stop": {"enabled": False},
    }
    whole = Loop(pretrained, tmp_path / "whole", **kind)
    unbroken = whole.watch(pipeline, **overrides)
    whole.run(unbroken, 6)

    killed = Loop(pretrained, tmp_path / "broken", **kind)
    watch = killed.watch(pipeline, **overrides)
    killed.run(watch, 4, epochs=2)
    killed.accelerator.save_state(str(tmp_path / "checkpoint"))
    killed.run(watch, 6)
    assert [row["step"] for row in history(tmp_path / "broken")] == [0, 2, 4, 6]

    resumed = Loop(pretrained, tmp_path / "broken", **kind)
    watch = resumed.watch(pipeline, **overrides)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    resumed.step = 4
    assert [row["step"] for row in history(tmp_path / "broken")] == [0, 2, 4]  # the later event is rewound
    kept = [0] if baseline == "first" else [0, 2, 4]
    assert watch.baselines.ledger.steps == watch.baselines.weights.steps == kept
    resumed.run(watch, 6)

    assert_same(whole.state(), resumed.state())
    assert_same(without_time(history(tmp_path / "whole")), without_time(history(tmp_path / "broken")))
    for step in (0, 2, 4, 6):
        assert_same(maps(tmp_path / "whole", step), maps(tmp_path / "broken", step))
    first, last = (json.loads(json.dumps(w.state_dict() | {"run": "", "clock": {}})) for w in (unbroken, watch))
    assert first == last
    assert any(state["last_clean"] is not None or state["since"] is not None for state in last["states"].values())


def test_resume_keeps_the_stop(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL)
    stop_at(2, monkeypatch)
    loop.run(watch, 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    monkeypatch.undo()
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline, config=SMALL)
    again.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert watch.stop_reason == "enough"
    assert list(watch.guard(again.loader)) == []


def test_resume_says_which_baselines_are_gone(pretrained, pipeline, tmp_path, caplog):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL)
    loop.run(watch, 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    (tmp_path / "memwatch" / "snapshots" / "step_0000000.safetensors").unlink()
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline, config=SMALL)
    with caplog.at_level(logging.WARNING, "memwatch"):
        again.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert any("baselines are missing" in message for message in caplog.messages)
    again.step = 2
    reports = again.run(watch, 6)
    found = [{f.name: f.observation.baseline_step for f in report.findings} for report in reports]
    assert found == [{"cat": 0, "poster": None}, {"cat": 0, "poster": 4}]
