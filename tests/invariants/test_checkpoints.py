"""Checkpoints with and without memwatch are loaded with and without it, and what does not fit is never compared."""

from __future__ import annotations

import json
import logging
from unittest.mock import Mock

import pytest
from support.builders import SMALL, Loop, history, maps, picture

from memwatch import Probe

CAT = Probe("a cat", picture(0), name="cat")
POSTER = Probe("a poster", name="poster")
AFRESH = "this checkpoint has no state of memwatch"


@pytest.fixture
def saved(pretrained, pipeline, tmp_path):
    """A run of two steps that was saved; the folder of its checkpoint."""
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, [CAT, POSTER], config=SMALL)
    loop.run(watch, 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    return tmp_path / "checkpoint"


def resumed(pretrained, pipeline, checkpoint, probes=(CAT, POSTER), **overrides):
    """A new process that goes on from it; the loop and the watch."""
    loop = Loop(pretrained, checkpoint.parent, ema=overrides.get("weights") == "ema")
    if loop.ema is not None:
        loop.accelerator._custom_objects.clear()
    watch = loop.watch(pipeline, list(probes), config=SMALL, **overrides)
    loop.accelerator.load_state(str(checkpoint))
    loop.step = 2
    return loop, watch


def baseline_steps(report) -> dict[str, int | None]:
    return {f.name: f.observation.baseline_step for f in report.findings}


def test_the_state_is_one_small_plain_file_and_the_checkpoint_is_loaded_without_memwatch(saved, pretrained):
    assert not list(saved.glob("custom_checkpoint*"))  # of which accelerate would miss the object that it belongs to
    state = json.loads((saved / "memwatch.json").read_text(encoding="utf-8"))
    progress = {"run", "last_step", "events", "every_steps", "clock", "stop", "states"}
    assert set(state) == progress | {"ledger", "weights", "faults", "losses", "actions"}
    assert state["run"] == json.loads((saved.parent / "memwatch" / "run.json").read_text(encoding="utf-8"))["run"]
    Loop(pretrained).accelerator.load_state(str(saved))


def test_a_checkpoint_without_memwatch_starts_it_afresh(pretrained, pipeline, tmp_path, caplog):
    loop = Loop(pretrained, tmp_path)
    loop.run(None, 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    with caplog.at_level(logging.WARNING, "memwatch"):
        again, watch = resumed(pretrained, pipeline, tmp_path / "checkpoint")
    assert sum(AFRESH in message for message in caplog.messages) == 1
    reports = again.run(watch, 4)
    assert baseline_steps(reports[-1]) == {"cat": 0, "poster": 0}
    assert maps(tmp_path, 4)["cat/collapse"].any()
    assert [row["step"] for row in history(tmp_path)] == [0, 3, 4]


@pytest.mark.parametrize("content", ["{", '{"run": "r"}', '{"last_step": 2, "errors": 0, "states": {}}'])
def test_a_state_that_cannot_be_read_or_is_an_older_ones_starts_afresh(content, saved, pretrained, pipeline, caplog):
    (saved / "memwatch.json").write_text(content, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "memwatch"):
        _, watch = resumed(pretrained, pipeline, saved, strict=False)
    assert sum(AFRESH in message for message in caplog.messages) == 1
    assert watch.begin(2) is not None


def test_two_watches_of_one_accelerator_have_a_state_each(pretrained, pipeline, tmp_path):
    for turn in range(2):
        loop = Loop(pretrained, tmp_path)
        watches = [loop.watch(pipeline, [CAT], output_dir=str(tmp_path / name)) for name in ("one", "two")]
        if turn == 0:
            for watch, step in zip(watches, (3, 5), strict=True):
                watch.begin(step)
            loop.accelerator.save_state(str(tmp_path / "checkpoint"))
        else:
            loop.accelerator.load_state(str(tmp_path / "checkpoint"))
        assert [watch.state_dict()["last_step"] for watch in watches] == [3, 5]


def test_a_disk_that_is_full_costs_the_state_and_not_the_checkpoint(
    pretrained, pipeline, tmp_path, monkeypatch, caplog
):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, [CAT])
    monkeypatch.setattr("memwatch.resume.write_json", Mock(side_effect=OSError("No space left on device")))
    with caplog.at_level(logging.WARNING, "memwatch"):
        loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    assert watch.faults.count == 1
    assert any("saving memwatch's state in the checkpoint failed" in message for message in caplog.messages)
    Loop(pretrained).accelerator.load_state(str(tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("probes", "overrides", "changed"),
    [
        ((CAT, POSTER), {"levels": {"draws": 3}}, ["cat"]),  # ended training with a RuntimeError
        ((CAT, POSTER), {"weights": "ema"}, ["cat", "poster"]),
        ((Probe("a cat", picture(1), name="cat"), POSTER), {}, ["cat"]),
        ((CAT, Probe("a dog", name="poster")), {}, ["poster"]),
        ((CAT, POSTER, Probe("new", picture(2), name="new")), {}, ["new"]),
    ],
    ids=["draws", "ema", "image", "prompt", "new"],
)
def test_what_does_not_fit_is_never_compared_and_is_said_once(
    probes, overrides, changed, saved, pretrained, pipeline, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING, "memwatch"):
        loop, watch = resumed(pretrained, pipeline, saved, probes, **overrides)
        reports = loop.run(watch, 6)
    (said,) = [message for message in caplog.messages if "not those of the checkpoint" in message]
    assert f"nothing to compare {', '.join(changed)} with" in said
    assert "resume with those of the checkpoint" in said
    others = {p.name: 0 for p in probes if p.name not in changed}
    assert [baseline_steps(r) for r in reports] == [others | dict.fromkeys(changed, step) for step in (None, 4)]
    assert [report.failure for report in reports] == [None, None]


def test_the_ledger_of_another_run_is_never_compared(saved, pretrained, pipeline, tmp_path):
    """Two runs with the same settings; the files of the second under the checkpoint of the first."""
    other = Loop(pretrained, tmp_path / "other", lr=0.5)
    watch = other.watch(pipeline, [CAT, POSTER], config=SMALL)
    other.run(watch, 2)
    for name in ("ledger", "snapshots"):
        for file in (tmp_path / "other" / "memwatch" / name).iterdir():
            (tmp_path / "memwatch" / name / file.name).write_bytes(file.read_bytes())
    loop, watch = resumed(pretrained, pipeline, saved)
    assert baseline_steps(loop.run(watch, 4)[-1]) == {"cat": None, "poster": None}
    (saved / "memwatch.json").unlink()  # a checkpoint without memwatch amid a run begins another run
    loop.accelerator.load_state(str(saved))
    assert baseline_steps(watch.begin(2)) == {"cat": None, "poster": None}
    assert [row["step"] for row in history(tmp_path)] == [2]
    assert (tmp_path / "memwatch" / "earlier" / "0001" / "history.jsonl").is_file()
