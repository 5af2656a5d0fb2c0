"""memwatch in sd-scripts: a miniature with their names and call order is watched, stopped, resumed, and left as it was.

sd-scripts itself has not been run.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from support import families as tiny
from support.builders import SMALL, choose, history, maps, picture, stop_at
from support.processes import new_process

from memwatch.denoiser import Components, StableDiffusion, StableDiffusionXL
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.integrations import kohya
from memwatch.integrations.kohya_model import PatchedSDXL, encoders_of, pipeline_of_run
from memwatch.integrations.wrapped import Patched
from memwatch.report.history import Run

SCRIPTS = Path(__file__).parents[1] / "support" / "sd_scripts"


@pytest.fixture
def theirs(monkeypatch):
    """Their module ``train_network``, as if it lay in a folder of its own; forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    names = ("train_network", "sdxl_train_network")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("train_network")
    for name in names:
        sys.modules.pop(name, None)


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


def options(pretrained, folder, *more) -> list[str]:
    given = {"pretrained_model_name_or_path": pretrained, "output_dir": folder / "out"}
    return [part for key, value in given.items() for part in (f"--{key}", str(value))] + [str(part) for part in more]


def watched(theirs, pretrained, folder, *more, script="train_network.py", **changes):
    """The trainer after a run by the runner's own command line."""
    new_process()
    folder.mkdir(exist_ok=True)
    file = settings(folder, **changes)
    kohya.main([str(SCRIPTS / script), "--memwatch", str(file), *options(pretrained, folder, *more)])
    return theirs.RUNS[-1]


def bare(theirs, pretrained, folder, *more):
    new_process()
    theirs.NetworkTrainer().train(theirs.setup_parser().parse_args(options(pretrained, folder, *more)))
    return theirs.RUNS[-1]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "last.safetensors")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--mixed_precision", "bf16"],
        ["--gradient_checkpointing", "--network_train_unet_only"],
        ["--gradient_accumulation_steps", "2"],
    ],
    ids=["plain", "bf16", "checkpointing", "accumulation"],
)
def test_a_run_is_watched_and_its_weights_stay_as_they_were(theirs, pretrained, tmp_path, more):
    trainer = bare(theirs, pretrained, tmp_path / "bare", *more)
    seen = watched(theirs, pretrained, tmp_path, *more)
    without, beside = saved(tmp_path / "bare"), saved(tmp_path)
    assert without.keys() == beside.keys()
    assert all(torch.equal(without[name], beside[name]) for name in without)
    assert seen.events == trainer.events
    assert [row["step"] for row in history(tmp_path)] == [0, 2, 4]
    assert [row["findings"][0]["baseline_step"] for row in history(tmp_path)[1:]] == [0, 0]


def test_what_the_network_learns_is_seen_and_an_untrained_one_reads_zero(theirs, pretrained, tmp_path):
    watched(theirs, pretrained, tmp_path / "trained", "--network_train_unet_only")
    watched(theirs, pretrained, tmp_path / "still", "--network_train_unet_only", "--learning_rate", "0.0")
    trained, still = (maps(tmp_path / name, 4) for name in ("trained", "still"))
    assert all(not still[key].any() for key in still if "log_ratio" in key)
    assert any(trained[key].abs().max() > 1e-3 for key in trained if "log_ratio" in key)


def test_a_screened_run_puts_the_first_network_back_for_a_late_look(theirs, pretrained, tmp_path, monkeypatch):
    more = ("--network_train_unet_only",)
    watched(theirs, pretrained, tmp_path / "full", *more)
    choose(monkeypatch, "cat")
    watched(theirs, pretrained, tmp_path / "late", *more, screen=True)
    full, late = (maps(tmp_path / name, 4) for name in ("full", "late"))
    assert any(full[key].abs().max() > 1e-3 for key in full if "log_ratio" in key)
    assert full.keys() == late.keys()
    assert all(torch.equal(full[key], late[key]) for key in full)


