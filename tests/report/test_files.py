"""The files hold everything of an event and the loop's losses, agree with one another, and are rewound with the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.builders import SMALL, Loop, history, maps, picture
from support.finding import event
from support.runs import write_run
from support.trackers import Recorder

import memwatch.report.files
from memwatch import Probe
from memwatch.measure.probes import MIN_CONTROLS
from memwatch.report.files import FileSink, LossSink, is_validation_loss
from memwatch.report.history import Run, read_lines


def test_files_hold_everything_and_agree(pretrained, pipeline, tmp_path):
    loop, held_out = Loop(pretrained, tmp_path), [Probe(f"a dog {i}", picture(20 + i)) for i in range(MIN_CONTROLS)]
    reports = loop.run(loop.watch(pipeline, controls=held_out), 4)
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4]
    for report, row in zip(reports, rows[1:], strict=True):
        assert row == json.loads(json.dumps(report.to_dict()))
        found = maps(tmp_path, report.step)
        assert len(found) == 2 * sum(len(finding.signals.maps()) for finding in report.findings)
        for finding in report.findings:
            for key, value in finding.signals.maps().items():
                assert (found[f"{finding.name}/{key}"] == value.mean.float()).all()
                assert (found[f"{finding.name}/{key}.sem"] == value.sem.float()).all()
                levels = len(finding.observation.timesteps)
                assert found[f"{finding.name}/{key}"].shape == (
                    (8, 8) if key in ("decisive", "heatmap") else (levels, 8, 8)
                )
            mean = float(found[f"{finding.name}/collapse"].mean())
            assert row["scalars"][f"memwatch/collapse/{finding.name}"] == pytest.approx(mean, abs=1e-4)
            saved = Image.open(tmp_path / "memwatch" / "heatmaps" / finding.name / f"step_{report.step:07d}.jpg")
            assert_alike(saved, report.pictures[finding.name])
    assert not list((tmp_path / "memwatch").rglob("*.part*"))


def test_a_line_cut_off_by_a_crash_is_forgotten_on_rewinding(tmp_path):
    sink = FileSink(tmp_path)
    sink.rewind(3)  # nothing there yet
    write_run(tmp_path, [{"name": "cat"}], [{"step": step} for step in (0, 3, 6)])
    file = tmp_path / "history.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines) + '{"ste', encoding="utf-8")
    sink.rewind(3)
    assert file.read_text(encoding="utf-8") == "".join(lines[:2])


def assert_alike(saved, picture):
    """The same but for what JPEG loses, in grey values of 255."""
    lost = np.abs(np.asarray(saved, float) - np.asarray(picture, float))
    assert lost.mean() < 8  # random pixels lose the most; two of them differ by 85


@pytest.mark.usefixtures("eager")
def test_images_lie_there_once_or_per_event_of_a_prompt_and_generations_side_by_side(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    watch = loop.watch(pipeline, config=SMALL, stop={"enabled": False})
    reports, folder = [watch.begin(), *loop.run(watch, 2)], tmp_path / "memwatch"
    proofs = {f"generations/{f.name}": f.proof.generations for f in reports[-1].findings if f.proof is not None}
    assert "generations/cat" in proofs
    expected = {f"{place}/step_0000002.jpg": np.concatenate(list(parts), 1) for place, parts in proofs.items()}
    for report in reports:
        cat, poster = (finding.observation.image for finding in report.findings)
        expected |= {"images/cat.png": cat, f"images/poster/step_{report.step:07d}.jpg": poster}
    written = {file.relative_to(folder).as_posix(): file for file in folder.glob("[gi][em]*s/**/*.*")}
    assert written.keys() == expected.keys()
    for name, file in written.items():
        assert Image.open(file).size == expected[name].shape[1::-1]
        assert_alike(Image.open(file), expected[name])


# --- validation losses ------------------------------------------------------------------------------------------------

YES = """val_loss val/loss validation_loss eval_loss loss/val loss/validation/step_average test_loss eval_cats_loss
valid_loss Validation/Loss val_loss_epoch loss_test train/val_loss eval/diffusion_loss loss/validation/epoch_average"""
NO = """train_loss loss interval_loss evaluator_time value_loss lr step_loss loss/average latest_loss eval_runtime
val_accuracy validation test loss/validation/step_divergence contest_loss loss/current glossy_val prior_loss"""


def test_the_names_that_trainers_use():
    assert [key for key in YES.split() if not is_validation_loss(key)] == []
    assert [key for key in NO.split() if is_validation_loss(key)] == []


def rows(folder: Path) -> list[tuple[int, str, float]]:
    return [(row["step"], row["key"], row["value"]) for row in read_lines(folder / "losses.jsonl")]


def test_numbers_of_any_make_are_kept_and_nothing_else(tmp_path, monkeypatch):
    sink = LossSink(tmp_path)
    sink.note({"val_loss": torch.tensor(0.5), "test_loss": np.float32(0.25), "loss": 9.0, "eval/loss": 2}, np.int64(3))
    for value in (math.nan, math.inf, "many", None, torch.ones(2), [0.1], object()):
        sink.note({"val_loss": value}, 4)
    assert not (tmp_path / "losses.jsonl").exists()
    sink.write(event(0))
    written = [(3, "val_loss", 0.5), (3, "test_loss", 0.25), (3, "eval/loss", 2.0)]
    assert rows(tmp_path) == written
    with monkeypatch.context() as patch:
        patch.setattr(memwatch.report.files, "append", refuse)
        with pytest.raises(OSError, match="No space"):
            sink.note({"val_loss": 0.5}, 5)
    sink.note({"val_loss": 0.4}, 6)  # what a full disk refused is written later
    assert rows(tmp_path) == [*written, (5, "val_loss", 0.5), (6, "val_loss", 0.4)]
    assert sink.count == 5


def refuse(*args, **kwargs):
    raise OSError(28, "No space left on device")


def log_losses(loop: Loop) -> None:
    """A training loss at every step, and a validation loss at odd ones."""
    values = {"train_loss": 1.0} | ({"val_loss": loop.step / 10} if loop.step % 2 else {})
    loop.accelerator.log(values, step=loop.step)


def test_what_the_loop_logs_arrives_unchanged_and_its_validation_losses_are_kept(pretrained, pipeline, tmp_path):
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    loop.run(loop.watch(pipeline, config=SMALL), 4, each=log_losses)
    logged = [row for row in recorder.rows if "memwatch/step" not in row[1]]
    loss = {"train_loss": 1.0}
    assert logged == [(1, loss | {"val_loss": 0.1}), (2, loss), (3, loss | {"val_loss": 0.3}), (4, loss)]
    assert Run.read(tmp_path / "memwatch").losses == ((1, "val_loss", 0.1), (3, "val_loss", 0.3))


def test_a_loss_before_the_first_event_never_lands_among_the_files_of_another_run(pretrained, pipeline, tmp_path):
    def watch_and_log(value: float):
        loop = Loop(pretrained, tmp_path, log_with=Recorder())
        watch = loop.watch(pipeline, config=SMALL)
        loop.accelerator.log({"val_loss": value}, step=0)
        return watch

    first = watch_and_log(0.5)
    first.begin()
    first.close()
    watch_and_log(0.6).close()  # without any event
    assert rows(tmp_path / "memwatch") == [(0, "val_loss", 0.5)]
    watch_and_log(0.7).begin()
    assert rows(tmp_path / "memwatch") == [(0, "val_loss", 0.7)]
    assert rows(tmp_path / "memwatch" / "earlier" / "0001") == [(0, "val_loss", 0.5)]


def test_a_resume_keeps_the_losses_up_to_the_checkpoint(pretrained, pipeline, tmp_path):
    """The checkpoint is of step 3, the last event before it of step 2."""
    killed = Loop(pretrained, tmp_path, log_with=Recorder())
    watch = killed.watch(pipeline, config=SMALL)
    killed.run(watch, 3, each=log_losses, epochs=1)
    killed.accelerator.save_state(str(tmp_path / "checkpoint"))
    killed.run(watch, 6, each=log_losses)
    assert [step for step, *_ in rows(tmp_path / "memwatch")] == [1, 3, 5]

    resumed = Loop(pretrained, tmp_path, log_with=Recorder())
    watch = resumed.watch(pipeline, config=SMALL)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert [step for step, *_ in rows(tmp_path / "memwatch")] == [1, 3]
    resumed.step = 3
    resumed.run(watch, 5, each=log_losses)
    assert [step for step, *_ in rows(tmp_path / "memwatch")] == [1, 3, 5]
    assert watch.state_dict()["losses"] == 3
