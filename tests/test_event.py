"""One event: forward passes screen, curvature is measured where they say so, rows rotate, alerts are generated."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from support import builders
from support.builders import Loop, assert_same, call_every_change, choose, history, maps, picture, without_time

import memwatch.config
import memwatch.judge.findings
import memwatch.measure.observer
from memwatch import MemWatchConfig, Probe
from memwatch.judge.verdict import Verdict
from memwatch.measure.signals import decide
from memwatch.proof.prove import NUM_SEEDS

STRICT = builders.CONFIG | {"strict": True, "stop": {"enabled": False}}
CAT, POSTER = builders.probes_of_both_kinds()
NAMES = ["cat", "poster"]
ROWS = [Probe(f"row {i}", picture(20 + i), name=f"row{i}", row=i, in_rotation=True) for i in range(5)]
screened = pytest.mark.usefixtures("screened")


def measured(report) -> list[str]:
    """Whose curvature was measured and judged."""
    return [f.name for f in report.judgement.everything if f.observation.now.rho is not None]


@screened
def test_an_event_measures_curvature_of_what_the_screen_chooses(pretrained, pipeline, images, tmp_path, monkeypatch):
    choose(monkeypatch, "cat", "control/control0")
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, controls=images, config=STRICT)
    first = watch.begin()
    later = loop.run(watch, 4)
    assert measured(first) == []
    assert [measured(report) for report in later] == [["cat", "control/control0"]] * 2
    assert [r.scalars()["memwatch/measured"] for r in (first, *later)] == [0, 4, 4]  # all controls that are images
    cat, poster = later[0].findings
    assert cat.signals.snapshot.variance is not None
    assert poster.signals.snapshot.variance is None
    assert_same(poster.signals.heatmap.samples, decide(poster.signals, "loss", "both").samples.mean(0))
    chosen, *others = later[0].judgement.controls
    assert chosen.signals.snapshot.variance is not None
    assert [f.signals.snapshot.variance for f in others] == [None, None]  # measured, but judged as the screen saw them
    keys = later[0].scalars().keys()
    assert {"memwatch/collapse/cat", "memwatch/loss_log_ratio/poster", "memwatch/severity/poster"} <= keys
    assert "memwatch/collapse/poster" not in keys


@pytest.mark.parametrize("kind", [{}, {"lora": True, "precision": "bf16", "checkpointing": True}, {"ema": True}])
def test_the_baseline_measured_afterwards_is_that_measured_at_once(kind, pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch, *NAMES)
    for name, screens in (("full", False), ("screened", True)):
        monkeypatch.setattr(MemWatchConfig, "screens", screens)
        loop = Loop(pretrained, tmp_path / name, **kind)
        loop.run(loop.watch(pipeline, config=STRICT), 4)
    for step in (2, 4):
        assert_same(maps(tmp_path / "screened", step), maps(tmp_path / "full", step))
    rows = [without_time(history(tmp_path / name))[1:] for name in ("screened", "full")]
    assert_same([row["findings"] for row in rows[0]], [row["findings"] for row in rows[1]])


@screened
@pytest.mark.parametrize("swappable", [True, False])
def test_the_baseline_is_measured_once(swappable, pretrained, pipeline, tmp_path, monkeypatch):
    """Where weights cannot be exchanged, at once."""
    choose(monkeypatch, "cat")
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, [CAT], config=STRICT)
    watch.observer.ranks = replace(watch.observer.ranks, swappable=swappable)
    swaps, real = [], memwatch.measure.observer.swapped
    monkeypatch.setattr(memwatch.measure.observer, "swapped", lambda *a: swaps.append(loop.step) or real(*a))
    reports = [watch.begin(), *loop.run(watch, 6)]
    assert swaps == ([2] if swappable else [])
    assert [measured(report) for report in reports] == [[] if swappable else ["cat"], *[["cat"]] * 3]
    assert reports[-1].findings[0].signals.snapshot.variance is not None
    assert watch.baselines.weights.steps == ([0] if swappable else [])


@screened
def test_a_frozen_model_reads_exactly_zero_and_nothing_of_it_is_chosen(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=0.0)
    (report,) = loop.run(loop.watch(pipeline, controls=images, config=STRICT), 2)
    assert measured(report) == []
    for finding in report.judgement.everything:
        assert finding.signals.decisive.mean.max() <= 0, finding.name  # the prompt itself may raise the loss
        assert not finding.signals.snapshot.loss.samples.any()
        assert finding.severity == 1.0


@screened
def test_everything_is_measured_every_so_often_and_prompts_generate_once(pretrained, pipeline, tmp_path, monkeypatch):
    choose(monkeypatch)
    monkeypatch.setattr(memwatch.config, "FULL_EVERY", 2)
    loop, calls, real = Loop(pretrained, tmp_path), [], memwatch.measure.observer.generate
    monkeypatch.setattr(memwatch.measure.observer, "generate", lambda *a, **k: calls.append(loop.step) or real(*a, **k))
    reports = loop.run(loop.watch(pipeline, config=STRICT, proof={"enabled": False}), 8)
    assert [measured(report) for report in reports] == [[], NAMES, [], NAMES]
    assert calls == [0, 2, 4, 6, 8]


@screened
@pytest.mark.parametrize(("is_gone", "expected"), [(False, [[0, None], [0, 2]]), (True, [[None, None], [2, 2]])])
def test_without_a_baseline_a_probe_gets_a_new_one(
    is_gone, expected, pretrained, pipeline, tmp_path, monkeypatch, caplog
):
    """One that came later, and one whose earlier weights are gone."""
    choose(monkeypatch, "cat", "new")
    loop = Loop(pretrained, tmp_path)
    first = loop.watch(pipeline, [CAT], config=STRICT)
    loop.run(first, 1)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    if is_gone:
        (tmp_path / "memwatch" / "snapshots" / "step_0000000.safetensors").unlink()
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline, [CAT, Probe("new", picture(7), name="new")], config=STRICT)
    with caplog.at_level(logging.WARNING, "memwatch"):
        again.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert any("baselines are missing" in message for message in caplog.messages) == is_gone
    again.step = 1
    reports = again.run(watch, 4)
    assert [[f.observation.baseline_step for f in report.findings] for report in reports] == expected
    for report, steps in zip(reports, expected, strict=True):
        assert measured(report) == [n for n, step in zip(("cat", "new"), steps, strict=True) if step is not None]


ROTATING = STRICT | {"rotation": {"per_event": 2}}


def call_only(monkeypatch, name: str) -> None:
    """As ``call_every_change``, for one probe."""
    call_every_change(monkeypatch)
    strong = memwatch.judge.findings.evidence_of

    def evidence_of(compared, *args):
        evidence = strong(compared, *args)
        return evidence if compared.observation.name == name else replace(evidence, p=1.0, any_controls=True)

    monkeypatch.setattr(memwatch.judge.findings, "evidence_of", evidence_of)


@screened
def test_rows_go_round_and_one_that_stands_out_stays(pretrained, pipeline, images, tmp_path, monkeypatch):
    call_only(monkeypatch, "row1")
    choose(monkeypatch, "row1")
    loop, rotated = Loop(pretrained, tmp_path), []
    watch = loop.watch(pipeline, config=ROTATING, probes=[CAT, *ROWS], controls=images)

    def note(loop):
        rotated.append([p.name for p in watch.observer.probes if p.probe.in_rotation])

    loop.run(watch, 6, each=note)
    assert rotated[1::2] == [["row0", "row1"], ["row1", "row2", "row3"], ["row0", "row1", "row4"]]
    lines = history(tmp_path)
    told = [{f["name"]: f["verdict"] for f in line["findings"] if f["name"] != "cat"} for line in lines]
    assert told == [{}, *[{"row1": "memorized"}] * 3]  # no quiet row
    assert [line["scalars"].get("memwatch/rotated") for line in lines] == [None, 2, 3, 3]


@screened
def test_a_row_reads_what_it_would_as_a_probe(pretrained, pipeline, images, tmp_path, monkeypatch):
    """Its baseline is measured only when it is rotated in, under the weights that were kept."""
    call_every_change(monkeypatch)
    choose(monkeypatch, "row0", "cat")
    for name, row in (("rotated", ROWS[0]), ("fixed", replace(ROWS[0], in_rotation=False))):
        loop = Loop(pretrained, tmp_path / name)
        loop.run(loop.watch(pipeline, config=ROTATING, probes=[CAT, row], controls=images), 4)
    rotated, fixed = (without_time(history(tmp_path / name)) for name in ("rotated", "fixed"))
    for step in (1, 2):
        for key in ("name", "severity", "p", "regions", "levels", "verdict", "baseline"):
            assert_same(rotated[step]["findings"][1][key], fixed[step]["findings"][1][key], key)
    assert rotated[1]["findings"][1]["verdict"] == "memorized"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("lr", "enabled"), [(1e-2, True), (1e-2, False), (0.0, True)])
def test_an_alert_is_generated_once(lr, enabled, pretrained, pipeline, tmp_path, monkeypatch):
    """At step 2 both are news; at 4 they are still memorized, which is none. Where nothing changes, nothing is."""
    calls, real = [], memwatch.measure.observer.Observer.generate
    counting = lambda self, *call: calls.append(call) or real(self, *call)  # noqa: E731
    monkeypatch.setattr(memwatch.measure.observer.Observer, "generate", counting)
    loop = Loop(pretrained, tmp_path, lr=lr)
    watch = loop.watch(pipeline, stop={"enabled": False}, proof={"enabled": enabled})
    first, second = loop.run(watch, 4)
    proven = bool(lr and enabled)
    assert [f.name for f in first.alerts] == (NAMES if lr else [])
    assert second.alerts == ()
    assert calls == ([("a photo of a cat", NUM_SEEDS)] if proven else [])  # the poster's generations were there
    assert [f.proof is not None for f in (*first.findings, *second.findings)] == [proven, proven, False, False]
    assert ("memwatch/num_copied" in first.scalars()) == proven
    if proven:
        cat, poster = first.findings
        assert [f.verdict for f in second.findings] == [Verdict.MEMORIZED] * 2
        assert cat.proof.generations.shape == (NUM_SEEDS, 16, 16, 3)
        assert poster.proof.generations is poster.observation.generations
        assert [f["copied"]["generations"] for f in history(tmp_path)[1]["findings"]] == [NUM_SEEDS, 2]
        assert [f["copied"]["grade"] for f in history(tmp_path)[1]["findings"]] == [cat.proof.grade, poster.proof.grade]
        assert cat.proof.grade < 1


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("copies", [True, False])
def test_a_stop_can_wait_for_a_copy(copies, pretrained, pipeline, images, tmp_path, monkeypatch):
    """Until there is one, the probe is generated from again at every event."""
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, [CAT], controls=images, stop={"require_copy": True})
    with watch.observer.borrowed():
        pictures = watch.observer.pictures()
    made, generated = pictures["cat"] if copies else np.asarray(picture(77)), []
    generate = lambda caption, count: generated.append(caption) or np.stack([made] * count)  # noqa: E731
    monkeypatch.setattr(watch.observer, "generate", generate)
    reports = loop.run(watch, 6)
    assert [report.step for report in reports] == ([2] if copies else [2, 4, 6])
    assert len(generated) == len(reports)
    assert watch.should_stop == copies