@pytest.mark.parametrize("more", [[], ["--network_train_unet_only"]], ids=["trained", "frozen"])
def test_a_trained_text_encoder_is_read_anew(theirs, pretrained, pipeline, tmp_path, more):
    observer = watched(theirs, pretrained, tmp_path, *more).watch.observer
    ids = pipeline.tokenizer("a photo of a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        before = pipeline.text_encoder.eval()(ids)[0][0]
    assert observer.trains_text is not bool(more)
    assert torch.allclose(before, observer.prepared[0].conditioning["encoder_hidden_states"]) is bool(more)


def test_a_stop_ends_the_loop_and_their_final_save_follows(theirs, pretrained, tmp_path, monkeypatch):
    stop_at(2, monkeypatch)
    epochs = ("--max_train_steps", "20", "--save_every_n_epochs", "1")
    trainer = watched(theirs, pretrained, tmp_path, *epochs)
    steps = [event[2] for event in trainer.events if event[0] == "sample"]
    assert steps == [0, 1, 2]  # and none after the epochs that run empty
    assert [event for event in trainer.events if event[0] == "save"] == [("save", "last.safetensors", 2)]
    with safe_open(tmp_path / "out" / "last.safetensors", framework="pt") as file:
        assert file.metadata()["ss_steps"] == "2"
    trained = bare(theirs, pretrained, tmp_path / "short", "--max_train_steps", "2")
    assert trained.events[-1] == ("save", "last.safetensors", 2)
    assert all(torch.equal(tensor, saved(tmp_path)[name]) for name, tensor in saved(tmp_path / "short").items())


def test_a_resumed_run_counts_on_and_keeps_its_first_baseline(theirs, pretrained, tmp_path):
    watched(theirs, pretrained, tmp_path, "--max_train_steps", "3", "--save_state_on_train_end")
    state = tmp_path / "out" / "last-state"
    assert json.loads((state / "memwatch.json").read_text(encoding="utf-8"))["last_step"] == 2
    watched(theirs, pretrained, tmp_path, "--max_train_steps", "3", "--resume", state)
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert rows[-1]["findings"][0]["baseline_step"] == 0


def test_a_run_that_was_stopped_trains_no_further_when_it_is_resumed(theirs, pretrained, tmp_path, monkeypatch, caplog):
    stop_at(2, monkeypatch)
    watched(theirs, pretrained, tmp_path, "--max_train_steps", "9", "--save_state_on_train_end")
    with caplog.at_level(logging.WARNING, "memwatch"):
        more = ("--max_train_steps", "12", "--save_every_n_epochs", "1", "--resume", tmp_path / "out" / "last-state")
        trainer = watched(theirs, pretrained, tmp_path, *more)
    assert "memwatch has stopped this run before (enough)" in caplog.text
    assert [event for event in trainer.events if event[0] in ("sample", "save")] == [("save", "last.safetensors", 0)]


def test_a_checkpoint_without_memwatch_is_resumed_with_a_new_baseline(theirs, pretrained, tmp_path, caplog):
    bare(theirs, pretrained, tmp_path, "--save_state_on_train_end")
    state = tmp_path / "out" / "last-state"
    with caplog.at_level(logging.WARNING, "memwatch"):
        watched(theirs, pretrained, tmp_path, "--resume", state)
    assert "this checkpoint has no state of memwatch" in caplog.text
    assert [row["step"] for row in history(tmp_path)] == [0, 2, 4]


def test_validation_losses_are_kept(theirs, pretrained, tmp_path):
    watched(theirs, pretrained, tmp_path, "--max_train_steps", "8")
    losses = Run.read(tmp_path / "memwatch").losses
    assert [(step, key) for step, key, _ in losses] == [(step, "loss/validation/epoch_average") for step in (4, 8)]


def test_sdxl_is_watched(theirs, tmp_path):
    made = DiffusionPipeline.from_pretrained(tiny.sdxl(tmp_path))
    made.unet = wide_unet()
    made.save_pretrained(tmp_path / "wide")
    more = ("--network_train_unet_only", "--resolution", "16,16")
    trainer = watched(theirs, tmp_path / "wide", tmp_path, *more, script="sdxl_train_network.py")
    assert isinstance(trainer.watch.observer.denoiser, StableDiffusionXL)
    assert trainer.watch.observer.resolution == 16
    assert trainer.watch.observer.parts.vae.config.scaling_factor == 0.13025
    assert [row["step"] for row in history(tmp_path)] == [0, 2, 4]
    assert not history(tmp_path)[-1]["errors"]


# --- the model in memwatch's terms -----------------------------------------------------------------------------------


def wide_unet() -> UNet2DConditionModel:
    """An SDXL UNet whose sizes are embedded as widely as in the real one."""
    torch.manual_seed(5)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=2 * tiny.WIDTH,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + tiny.WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def test_their_sdxl_unet_answers_as_diffusers_does(theirs):
    inner = wide_unet()
    generator = torch.Generator().manual_seed(0)
    noisy, hidden, pooled = (torch.randn(size, generator=generator) for size in ((2, 4, 8, 8), (2, 5, 32), (2, 16)))
    sizes = torch.tensor([[16.0, 24, 1, 2, 16, 16], [512, 640, 0, 3, 512, 512]])
    timesteps, added = torch.tensor([3, 500]), {"text_embeds": pooled, "time_ids": sizes}
    with torch.no_grad():
        expected = inner(noisy, timesteps, hidden, added_cond_kwargs=added).sample
        made = importlib.import_module("sdxl_train_network").SdxlUNet2DConditionModel(inner)
        encoder = SimpleNamespace(config=SimpleNamespace(hidden_size=16))
        together = PatchedSDXL(made, torch.nn.Module(), [encoder, encoder])
        found = together(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)
    assert StableDiffusionXL.fits(together)
    assert torch.allclose(found[0], expected, atol=1e-6)


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_clip_skip_takes_an_earlier_layer_and_its_norm(pretrained, tmp_path, clip_skip):
    tokenizer = tiny.clip_tokenizer(tmp_path)
    torch.manual_seed(6)
    text_encoder = tiny.clip(tokenizer, projection=False, layers=3).eval()
    accelerator = SimpleNamespace(autocast=torch.no_grad)
    (made,) = encoders_of(
        [text_encoder], torch.nn.Module(), accelerator, SimpleNamespace(clip_skip=clip_skip), is_sdxl=False
    )
    schedule = NoiseSchedule(torch.ones(2), 2, "epsilon")
    parts = Components(None, None, (made,), (tokenizer,))
    found = StableDiffusion(Patched(torch.nn.Module(), torch.nn.Module()), schedule).encode("a cat", parts, 16)
    ids = tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = text_encoder(ids, output_hidden_states=True).hidden_states
        inner = getattr(text_encoder, "text_model", text_encoder)
        expected = inner.final_layer_norm(states[-(clip_skip or 1)])[0]
    assert torch.allclose(found["encoder_hidden_states"], expected, atol=1e-6)


def test_the_schedule_is_that_of_their_options(pipeline):
    vae = pipeline.vae.half()
    args = SimpleNamespace(v_parameterization=True, zero_terminal_snr=True)
    made = pipeline_of_run(vae, args, torch.device("cpu"), 0.13025)
    assert made.scheduler.config.prediction_type == "v_prediction"
    assert float(made.scheduler.alphas_cumprod[-1]) < 1e-6
    assert (made.vae.dtype, made.vae.config.scaling_factor) == (torch.float32, 0.13025)
    assert (vae.dtype, vae.config.scaling_factor) == (torch.float16, 0.18215)


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "more", "changes", "message"),
    [
        ("flux_train_network.py", [], {}, "allowed as the first argument: train_network.py, sdxl_train_network.py"),
        ("elsewhere/train_network.py", [], {}, "run this in sd-scripts's folder"),
        ("train_network.py", ["--fp8_base"], {}, "--fp8_base is set"),
        ("train_network.py", [], {"every_step": 3}, "did you mean 'every_steps'?"),
        ("train_network.py", [], {"probes": None}, "an image folder or prompts, or 'picked' with a folder"),
        ("train_network.py", [], {"on_memorized": "drop"}, "'on_memorized' ('drop') is gone: "),
        ("train_network.py", [], {"weights": "ema"}, "no ema was passed"),
        ("train_network.py", [], {"signals": {"baseline": "base"}}, "no LoRA layers to switch off"),
        ("train_network.py", [], {"probes": "nowhere"}, "neither a folder nor a file"),
    ],
)
def test_what_cannot_be_watched_is_one_message_and_exit_code_2(
    theirs, pretrained, tmp_path, capsys, script, more, changes, message
):
    if script.startswith("elsewhere"):
        sys.modules.pop("train_network")
        sys.path.remove(str(SCRIPTS))
    with pytest.raises(SystemExit) as ended:
        watched(theirs, pretrained, tmp_path, *more, script=script, **changes)
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert message in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("memwatch: ")


def test_without_settings_it_says_what_is_missing(theirs, pretrained, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        kohya.main([str(SCRIPTS / "train_network.py"), *options(pretrained, tmp_path)])
    assert ended.value.code == 2
    assert "--memwatch: got nothing" in capsys.readouterr().err


def test_the_settings_may_lie_in_their_config_file(theirs, pretrained, tmp_path):
    new_process()
    values = {"memwatch": str(settings(tmp_path)), "max_train_steps": 2}
    (tmp_path / "run.json").write_text(json.dumps(values), encoding="utf-8")
    kohya.main(
        [str(SCRIPTS / "train_network.py"), *options(pretrained, tmp_path, "--config_file", tmp_path / "run.json")]
    )
    assert [row["step"] for row in history(tmp_path)] == [0, 2]
