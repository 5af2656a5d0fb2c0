"""Rows that take turns: a few per event, compared with the first weights; what stands out keeps its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.builders import CONFIG, EAGER, Loop, assert_same, call_every_change, choose, history, picture, without_time

import memwatch.judge.findings
from memwatch import Probe

SCREENED = CONFIG | {"screen": True, "strict": True, "rotation": {"per_event": 2}}
ROWS = [Probe(f"row {i}", picture(20 + i), name=f"row{i}", row=i, in_rotation=True) for i in range(5)]
CAT = Probe("a photo of a cat", picture(0), name="cat")


def on_turn(watch) -> list[str]:
    return [p.name for p in watch.observer.probes if p.probe.in_rotation]


def call_only(monkeypatch, name: str) -> None:
    """As ``call_every_change``, for one probe."""
    call_every_change(monkeypatch)
    strong = memwatch.judge.findings.evidence_of

    def evidence_of(observation, *args):
        evidence = strong(observation, *args)
        return evidence if observation.name == name else replace(evidence, severity_low=1.0)

    monkeypatch.setattr(memwatch.judge.findings, "evidence_of", evidence_of)


def whose_turn(loop, watch, steps: int) -> list[list[str]]:
    """At each event after the first."""
    turns = []
    loop.run(watch, steps, each=lambda loop: turns.append(on_turn(watch)) if loop.step % 2 == 0 else None)
    return turns


def test_rows_go_round_two_at_a_time_and_quiet_ones_are_no_findings(pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch)
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SCREENED, probes=[CAT, *ROWS])
    assert on_turn(watch) == []
    assert whose_turn(loop, watch, 6) == [["row0", "row1"], ["row2", "row3"], ["row0", "row4"]]
    lines = history(tmp_path)
    assert [[f["name"] for f in line["findings"]] for line in lines] == [["cat"]] * 4
    assert [line["scalars"].get("memwatch/rotated") for line in lines] == [None, 2, 2, 2]


def test_a_row_reads_what_it_would_as_a_probe(pretrained, pipeline, images, tmp_path, monkeypatch):
    """Its baseline is measured only at its turn, under the weights that were kept."""
    call_every_change(monkeypatch)
    config = SCREENED | EAGER | {"alerts": {"patience": 1}, "stop": {"enabled": False}}
    choose(monkeypatch, "row0", "cat")
    for name, rows in (("turns", ROWS[:1]), ("fixed", [Probe(ROWS[0].prompt, ROWS[0].image, name="row0", row=0)])):
        loop = Loop(pretrained, tmp_path / name)
        loop.run(loop.watch(pipeline, config=config, probes=[CAT, *rows], controls=images), 4)
    turned, fixed = (without_time(history(tmp_path / name)) for name in ("turns", "fixed"))
    for step in (1, 2):
        assert [f["name"] for f in turned[step]["findings"]] == ["cat", "row0"]
        for key in ("severity", "p", "regions", "levels", "verdict", "baseline"):
            assert_same(turned[step]["findings"][1][key], fixed[step]["findings"][1][key], key)
    assert turned[1]["findings"][1]["verdict"] == "memorized"


def test_what_stands_out_keeps_its_place_beside_the_others(pretrained, pipeline, images, tmp_path, monkeypatch):
    call_only(monkeypatch, "row1")
    choose(monkeypatch, "row1")
    config = SCREENED | EAGER | {"alerts": {"patience": 2}, "stop": {"enabled": False}}
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=config, probes=[CAT, *ROWS], controls=images)
    assert whose_turn(loop, watch, 6) == [["row0", "row1"], ["row1", "row2", "row3"], ["row0", "row1", "row4"]]
    verdicts = [{f["name"]: f["verdict"] for f in line["findings"]}.get("row1") for line in history(tmp_path)]
    assert verdicts == [None, "suspicious", "memorized", "memorized"]


@pytest.mark.parametrize("kind", [{}, {"lora": True}])
def test_training_is_untouched(kind, pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch, "row1", "row2")
    alone = Loop(pretrained, **kind)
    alone.run(None, 4)
    loop = Loop(pretrained, tmp_path, **kind)
    loop.run(loop.watch(pipeline, config=SCREENED, probes=[CAT, *ROWS]), 4)
    assert_same(alone.state(), loop.state())


def test_a_resumed_run_goes_on_with_the_next_rows(pretrained, pipeline, images, tmp_path, monkeypatch):
    call_every_change(monkeypatch)
    choose(monkeypatch, "row1", "row4")
    config = SCREENED | EAGER | {"alerts": {"patience": 2}, "stop": {"enabled": False}}

    def start():
        loop = Loop(pretrained, tmp_path)
        return loop, loop.watch(pipeline, config=config, probes=[CAT, *ROWS], controls=images)

    def save(loop):
        if loop.step == 4:
            loop.accelerator.save_state(str(tmp_path / "checkpoint"))

    loop, watch = start()
    loop.run(watch, 8, each=save)
    watch.close()
    unbroken = without_time(history(tmp_path))
    loop, watch = start()
    loop.accelerator.load_state(str(tmp_path / "checkpoint"))
    loop.step = 4
    loop.run(watch, 8)
    assert_same(without_time(history(tmp_path)), unbroken)
