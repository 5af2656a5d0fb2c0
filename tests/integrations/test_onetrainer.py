"""memwatch in OneTrainer: a miniature with its names and call order is watched, stopped, resumed, and left as it was.

OneTrainer itself has not been run.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file
from support import families as tiny
from support import mini_onetrainer as mini
from support.builders import SMALL, choose, history, maps, picture, stop_at
from support.processes import new_process

import memwatch.callback
from memwatch.denoiser import StableDiffusionXL
from memwatch.faults import StrictError
from memwatch.integrations import onetrainer
from memwatch.integrations.onetrainer_model import scheduler_of
from memwatch.report.history import Run

LENIENT = {"strict": False}


@pytest.fixture
def clone(monkeypatch, tmp_path):
    """The working directory is a clone of OneTrainer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    mini.install(monkeypatch)


def settings(folder: Path, **changes) -> Path:
    """A YAML file, and the image folder that it names as probes."""
    images = folder / "probes"
    images.mkdir(parents=True, exist_ok=True)
    picture(0).save(images / "cat.png")
    (images / "cat.txt").write_text("a photo of a cat", encoding="utf-8")
    values = SMALL | {"probes": str(images), "output_dir": str(folder / "memwatch")} | changes
    values["levels"] = {"timesteps": [61], "draws": 2}
    (folder / "memwatch.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "memwatch.yaml"


def watched(pretrained, folder, *more, memwatch=None, **config):
    """The trainer after a run by the runner's own command line."""
    new_process()
    file = mini.write_config(folder, pretrained, **config)
    ours = ["--memwatch", str(settings(folder, **(memwatch or {})))]
    onetrainer.main(["--config-path", str(file), *ours, *more])
    return mini.RUNS[-1]


def bare(pretrained, folder, **config):
    file = mini.write_config(folder, pretrained, **config)
    values = mini.TrainConfig().from_dict(json.loads(file.read_text(encoding="utf-8")))
    trainer = mini.GenericTrainer(values, mini.TrainCallbacks(), mini.TrainCommands())
    trainer.start()
    trainer.train()
    trainer.end()
    return trainer


def steps_of(folder):
    return [row["step"] for row in history(folder)]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"train_dtype": "BFLOAT_16"},
        {"text_encoder_train": False},
        {"gradient_accumulation_steps": 2},
        {"training_method": "FINE_TUNE"},
    ],
    ids=["plain", "bf16", "frozen-text", "accumulation", "all-weights"],
)
def test_a_run_is_watched_and_left_as_it_was(clone, pretrained, tmp_path, config):
    trainer = bare(pretrained, tmp_path / "bare", **config)
    seen = watched(pretrained, tmp_path, **config)
    without, beside = (load_file(folder / "saved.safetensors") for folder in (tmp_path / "bare", tmp_path))
    assert all(torch.equal(without[name], beside[name]) for name in without)
    assert seen.modes == trainer.modes
    assert steps_of(tmp_path) == [0, 2, 4, 6, 8]
    assert {row["findings"][0]["baseline_step"] for row in history(tmp_path)[1:]} == {0}
    assert not history(tmp_path)[-1]["errors"]


def test_what_is_learned_is_seen_and_an_untrained_model_reads_zero(clone, pretrained, tmp_path):
    watched(pretrained, tmp_path / "trained", text_encoder_train=False)
    watched(pretrained, tmp_path / "still", learning_rate=0.0)
    trained, still = (maps(tmp_path / name, 8) for name in ("trained", "still"))
    assert all(not still[key].any() for key in still if "log_ratio" in key)
    assert any(trained[key].abs().max() > 1e-3 for key in trained if "log_ratio" in key)


def test_a_screened_run_puts_the_first_adapters_back_for_a_late_look(clone, pretrained, tmp_path, monkeypatch):
    watched(pretrained, tmp_path / "full", text_encoder_train=False, epochs=1)
    choose(monkeypatch, "cat")
    watched(pretrained, tmp_path / "late", text_encoder_train=False, epochs=1, memwatch={"screen": True})
    full, late = (maps(tmp_path / name, 4) for name in ("full", "late"))
    assert full.keys() == late.keys()
    assert all(torch.equal(full[key], late[key]) for key in full)


