"""The command ``memwatch scan``: what cannot be done is one clear line, what fails is named, and the rest goes on."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from diffusers import UNet2DConditionModel, UNet2DModel
from support.builders import history, maps

from memwatch.measure.observer import Observer


def test_the_deciding_maps_are_arrays(scan, trained, pretrained, images, tmp_path):
    assert scan(trained / "pipeline", "--baseline", pretrained, "--images", images)[0] == 0
    folder = tmp_path / "memwatch" / "decisive" / "step_0000000"
    found = maps(tmp_path, 0)
    for i in range(3):
        assert (np.load(folder / f"control{i}.npy") == found[f"control{i}/decisive"].numpy()).all()


def test_one_prompts_failure_is_named_and_the_others_go_on(
    scan, trained, pretrained, prompts, tmp_path, capsys, monkeypatch
):
    real = Observer.view

    def failing(self, p):
        if "cat" in p.name:
            raise RuntimeError("no kernel for this")
        return real(self, p)

    arguments = (trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    with monkeypatch.context() as patch:
        patch.setattr(Observer, "view", failing)
        assert scan(*arguments)[0] == 1
    assert "a-cat-on-a-sofa: no kernel for this" in capsys.readouterr().err
    assert [f["name"] for f in history(tmp_path)[0]["findings"]] == ["a-red-poster"]
    code, measured = scan(*arguments)  # and the second run does only what is missing
    assert code == 0
    assert measured == ["a-cat-on-a-sofa"] * 4  # now and earlier, with the prompt and without


def test_an_image_that_cannot_be_read_is_named_and_skipped(scan, trained, pretrained, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    file = tmp_path / "images" / "control1.png"
    file.write_bytes(file.read_bytes()[:60])
    assert scan(trained / "pipeline", "--baseline", pretrained, "--images", tmp_path / "images")[0] == 1
    assert "control1: cannot read image" in capsys.readouterr().err
    assert [f["name"] for f in history(tmp_path)[0]["findings"]] == ["control0", "control2"]


@pytest.mark.parametrize("broken", [0, 2])
def test_a_truncated_checkpoint_is_named_and_the_others_are_scanned(
    scan, trained, pretrained, images, broken, tmp_path, capsys
):
    for step in (0, 2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    cut(tmp_path / "run" / f"checkpoint-{broken}" / "unet" / "diffusion_pytorch_model.safetensors")
    assert scan(tmp_path / "run", "--images", images, "--pretrained", pretrained)[0] == 1
    assert f"checkpoint-{broken}: cannot be read: " in capsys.readouterr().err
    first = 2 - broken
    assert [row["step"] for row in history(tmp_path)] == [first, 4]
    assert [f["baseline_step"] for f in history(tmp_path)[1]["findings"]] == [first] * 3


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# --- sources that cannot be used -------------------------------------------------------------------------------------


def smaller(folder, trained):
    config = UNet2DConditionModel.load_config(trained / "pipeline", subfolder="unet") | {"cross_attention_dim": 8}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def other_family(folder, trained):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    UNet2DModel(sample_size=8, **sizes, **blocks).save_pretrained(folder / "unet")
    return folder


def other_prediction(folder, trained):
    shutil.copytree(trained / "pipeline", folder)
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"prediction_type": "v_prediction"}
    file.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def truncated(folder, trained):
    shutil.copytree(trained / "checkpoint-4", folder)
    cut(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def empty(file, trained):
    file.write_text("\n\n", encoding="utf-8")
    return file


BUILDERS = {build.__name__: build for build in (smaller, other_family, other_prediction, truncated, empty)}


class Sources(dict):
    """What a command line names in braces; those of ``BUILDERS`` are made when they are asked for."""

    def __missing__(self, name):
        self[name] = BUILDERS[name](self["folder"] / name, self["trained"])
        return self[name]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{pipeline} --baseline {smaller}", r"smaller: \S+ has shape \(.*\), the model \("),
        ("{pipeline} --baseline {other_family}", "holds a UNet2DModel, expected a UNet2DConditionModel"),
        ("{pipeline} --baseline {truncated}", "truncated: cannot be read"),
        ("{truncated} --baseline unconditional --pretrained {pipeline}", "truncated: cannot be read"),
        (
            "{pipeline} --baseline {other_prediction}",
            "says v_prediction .*, and the scheduler of .* epsilon",
        ),
        ("{pipeline} --baseline unconditional --prompts {empty}", "holds no image and no prompt"),
        ("{pipeline} --baseline unconditional --prompts {folder}/none.txt", "neither a folder nor a file"),
        ("{folder}/gone.safetensors --baseline base --pretrained {pipeline}", "gone.safetensors: cannot be read: "),
        ("{pipeline}", "--baseline: missing, allowed: an earlier model, unconditional, or base"),
        ("{pipeline} --baseline previous", "--baseline: got 'previous', allowed: .*needs a folder of checkpoints"),
        ("{pipeline} --baseline base", "signals.baseline.*no LoRA layers"),
        ("{trained}/checkpoint-4 --baseline unconditional", "--pretrained: missing; .*checkpoint-4 is no pipeline"),
        ("{trained}/memwatch --baseline unconditional --pretrained {pipeline}", "no unet or"),
        ("{pipeline} --idle 1", "--idle: got 1.0, allowed: with --follow only"),
        ("{pipeline} --webhook https://example.com/x", "--webhook: got .*with --follow only"),
        ("{trained}/pipeline/unet/diffusion_pytorch_model.safetensors --follow", "a folder, with --follow"),
        ("{pipeline} --baseline unconditional --preset papper", "--preset: got 'papper', allowed: .*paper"),
    ],
)
def test_bad_input_is_one_clear_line(scan, trained, prompts, tmp_path, capsys, config, line, message):
    sources = Sources(trained=trained, pipeline=trained / "pipeline", folder=tmp_path)
    arguments = [word.format_map(sources) for word in line.split()]
    arguments += [] if "--prompts" in line else ["--prompts", prompts]
    code, measured = scan(*arguments, settings=None if "--preset" in line else config)
    said = [said for said in capsys.readouterr().err.splitlines() if said.startswith("memwatch scan: ")]
    assert (code, measured, len(said)) == (2, [], 1)
    assert re.search(message, said[0]), said


def test_without_probes_there_is_nothing_to_look_at_and_a_trainings_history_is_never_overwritten(
    scan, trained, pretrained, prompts, tmp_path, capsys
):
    assert scan(trained / "pipeline", "--baseline", "unconditional")[0] == 2
    assert "memwatch scan: nothing to look at; pass --prompts FILE" in capsys.readouterr().err
    (tmp_path / "memwatch").mkdir()
    (tmp_path / "memwatch" / "history.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    assert scan(trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)[0] == 2
    assert "that no scan wrote" in capsys.readouterr().err
    assert (tmp_path / "memwatch" / "history.jsonl").read_text(encoding="utf-8") == '{"step": 0}\n'
