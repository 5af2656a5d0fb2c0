"""Following a trainer's folder: each checkpoint as it appears, whatever happens to the folder meanwhile."""

from __future__ import annotations

import os
import shutil
from itertools import groupby
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from support import trainers as by
from support.builders import CONFIG, history, maps, picture, without_time
from support.followed import (
    QUICK,
    Script,
    following,
    interrupt,
    nothing,
    probes,
    rows_in,
    save_loras,
    steps_in,
)

import memwatch.scan.follow
from memwatch import Probe
from memwatch.measure.observer import Observer

ALERTING = QUICK  # with ``call_every_change`` the first event that compares calls both probes, and stops


@pytest.fixture(scope="module")
def loras(pretrained, tmp_path_factory) -> dict[int, Path]:
    """Three LoRA files of kohya's format, by step; tests copy them."""
    return save_loras(pretrained, tmp_path_factory.mktemp("loras"))


@pytest.fixture
def run(pretrained, loras, tmp_path):
    """A trainer's folder, and what happens in it."""

    class TrainersFolder:
        folder, output = tmp_path / "run", tmp_path / "run" / "memwatch"

        def file(self, step: int) -> Path:
            return self.folder / loras[step].name

        def save(self, *steps: int):
            def happens():
                self.folder.mkdir(exist_ok=True)
                for step in steps:
                    shutil.copy2(loras[step], self.file(step))

            return happens

        def write(self, step: int, data: bytes):
            def happens():
                self.folder.mkdir(exist_ok=True)
                self.file(step).write_bytes(data)

            return happens

        def delete(self, *steps: int):
            return lambda: [self.file(step).unlink() for step in steps]

        def follow(self, *happens, **options):
            follower = following(self.folder, pretrained, self.output, Script(*happens), **options)
            follower.run()
            return follower

    return TrainersFolder()


