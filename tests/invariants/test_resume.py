"""Resume equals never stopped: history, baselines and states survive ``save_state`` and ``load_state``."""

from __future__ import annotations

import json

import pytest
from support import builders
from support.builders import Loop, assert_same, history, maps, picture, without_time

from memwatch import MemWatchConfig, Probe
from memwatch.judge.verdict import ProbeState, Verdict
from memwatch.resume import Progress

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
        monkeypatch.setattr(MemWatchConfig, "screens", builders.SCREENS)
        builders.choose(monkeypatch, "row1", "row4", "poster", "control/a-dog")

    def start(folder: str):
        loop = Loop(pretrained, tmp_path / folder, **kind)
        return loop, loop.watch(
            pipeline,
            [*builders.probes_of_both_kinds(), *rows],
            controls=[Probe("a dog", picture(5))],
            config=builders.SMALL,
            rotation={"per_event": 2},
            signals={"baseline": baseline, "against": "snapshot"},
            stop={"enabled": False},
        )

    whole, unbroken = start("whole")
    whole.run(unbroken, 6)
    killed, watch = start("broken")
    killed.run(watch, 4, epochs=2)
    killed.accelerator.save_state(str(tmp_path / "checkpoint"))
    killed.run(watch, 6)
    assert [row["step"] for row in history(tmp_path / "broken")] == [0, 2, 4, 6]

    resumed, watch = start("broken")
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


def test_what_the_judge_remembers_survives_a_file():
    states = {
        "cat": ProbeState(since=4, highest=1.25, last_clean=2, scores=(9.0, 8.0), verdict=Verdict.SUSPICIOUS),
        "new": ProbeState(finite=False),
    }
    progress = Progress("run", 6, 4, 2, states=states)
    back = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
    assert back.states == progress.states
    assert Progress.from_dict(progress.to_dict()) == progress
