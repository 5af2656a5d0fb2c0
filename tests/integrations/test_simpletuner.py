"""memwatch in a miniature of SimpleTuner: as its custom tracker, and after its checkpoints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.builders import SMALL, history, picture, stop_at
from support.mini_simpletuner import Trainer, modules

import memwatch.integrations.simpletuner as simpletuner
from memwatch.config import StopConfig
from memwatch.measure.observer import Observer
from memwatch.report.history import Event, Row

TRACKER = """\
from memwatch.integrations.simpletuner import SimpleTunerTracker


class Tracker(SimpleTunerTracker):
    settings = {settings!r}
"""


@pytest.fixture
def train(pretrained, tmp_path, monkeypatch):
    """Trains, with memwatch as the tracker unless ``watch`` is ``None``; the trainer."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "simpletuner.custom_trackers.memwatch_tracker", None)  # taken back at the end
    (tmp_path / "probes").mkdir()
    picture(0).save(tmp_path / "probes" / "cat.png")
    (tmp_path / "probes" / "cat.txt").write_text("a cat", encoding="utf-8")
    (tmp_path / "custom-trackers").mkdir()

    def train(watch=(), folder="run", run=True, submit=print, **config):
        if watch is not None:
            settings = tmp_path / "memwatch.yaml"
            chosen = SMALL | {"probes": str(tmp_path / "probes")} | dict(watch)
            settings.write_text(json.dumps(chosen), encoding="utf-8")
            tracker = tmp_path / "custom-trackers" / "memwatch_tracker.py"
            tracker.write_text(TRACKER.format(settings=str(settings)), encoding="utf-8")
            config["custom_tracker"] = "memwatch_tracker"
        common = {"output_dir": str(tmp_path / folder), "pretrained_model_name_or_path": str(pretrained)}
        trainer = Trainer(common | config, tmp_path, submit)
        if run:
            trainer.run()
        return trainer

    return train


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.params])


# --- the tracker -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"model_type": "full"}, {"train_text_encoder": True}])
def test_a_run_is_watched_and_left_as_it_was(train, tmp_path, config):
    bare = train(None, "bare", **config)
    watched = train(**config)
    assert torch.equal(weights(bare), weights(watched))
    assert [row["step"] for row in history(tmp_path / "run")] == [0, 2, 4]
    assert history(tmp_path / "run")[-1]["scalars"]["memwatch/collapse/cat"] != 0
    assert watched.accelerator.trackers[0].watch.config.max_train_steps == 4


def test_the_baseline_is_the_model_before_the_first_step(train, monkeypatch):
    seen = []
    observe = Observer.observe

    def noting(self, *args, **kwargs):
        seen.append(sum(p.detach().abs().sum().item() for n, p in self.model.named_parameters() if "lora_B" in n))
        return observe(self, *args, **kwargs)

    monkeypatch.setattr(Observer, "observe", noting)
    train()
    assert seen[0] == 0 < seen[1]
    assert len(seen) == 3


def test_a_stop_ends_the_loop_with_simpletuners_own_save(train, tmp_path, monkeypatch):
    stop_at(2, monkeypatch)
    trainer = train(max_train_steps=50)
    assert trainer.state["global_step"] == 2
    assert trainer.is_saved
    assert (tmp_path / "run" / "memwatch" / "report.html").is_file()


