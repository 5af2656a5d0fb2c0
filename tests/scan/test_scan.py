"""``memwatch scan`` shows what training would have shown, whatever form the checkpoints have."""

from __future__ import annotations

import shutil

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from support import trainers as by
from support.builders import history, maps, without_time

from memwatch.measure.observer import Observer


def test_a_folder_of_checkpoints_gives_the_history_of_training(scan, trained, pretrained, images, tmp_path):
    code, _ = scan(trained, "--images", images, "--controls", trained / "controls", "--pretrained", pretrained)
    assert code == 0
    theirs, ours = without_time(history(trained)), without_time(history(tmp_path))
    assert [row["step"] for row in ours] == [0, 2, 4]
    assert ours == theirs
    for step in (0, 2, 4):
        ours = maps(tmp_path, step)
        theirs = maps(trained, step)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (tmp_path / "memwatch" / "heatmaps" / "control0" / "step_0000004.jpg").is_file()


def test_two_models_by_prompts(scan, trained, pretrained, prompts, tmp_path):
    code, measured = scan(trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    assert code == 0
    assert measured == ["a-red-poster"] * 4 + ["a-cat-on-a-sofa"] * 4  # now, unconditional, earlier, both
    (row,) = history(tmp_path)
    found = maps(tmp_path, 0)
    assert found["a-red-poster/collapse"].abs().min() > 1e-4  # all of it has changed
    assert [f["is_reference"] for f in row["findings"]] == [False, False]


def test_a_model_against_itself_reads_zero(scan, trained, prompts, tmp_path):
    code, _ = scan(trained / "pipeline", "--baseline", trained / "checkpoint-4", "--prompts", prompts)
    assert code == 0
    found = maps(tmp_path, 0)
    for name in ("a-red-poster", "a-cat-on-a-sofa"):
        for key in ("collapse", "log_ratio", "score"):
            assert (found[f"{name}/{key}"] == 0).all(), (name, key)


def test_checkpoints_that_are_equal_are_said_to_be(scan, trained, prompts, tmp_path, caplog):
    for step, of in ((1, 2), (2, 2), (3, 4)):
        shutil.copytree(trained / f"checkpoint-{of}", tmp_path / "run" / f"checkpoint-{step}")
    run, pipeline = tmp_path / "run", trained / "pipeline"
    code, _ = scan(run, "--prompts", prompts, "--pretrained", pipeline)
    assert code == 0
    equal = [message for message in caplog.messages if "are equal" in message]
    assert equal == [f"{run / 'checkpoint-2'} and {run / 'checkpoint-1'} are equal, tensor for tensor"]
    caplog.clear()
    scan(pipeline, "--baseline", trained / "checkpoint-4", "--prompts", prompts)
    equal = f"the baseline {trained / 'checkpoint-4'} and the first checkpoint are equal, tensor for tensor"
    assert [message for message in caplog.messages if "are equal" in message] == [equal]


def test_a_file_that_says_another_prediction_type_is_no_evidence_of_nothing(scan, trained, prompts, tmp_path, capsys):
    unet = UNet2DConditionModel.from_pretrained(trained / "checkpoint-4" / "unet")
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    file, pipeline = tmp_path / "v.safetensors", trained / "pipeline"
    save_file(weights, file, {"modelspec.prediction_type": "v"})
    code, measured = scan(file, "--baseline", trained / "checkpoint-2", "--prompts", prompts, "--pretrained", pipeline)
    assert (code, measured) == (2, [])
    assert "v.safetensors: says v_prediction (modelspec.prediction_type), and" in capsys.readouterr().err


def test_the_unconditional_branch(scan, trained, prompts, tmp_path):
    code, measured = scan(trained / "pipeline", "--baseline", "unconditional", "--prompts", prompts)
    assert code == 0
    assert len(measured) == 4
    found = maps(tmp_path, 0)
    assert "a-red-poster/decisive" in found
    assert "a-red-poster/collapse" not in found


def test_the_earlier_models_own_text_encoder_is_used(scan, trained, pretrained, prompts, tmp_path):
    other = tmp_path / "other"
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "pipeline")
    with torch.no_grad():
        for parameter in pipeline.text_encoder.parameters():
            parameter.mul_(1.5)
    pipeline.save_pretrained(other)
    code, _ = scan(trained / "pipeline", "--baseline", other, "--prompts", prompts)
    assert code == 0
    found = maps(tmp_path, 0)
    assert found["a-red-poster/score"].max() > 0  # the same network, told something else