def by_turns(measured: list[str]) -> list[str]:
    """Names without what follows at once: the same probe without its prompt, or under other weights."""
    return [name for name, _ in groupby(measured)]


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Names of probes in the order in which they are measured."""
    names: list[str] = []
    real = Observer.measure

    def counting(self, view):
        names.append(view.key)
        return real(self, view)

    monkeypatch.setattr(Observer, "measure", counting)
    return names


# --- the same history as training's -----------------------------------------------------------------------------------


def test_full_checkpoints_begin_with_the_pipeline(trained, pretrained, images, tmp_path):
    """Step 0 of the history is what the training began with, which no trainer saves."""
    for step in (2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    given = {"config": CONFIG, "probes": str(images), "controls": [Probe("held out", picture(9), name="h")]}
    following(tmp_path / "run", pretrained, tmp_path / "memwatch", Script(), **given).run()
    assert without_time(history(tmp_path)) == without_time(history(trained))


# --- what happens in the folder ---------------------------------------------------------------------------------------


def test_checkpoints_are_scanned_as_they_come_in_order_of_step(run):
    assert not run.folder.exists()  # the trainer makes it later
    follower = run.follow(nothing, run.save(4, 2), nothing, nothing, run.save(6))
    assert steps_in(run.output) == [0, 2, 4, 6]
    assert follower.failed == []
    assert follower.stop_reason is None


@pytest.mark.parametrize("damage", ["truncated", "of another model"])
@pytest.mark.parametrize("step", [2, 4])
def test_what_cannot_be_read_is_named_and_the_next_ones_are_scanned(run, loras, damage, step, caplog):
    data = loras[step].read_bytes()
    broken = data[: len(data) // 2] if damage == "truncated" else data.replace(b"to_q", b"to_z")
    others = [other for other in (2, 4, 6) if other != step]
    run.save(*others)()
    run.write(step, broken)()
    follower = run.follow()
    assert steps_in(run.output) == [0, *others]
    assert [failed for failed, _, _ in follower.failed] == [step]
    assert follower.failed[0][2].endswith("(tried 3 times)")
    assert sum(f"checkpoint {step} is skipped" in message for message in caplog.messages) == 1


def test_a_look_that_fails_is_tried_again(run, monkeypatch):
    """The GPU may be full at this moment, because a trainer works on it."""
    real, views = Observer.view, []

    def view(self, p):
        views.append(p.name)
        if len(views) in (1, 2, 3, 4, 7, 8):  # the base twice, and the first checkpoint once
            raise RuntimeError("out of memory")
        return real(self, p)

    monkeypatch.setattr(Observer, "view", view)
    follower = run.follow(run.save(2, 4))
    assert steps_in(run.output) == [0, 2, 4]
    assert follower.failed == []


def test_a_base_of_another_size_is_named_and_the_first_checkpoint_is_the_baseline(pretrained, tmp_path, caplog):
    small = {"layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=16, attention_head_dim=4, **small, **blocks)
    for step in (3, 6):
        unet.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "unet")
    follower = following(tmp_path / "run", pretrained, tmp_path / "memwatch", Script())
    follower.run()
    assert steps_in(tmp_path / "memwatch") == [3, 6]
    assert [f["baseline_step"] for f in rows_in(tmp_path / "memwatch")[1]["findings"]] == [3, 3]
    assert [step for step, _, _ in follower.failed] == [0]


def test_prompts_are_compared_with_a_checkpoint_that_is_still_there(run):
    """With ``previous``, the weights of the event before are asked for; a trainer may have deleted them."""
    config = QUICK | {"signals": {"baseline": "previous"}}
    script = (run.save(2), nothing, nothing, run.delete(2), run.save(4))
    follower = run.follow(*script, config=config, probes=[Probe("a red poster", name="poster")])
    assert [row["findings"][0]["baseline_step"] for row in rows_in(run.output)] == [None, 0, 0]
    assert follower.failed == []


def save_with_text_encoder(pretrained: Path, file: Path, step: int) -> None:
    """A LoRA that leaves the network as it is, and changes what its text encoder says."""
    pipeline = StableDiffusionPipeline.from_pretrained(pretrained)
    unet, encoder = by.with_lora(pipeline.unet, ["to_q"]), by.with_lora(pipeline.text_encoder, by.TEXT, seed=step)
    factors = {layer: (down, 0 * up, alpha) for layer, (down, up, alpha) in by.factors_of(unet).items()}
    tensors = by.kohya(factors, "lora_unet_") | by.kohya(by.text_prefixed(by.factors_of(encoder)), "lora_te_")
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file, {"ss_steps": str(step)})


def test_a_text_encoder_that_is_trained_along_is_asked_at_every_event(pretrained, tmp_path):
    """Also after a restart, when the files of earlier events are gone."""
    files = {step: tmp_path / "run" / f"run-step{step:08d}.safetensors" for step in (2, 4)}
    for step, file in files.items():
        save_with_text_encoder(pretrained, file, step)
    given = {"probes": of_both_kinds(), "config": QUICK | {"sampling": CONFIG["sampling"]}}
    following(tmp_path / "run", pretrained, tmp_path / "memwatch", Script(), **given).run()
    scores = [[maps(tmp_path, step)[f"{p.name}/score"].max() for p in of_both_kinds()] for step in (2, 4)]
    assert all(score > 0 for row in scores for score in row)  # against step 0, where the LoRA is off
    assert scores[0] != scores[1]
    later = tmp_path / "later" / "run"
    later.mkdir(parents=True)
    first = shutil.copy2(files[2], later)
    following(later, pretrained, tmp_path / "later" / "memwatch", Script(), **given).run()
    Path(first).unlink()
    shutil.copy2(files[4], later)
    following(later, pretrained, tmp_path / "later" / "memwatch", Script(), **given).run()
    assert without_time(history(tmp_path / "later")) == without_time(history(tmp_path))


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unbroken(run, pretrained, loras, tmp_path):
    """The rows of a follower that was never ended."""
    whole = tmp_path / "whole"
    whole.mkdir()
    for file in loras.values():
        shutil.copy2(file, whole / file.name)
    following(whole, pretrained, tmp_path / "unbroken", Script(), probes=of_both_kinds()).run()
    return without_time(rows_in(tmp_path / "unbroken"))


def of_both_kinds() -> list[Probe]:
    return [*probes(), Probe("a red poster", name="poster", seed=3)]


def test_a_restart_goes_on_as_if_it_had_never_ended(run, unbroken, measured, monkeypatch):
    """Although the trainer has deleted by then what was looked at, and observations of the newest events are left."""
    monkeypatch.setattr(memwatch.scan.follow, "NEWEST", 2)
    run.follow(run.save(2, 4), nothing, nothing, nothing, nothing, interrupt, probes=of_both_kinds())
    assert steps_in(run.output) == [0, 2, 4]
    kept = (run.output / "observations").glob("step_*")
    assert sorted(file.name for file in kept) == ["step_0000002", "step_0000004"]
    measured.clear()
    run.delete(2, 4)()
    follower = run.follow(run.save(6), probes=of_both_kinds())
    assert follower.failed == []
    assert without_time(rows_in(run.output)) == unbroken
    assert by_turns(measured) == ["cat", "dog", "poster"]


def test_what_was_measured_of_an_unfinished_event_is_kept(run, unbroken, measured, monkeypatch):
    real = Observer.measure
    with monkeypatch.context() as patch:

        def measure(self, view):
            if view.key == "poster" and by_turns(measured)[3:] == ["cat", "dog"]:  # in the middle of step 2
                interrupt()
            return real(self, view)

        patch.setattr(Observer, "measure", measure)
        run.follow(run.save(2, 4, 6), probes=of_both_kinds())
    assert steps_in(run.output) == [0]
    assert by_turns(measured) == ["cat", "dog", "poster", "cat", "dog"]
    measured.clear()
    run.follow(probes=of_both_kinds())
    assert by_turns(measured)[:3] == ["poster", "cat", "dog"]  # the rest of step 2, then step 4
    assert without_time(rows_in(run.output)) == unbroken


@pytest.mark.parametrize("other", ["setting", "probe", "file", "record"])
def test_what_does_not_fit_begins_anew(run, caplog, measured, other):
    caplog.set_level("INFO", logger="memwatch")
    run.follow(run.save(2, 4))
    measured.clear()
    options = {}
    if other == "setting":
        options = {"config": QUICK | {"seed": 7}}
    elif other == "probe":
        options = {"probes": probes()[:1]}
    elif other == "file":
        os.utime(run.file(2), ns=(0, 0))
    else:
        (run.output / "observations" / "followed.json").write_text("{", encoding="utf-8")
    run.follow(**options)
    assert steps_in(run.output) == [0, 2, 4]
    assert any("the history is written anew" in message for message in caplog.messages)
    again = {"setting": [0, 2, 4], "probe": [], "file": [2, 4], "record": []}[other]  # the rest is kept
    assert by_turns(measured) == ["cat", "dog"] * len(again)


# --- what follows -----------------------------------------------------------------------------------------------------


STOPPED = "step 2: 2 probes memorized: a photo of a cat (cat), a photo of a dog (dog)"


@pytest.mark.usefixtures("eager")
class TestAlerts:
    def test_a_stop_is_written_into_the_folder_and_ends_it_also_after_a_restart(self, run, measured):
        follower, stop = run.follow(run.save(2, 4, 6), config=ALERTING), run.folder / "STOP"
        assert follower.stop_reason == STOPPED
        assert stop.read_text(encoding="utf-8") == f"memwatch: {STOPPED}\n"
        assert [row["stop_reason"] for row in rows_in(run.output)] == [None, STOPPED]
        stop.unlink()  # whoever trains on has removed it
        measured.clear()
        assert run.follow(config=ALERTING).stop_reason == STOPPED
        assert (measured, stop.exists()) == ([], False)

    def test_an_existing_stop_file_stays(self, run, caplog):
        caplog.set_level("INFO", logger="memwatch")
        run.folder.mkdir()
        (run.folder / "STOP").write_text("the night shift", encoding="utf-8")
        run.follow(run.save(2), config=ALERTING)
        assert (run.folder / "STOP").read_text(encoding="utf-8") == "the night shift"
        assert any("a trainer that checks for it ends at once" in message for message in caplog.messages)

    def test_a_stop_that_cannot_be_written_is_said(self, run, caplog, monkeypatch):
        def refused(file, text):
            raise PermissionError("read-only")

        monkeypatch.setattr(memwatch.scan.follow, "write_whole", refused)
        follower = run.follow(run.save(2), config=ALERTING)
        assert follower.stop_reason is not None
        assert any("the trainer has to be stopped by hand" in message for message in caplog.messages)


def test_the_page_is_written_after_each_event(run):
    pages = []
    read = lambda: pages.append((run.output / "report.html").read_text(encoding="utf-8"))  # noqa: E731
    run.follow(run.save(2), nothing, nothing, read, run.save(4), nothing, read)
    assert len(set(pages)) == 2