def test_failures_end_no_run(train, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(Observer, "observe", fail)
    assert train({"strict": False}).is_saved
    assert "broken" in history(tmp_path / "run")[0]["failure"]


def test_a_resumed_run_goes_on(train, tmp_path):
    train(max_train_steps=2)
    train(resume_from_checkpoint="checkpoint-2")
    rows = history(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[-1]["findings"][0]["baseline_step"] == 0


@pytest.mark.parametrize(
    ("watch", "config", "environment", "message"),
    [
        ({"evry_steps": 2}, {}, {}, "did you mean 'every_steps'"),
        ({"on_memorized": "drop"}, {}, {}, "config key 'on_memorized'"),
        ({}, {}, {"WORLD_SIZE": "2"}, "one process, not 2"),
    ],
)
def test_wrong_settings_end_the_program_as_it_starts(train, monkeypatch, capsys, watch, config, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        train(watch, run=False, **config)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("watch", "config", "message"),
    [
        ({"probes": "nowhere"}, {}, "nowhere"),
        ({}, {"lora_type": "lycoris"}, "--lora_type: got lycoris"),
        ({}, {"controlnet": True}, "--controlnet"),
    ],
)
def test_wrong_setups_end_the_program_before_the_first_step(train, capsys, watch, config, message):
    trainer = train(watch, run=False, **config)
    with pytest.raises(SystemExit) as ended:
        trainer.run()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert trainer.state["global_step"] == 0


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(monkeypatch):
    """Commands and environments of the scans that would run, each with the exit code 0."""
    found = []

    def run(command, env):
        found.append((command, env))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return found


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoint-2"
    folder.mkdir(parents=True)
    return folder


def event(step, verdict="memorized", copied=None):
    return {
        "step": step,
        "findings": [{"name": "cat", "verdict": verdict, "severity": 3.0, "p": 1e-6} | (copied or {})],
    }


def write_history(folder, *events):
    folder.mkdir(exist_ok=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")


def test_a_checkpoint_is_scanned_against_its_base(train, pretrained, tmp_path, monkeypatch):
    """A real scan, as SimpleTuner would start it."""
    settings = tmp_path / "scan.json"
    settings.write_text(json.dumps(SMALL), encoding="utf-8")
    options = ["--pretrained", pretrained, "--images", tmp_path / "probes", "--config", settings, "--device", "cpu"]
    script = "python -m memwatch.integrations.simpletuner --checkpoint {local_checkpoint_path} "
    codes = []

    def submit(command):
        with monkeypatch.context() as launched:
            launched.setenv("WORLD_SIZE", "2")  # as accelerate launch leaves it
            codes.append(simpletuner.main(command[3:]))

    train(None, submit=submit, max_train_steps=2, post_checkpoint_script=script + shlex.join(map(str, options)))
    assert codes == [0]
    (row,) = history(tmp_path / "run")
    assert row["step"] == 2
    assert row["findings"][0]["baseline"] == "the base model (LoRA off)"
    assert row["scalars"]["memwatch/collapse/cat"] != 0


def test_a_scan_gets_what_the_script_does_not_know(scans, checkpoint):
    assert simpletuner.main(["--checkpoint", str(checkpoint), "--images", "train", "--baseline", "first"]) == 0
    ((command, _),) = scans
    parent = str(checkpoint.parent)
    assert command[1:4] == ["-m", "memwatch", "scan"]
    assert command[4:7] == [parent, "--output", os.path.join(parent, "memwatch")]
    assert command[7:] == ["--images", "train", "--baseline", "first"]


def test_a_scan_hears_nothing_of_the_launch(scans, checkpoint, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION", "ROLE_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("NAME", "kept")
    for device in ([], ["--device", "cpu"], ["--device", "1"]):
        simpletuner.main(["--checkpoint", str(checkpoint), *device])
    where = [(env["CUDA_VISIBLE_DEVICES"], env.get("ACCELERATE_USE_CPU")) for _, env in scans]
    assert where == [("0", None), ("", "true"), ("1", "false")]
    for _, env in scans:
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} & set(env)
        assert "ROLE_WORLD_SIZE" not in env
        assert env["NAME"] == "kept"


def test_a_stop_is_written_and_returned(scans, checkpoint, capsys):
    write_history(checkpoint.parent / "memwatch", event(1, "suspicious"), event(2))
    for _ in range(2):
        assert simpletuner.main(["--checkpoint", str(checkpoint)]) == 3
    reason = (checkpoint.parent / "STOP").read_text(encoding="utf-8")
    assert reason == "step 2: 1 probe(s) memorized: cat\n"
    assert "would stop training" in capsys.readouterr().err


def test_nothing_memorized_is_no_stop(scans, checkpoint):
    write_history(checkpoint.parent / "memwatch", event(2, "suspicious"))
    assert simpletuner.main(["--checkpoint", str(checkpoint)]) == 0
    assert not (checkpoint.parent / "STOP").exists()


def test_training_is_interrupted_only_when_asked(scans, checkpoint, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    write_history(checkpoint.parent / "memwatch", event(2))
    simpletuner.main(["--checkpoint", str(checkpoint)])
    assert sent == []
    simpletuner.main(["--checkpoint", str(checkpoint), "--stop-training"])
    assert sent == [(os.getppid(), signal.SIGINT)]


def test_the_rule_of_the_settings_decides():
    copied = {"generations": 4, "copies": 1, "ratios": (0.1,), "is_copy": (True,), "of_others": 0}
    now = [Event.from_dict(event(2)), Event.from_dict(event(4))]
    assert simpletuner.stop_reason(now, StopConfig(patience=3)) is None
    assert simpletuner.stop_reason(now, StopConfig(patience=2)).startswith("step 4")
    assert simpletuner.stop_reason(now, StopConfig(require_copy=True)) is None
    assert simpletuner.stop_reason(now, StopConfig(enabled=False)) is None
    proven = [*now, Event(6, (Row("cat", verdict=now[0].rows[0].verdict, severity=3.0, p=0.001, copied=copied),))]
    assert simpletuner.stop_reason(proven, StopConfig(require_copy=True)).startswith("step 6")


def test_failed_scans_and_other_folders(scans, checkpoint, monkeypatch, capsys):
    rolling = checkpoint.parent / "checkpoint-2-rolling"
    assert simpletuner.main(["--checkpoint", str(rolling)]) == 0
    assert scans == []
    assert simpletuner.main(["--checkpoint", str(checkpoint), "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    write_history(checkpoint.parent / "memwatch", event(2))
    monkeypatch.setattr(subprocess, "run", lambda command, env: SimpleNamespace(returncode=2))
    assert simpletuner.main(["--checkpoint", str(checkpoint)]) == 2  # the history is an older scan's