def test_a_stop_is_a_command_and_the_final_save_follows(clone, pretrained, tmp_path, monkeypatch):
    stop_at(2, monkeypatch)
    trainer = watched(pretrained, tmp_path, epochs=10)
    assert trainer.model.train_progress.global_step == 2
    assert trainer.has_ended
    assert (tmp_path / "saved.safetensors").is_file()


def test_scalars_go_to_its_tensorboard_and_its_validation_losses_to_the_report(clone, pretrained, tmp_path):
    trainer = watched(pretrained, tmp_path, epochs=1)
    written = [(tag, step) for tag, _, step in trainer.scalars if tag == "memwatch/collapse/cat"]
    assert [step for _, step in written] == [2, 4]
    assert Run.read(tmp_path / "memwatch").losses == ((2, "loss/validation_step/cats", 0.5),)


def test_failures_that_its_callbacks_would_swallow_are_said_counted_and_end_after_three(
    clone, pretrained, tmp_path, monkeypatch, caplog
):
    calls = []

    def broken(self, step):
        calls.append(step)
        raise KeyError("what went wrong")

    monkeypatch.setattr(memwatch.callback.MemWatch, "on_step_end", broken)
    with caplog.at_level(logging.WARNING, "memwatch"):
        trainer = watched(pretrained, tmp_path, memwatch=LENIENT)
    said = [message for message in caplog.messages if "what went wrong" in message]
    assert calls == [1, 2, 3]
    assert len(said) == 2  # the first, and the last that is tried
    assert "looking at the model in OneTrainer failed" in said[0]
    assert "switched off" in said[1]
    assert trainer.model.train_progress.global_step == 8
    assert trainer.has_ended


def test_strict_stops_training_and_is_raised_there(clone, pretrained, tmp_path, monkeypatch):
    def broken(self, step):
        raise KeyError("what went wrong")

    monkeypatch.setattr(memwatch.callback.MemWatch, "on_step_end", broken)
    with pytest.raises(StrictError, match="what went wrong"):
        watched(pretrained, tmp_path)
    assert mini.RUNS[-1].model.train_progress.global_step == 1
    assert not mini.RUNS[-1].has_ended


def test_a_backup_keeps_the_watch_and_the_next_run_goes_on(clone, pretrained, tmp_path):
    whole = tmp_path / "whole"
    watched(pretrained, whole, epochs=2, backup_after=3)
    watched(pretrained, tmp_path, epochs=1, backup_after=3)
    assert (tmp_path / "memwatch" / "onetrainer" / "step_0000003.json").is_file()
    watched(pretrained, tmp_path, epochs=1, backup_after=100, continue_last_backup=True)
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]  # from step 3 on again
    assert {row["findings"][0]["baseline_step"] for row in rows[1:]} == {0}
    assert rows[1]["findings"] == history(whole)[1]["findings"]


def test_a_run_that_was_stopped_trains_no_further_when_it_is_continued(
    clone, pretrained, tmp_path, monkeypatch, caplog
):
    stop_at(2, monkeypatch)
    trainer = watched(pretrained, tmp_path)
    trainer.backup()
    with caplog.at_level(logging.WARNING, "memwatch"):
        again = watched(pretrained, tmp_path, continue_last_backup=True)
    assert "memwatch has stopped this run before (enough)" in caplog.text
    assert again.model.train_progress.global_step == 2


def test_a_backup_without_memwatch_is_gone_on_from_with_a_new_baseline(clone, pretrained, tmp_path, caplog):
    bare(pretrained, tmp_path, epochs=1, backup_after=3)
    with caplog.at_level(logging.WARNING, "memwatch"):
        watched(pretrained, tmp_path, epochs=1, continue_last_backup=True)
    assert "this checkpoint has no state of memwatch" in caplog.text
    assert steps_of(tmp_path)[0] == 3