def test_a_trained_text_encoder_in_the_checkpoints_is_used(scan, trained, pretrained, prompts, images, tmp_path):
    """Three checkpoints of one network, of which only the last one's text encoder differs; each event asks its own."""
    pipeline = StableDiffusionPipeline.from_pretrained(pretrained)
    for step in (1, 2, 3):
        if step == 3:
            with torch.no_grad():
                for parameter in pipeline.text_encoder.parameters():
                    parameter.mul_(1.5)
        pipeline.unet.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "unet")
        pipeline.text_encoder.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "text_encoder")
    assert scan(tmp_path / "run", "--images", images, "--pretrained", pretrained)[0] == 0
    second, third = (maps(tmp_path, step) for step in (2, 3))
    assert (second["control0/score"] == 0).all()
    assert third["control0/score"].max() > 0
    last, first = (tmp_path / "run" / f"checkpoint-{step}" for step in (3, 1))
    assert scan(last, "--baseline", first, "--images", images, "--pretrained", pretrained)[0] == 0
    alone = maps(tmp_path, 3)
    assert torch.equal(alone["control0/score"], third["control0/score"])


def save_lora(pretrained, folder, strength):
    folder.mkdir(parents=True)
    unet = by.with_lora(UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet"), ["to_q", "to_v"])
    factors = {layer: (down, strength * up, alpha) for layer, (down, up, alpha) in by.factors_of(unet).items()}
    save_file(by.dotted(factors, "unet."), folder / "pytorch_lora_weights.safetensors")


def test_a_folder_of_loras(scan, pretrained, prompts, images, tmp_path):
    for step, strength in ((10, 0), (20, 1)):  # the first one does nothing yet
        save_lora(pretrained, tmp_path / "run" / f"checkpoint-{step}", strength)
    code, _ = scan(tmp_path / "run", "--pretrained", pretrained, "--prompts", prompts, "--images", images)
    assert code == 0
    assert [row["step"] for row in history(tmp_path)] == [10, 20]
    assert [f["baseline_step"] for f in history(tmp_path)[1]["findings"]] == [10] * 5
    within = maps(tmp_path, 20)
    shutil.rmtree(tmp_path / "memwatch")
    assert scan(tmp_path / "run", "--baseline", "base", "--pretrained", pretrained, "--prompts", prompts)[0] == 0
    with_base = maps(tmp_path, 20)
    assert torch.equal(within["a-red-poster/collapse"], with_base["a-red-poster/collapse"])


def test_a_checkpoint_that_is_read_wrong_is_named(scan, pretrained, prompts, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Observer, "misread", lambda self, observations: "the model is read as epsilon, but")
    code, _ = scan(pretrained, "--baseline", "unconditional", "--prompts", prompts, "--images", images)
    assert code == 2
    assert "the model is read as epsilon, but" in capsys.readouterr().err
    assert not (tmp_path / "memwatch" / "history.jsonl").exists()


def test_bare_weights_on_a_pipeline(scan, trained, pretrained, prompts, tmp_path):
    (tmp_path / "checkpoint-7").mkdir()  # as accelerate saves a model by itself
    file = trained / "checkpoint-4" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, tmp_path / "checkpoint-7" / "model.safetensors")
    code, _ = scan(tmp_path / "checkpoint-7", "--pretrained", pretrained, "--baseline", file, "--prompts", prompts)
    assert code == 0
    (row,) = history(tmp_path)
    assert row["step"] == 7
    assert maps(tmp_path, 7)["a-red-poster/score"].max() == 0