def test_ctrl_c_ends_without_the_final_save(clone, pretrained, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(mini.GenericTrainer, "train", interrupted)
    assert not watched(pretrained, tmp_path).has_ended
    assert watched(pretrained, tmp_path / "again", backup_before_save=True).has_ended


def test_sdxl_is_watched(clone, tmp_path):
    made = DiffusionPipeline.from_pretrained(tiny.sdxl(tmp_path))
    made.scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    made.save_pretrained(tmp_path / "sdxl")
    config = {"model_type": "STABLE_DIFFUSION_XL_10_BASE", "text_encoder_2_layer_skip": 1, "epochs": 1}
    trainer = watched(tmp_path / "sdxl", tmp_path, **config)
    assert trainer.model.moved == ["unet", "text_encoder", "text_encoder_2"]
    assert steps_of(tmp_path) == [0, 2, 4]
    assert "Stable Diffusion XL" in json.loads((tmp_path / "memwatch" / "about.json").read_text())["model"]
    assert StableDiffusionXL.name == "Stable Diffusion XL"


def test_what_they_change_in_their_scheduler_is_in_ours():
    theirs = DDIMScheduler(beta_schedule="scaled_linear")
    theirs.config.prediction_type = "v_prediction"  # an attribute that from_config does not copy
    config = mini.TrainConfig()
    config.rescale_noise_scheduler_to_zero_terminal_snr = True
    made = scheduler_of(mini.SimpleNamespace(noise_scheduler=theirs), config)
    assert made.config.prediction_type == "v_prediction"
    assert float(made.alphas_cumprod[-1]) < 1e-6


def test_its_arguments_are_read_in_its_order(clone, pretrained, tmp_path):
    preset = {"learning_rate": 0.5, "epochs": 7}
    (tmp_path / "preset.json").write_text(json.dumps(preset), encoding="utf-8")
    (tmp_path / "secrets.json").write_text(json.dumps({"key": "hidden"}), encoding="utf-8")
    more = ("--preset-path", str(tmp_path / "preset.json"), "--config-value", "epochs=1")
    config = watched(pretrained, tmp_path, *more, "--config-value", "latent_caching=no", epochs=3).config
    assert (config.learning_rate, config.epochs, config.latent_caching) == (0.5, 1, False)
    assert config.secrets.key == "hidden"


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"model_type": "FLUX_DEV_1"}, {}, "model_type: got FLUX_DEV_1, allowed: STABLE_DIFFUSION_15,"),
        ({"training_method": "EMBEDDING"}, {}, "training_method: got EMBEDDING, allowed: LORA, FINE_TUNE"),
        ({"multi_gpu": True}, {}, "one local process only"),
        ({}, {"every_step": 3}, "did you mean 'every_steps'?"),
        ({}, {"probes": 16}, "'probes': got 16"),
        ({}, {"on_memorized": "drop"}, "'on_memorized' ('drop') is gone: memwatch changes no dataloader"),
        ({}, {"probes": None}, "or 'picked' with a folder that 'memwatch pick' has written"),
        ({}, {"picked": "nowhere"}, "'nowhere' holds no whole choice of 'memwatch pick TRAIN --out nowhere'"),
        ({}, {"probes": "nowhere"}, "neither a folder nor a file"),
    ],
)
def test_what_cannot_be_watched_is_one_message_and_exit_code_2(
    clone, pretrained, tmp_path, capsys, config, changes, message
):
    with pytest.raises(SystemExit) as ended:
        watched(pretrained, tmp_path, memwatch=changes, **config)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert message in said
    assert said.startswith("memwatch: ")


def test_elsewhere_than_in_its_folder_it_says_where_to_go(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        onetrainer.main(["--config-path", "config.json"])
    assert ended.value.code == 2
    assert "run this in OneTrainer's folder" in capsys.readouterr().err


def test_a_folder_of_memwatch_pick_takes_the_place_of_probes(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "memwatch"):
        read = onetrainer.read_settings(str(settings(tmp_path, picked="watch", probes=None)), "OneTrainer")
    assert "rollback is off" in caplog.text
    assert (read.picked, read.probes, read.rollback, read.precision) == ("watch", None, False, "loop")
