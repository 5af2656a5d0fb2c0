"""``memwatch scan``: what training would have shown, what is skipped and named, and what is measured only once."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from support.builders import CONFIG, TOKENS, Loop, history, new_process, picture

import memwatch.callback
import memwatch.scan
from memwatch import Probe
from memwatch.cli import main
from memwatch.scan.scan import from_tensors, to_tensors

PROMPTS = "a red poster\na cat on a sofa\n"
SETTINGS = CONFIG | {"levels": {"timesteps": [61, 301], "draws": 2}}


@pytest.fixture(scope="module")
def trained(pretrained, images, tmp_path_factory):
    """A fine-tune that memwatch watched, with a checkpoint folder at every event, as diffusers' scripts write them."""
    folder = tmp_path_factory.mktemp("trained")
    loop = Loop(pretrained, folder, lr=1e-2)
    watch = loop.watch(pretrained, str(images), controls=[Probe("held out", picture(9), name="h")], config=CONFIG)

    def save(loop):
        if loop.step % 2 == 0:
            loop.bare.save_pretrained(folder / f"checkpoint-{loop.step}" / "unet")

    save(loop)
    watch.begin()
    loop.run(watch, 4, each=save)
    pipeline = StableDiffusionPipeline.from_pretrained(pretrained, unet=loop.bare)
    pipeline.save_pretrained(folder / "pipeline")
    picture(9).save(folder / "h.png")
    controls = folder / "controls"
    controls.mkdir()
    picture(9).save(controls / "h.png")
    (controls / "h.txt").write_text("held out", encoding="utf-8")
    new_process()
    return folder


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"  # JSON is YAML
    file.write_text(json.dumps(SETTINGS), encoding="utf-8")
    return str(file)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS, encoding="utf-8")
    return str(file)


@pytest.fixture
def scan(tmp_path, config):
    """Runs the command into ``tmp_path/memwatch``; its exit code, and what was measured."""

    def run(*arguments, settings=config):
        new_process()
        measured = []
        real = memwatch.callback.measure

        def counting(denoiser, views, *rest):
            measured.extend(view.key for view in views)
            return real(denoiser, views, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memwatch.callback, "measure", counting)
            code = main(
                [
                    "scan",
                    *map(str, arguments),
                    "--output",
                    str(tmp_path / "memwatch"),
                    *(["--config", settings] if settings else []),
                ]
            )
        return code, measured

    return run


def without_time(rows):
    for row in rows:
        del row["seconds"], row["scalars"]["memwatch/seconds"]
    return rows


def test_a_folder_of_checkpoints_gives_the_history_of_training(scan, trained, pretrained, images, tmp_path):
    code, _ = scan(trained, "--images", images, "--controls", trained / "controls", "--pretrained", pretrained)
    assert code == 0
    theirs, ours = without_time(history(trained)), without_time(history(tmp_path))
    assert [row["step"] for row in ours] == [0, 2, 4]
    assert ours == theirs
    for step in (0, 2, 4):
        ours = load_file(tmp_path / "memwatch" / "maps" / f"step_{step:07d}.safetensors")
        theirs = load_file(trained / "memwatch" / "maps" / f"step_{step:07d}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (tmp_path / "memwatch" / "heatmaps" / "control0" / "step_0000004.png").is_file()


def test_two_models_by_prompts(scan, trained, pretrained, prompts, tmp_path):
    code, measured = scan(trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    assert code == 0
    assert measured == ["a-red-poster"] * 3 + ["a-cat-on-a-sofa"] * 3  # now, unconditional, earlier
    (row,) = history(tmp_path)
    maps = load_file(tmp_path / "memwatch" / "maps" / "step_0000000.safetensors")
    assert maps["a-red-poster/collapse"].abs().min() > 1e-4  # all of it has changed
    assert [f["is_reference"] for f in row["findings"]] == [False, False]


def test_a_model_against_itself_reads_zero(scan, trained, prompts, tmp_path):
    code, _ = scan(trained / "pipeline", "--baseline", trained / "checkpoint-4", "--prompts", prompts)
    assert code == 0
    maps = load_file(tmp_path / "memwatch" / "maps" / "step_0000000.safetensors")
    assert all(
        (maps[f"{name}/{key}"] == 0).all()
        for name in ("a-red-poster", "a-cat-on-a-sofa")
        for key in ("collapse", "log_ratio", "score")
    )


def test_two_models_by_images_equal_the_history(scan, trained, pretrained, images, tmp_path):
    code, _ = scan(trained / "pipeline", "--baseline", trained / "checkpoint-0", "--images", images)
    assert code == 0
    ours = load_file(tmp_path / "memwatch" / "maps" / "step_0000000.safetensors")
    theirs = load_file(trained / "memwatch" / "maps" / "step_0000004.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_unconditional_branch(scan, trained, prompts, tmp_path):
    code, measured = scan(trained / "pipeline", "--baseline", "unconditional", "--prompts", prompts)
    assert code == 0
    assert len(measured) == 4
    maps = load_file(tmp_path / "memwatch" / "maps" / "step_0000000.safetensors")
    assert "a-red-poster/decisive" in maps
    assert "a-red-poster/collapse" not in maps


def test_the_earlier_models_own_text_encoder_is_used(scan, trained, pretrained, prompts, tmp_path):
    other = tmp_path / "other"
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "pipeline")
    with torch.no_grad():
        for parameter in pipeline.text_encoder.parameters():
            parameter.mul_(1.5)
    pipeline.save_pretrained(other)
    code, _ = scan(trained / "pipeline", "--baseline", other, "--prompts", prompts)
    assert code == 0
    maps = load_file(tmp_path / "memwatch" / "maps" / "step_0000000.safetensors")
    assert maps["a-red-poster/score"].max() > 0  # the same network, told something else


def test_a_trained_text_encoder_in_the_checkpoints_is_used(scan, trained, pretrained, prompts, images, tmp_path):
    """Three checkpoints of the same network, in the last of which only the text encoder differs; each event asks its own."""
    pipeline = StableDiffusionPipeline.from_pretrained(pretrained)
    for step in (1, 2, 3):
        if step == 3:
            with torch.no_grad():
                for parameter in pipeline.text_encoder.parameters():
                    parameter.mul_(1.5)
        pipeline.unet.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "unet")
        pipeline.text_encoder.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "text_encoder")
    assert scan(tmp_path / "run", "--images", images, "--pretrained", pretrained)[0] == 0
    second, third = (load_file(tmp_path / "memwatch" / "maps" / f"step_{step:07d}.safetensors") for step in (2, 3))
    assert (second["control0/score"] == 0).all()
    assert third["control0/score"].max() > 0
    code, _ = scan(
        tmp_path / "run" / "checkpoint-3",
        "--baseline",
        tmp_path / "run" / "checkpoint-1",
        "--images",
        images,
        "--pretrained",
        pretrained,
    )
    assert code == 0
    alone = load_file(tmp_path / "memwatch" / "maps" / "step_0000003.safetensors")
    assert torch.equal(alone["control0/score"], third["control0/score"])


def test_from_scan_to_eval(scan, trained, pretrained, images, tmp_path, capsys):
    """The deciding maps lie there as ``memwatch eval`` reads them."""
    assert scan(trained / "pipeline", "--baseline", pretrained, "--images", images)[0] == 0
    folder = tmp_path / "memwatch" / "decisive" / "step_0000000"
    maps = load_file(tmp_path / "memwatch" / "maps" / "step_0000000.safetensors")
    for i in range(3):
        assert (np.load(folder / f"control{i}.npy") == maps[f"control{i}/decisive"].numpy()).all()
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "control0.png")
    assert main(["eval", str(folder), str(tmp_path / "masks"), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["num_maps"]["template"] == 1


def test_trackers_get_the_reports_as_well(scan, trained, pretrained, prompts, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (
        scan(trained / "pipeline", "--baseline", pretrained, "--prompts", prompts, "--report-to", "tensorboard")[0] == 0
    )
    events = EventAccumulator(str(next((tmp_path / "memwatch").rglob("events.out.tfevents*")).parent)).Reload()
    assert "memwatch/severity/a-red-poster" in events.Tags()["scalars"]
    assert "memwatch/heatmap/a-red-poster" in events.Tags()["images"]


def save_lora(pretrained, folder, seed):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, lora_dropout=0.5, target_modules=["to_q", "to_v"]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=seed)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


@pytest.mark.parametrize("as_file", [True, False])
def test_lora_against_its_base(scan, pretrained, prompts, tmp_path, as_file):
    lora = save_lora(pretrained, tmp_path / "lora", 1)
    source = lora / "pytorch_lora_weights.safetensors" if as_file else lora
    code, measured = scan(source, "--pretrained", pretrained, "--prompts", prompts)
    assert code == 0
    assert len(measured) == 6
    maps = load_file(tmp_path / "memwatch" / "maps" / "step_0000000.safetensors")
    assert maps["a-red-poster/score"].max() > 0


def test_a_folder_of_loras(scan, pretrained, prompts, images, tmp_path):
    for step, seed in ((10, 0), (20, 1)):  # the first one does nothing yet
        save_lora(pretrained, tmp_path / "run" / f"checkpoint-{step}", seed)
    code, _ = scan(tmp_path / "run", "--pretrained", pretrained, "--prompts", prompts, "--images", images)
    assert code == 0
    assert [row["step"] for row in history(tmp_path)] == [10, 20]
    assert [f["baseline_step"] for f in history(tmp_path)[1]["findings"]] == [10] * 5
    within = load_file(tmp_path / "memwatch" / "maps" / "step_0000020.safetensors")
    shutil.rmtree(tmp_path / "memwatch")
    assert scan(tmp_path / "run", "--baseline", "base", "--pretrained", pretrained, "--prompts", prompts)[0] == 0
    with_base = load_file(tmp_path / "memwatch" / "maps" / "step_0000020.safetensors")
    assert torch.equal(within["a-red-poster/collapse"], with_base["a-red-poster/collapse"])


def test_bare_weights_on_a_pipeline(scan, trained, pretrained, prompts, tmp_path):
    (tmp_path / "checkpoint-7").mkdir()  # as accelerate saves a model by itself
    file = trained / "checkpoint-4" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, tmp_path / "checkpoint-7" / "model.safetensors")
    code, _ = scan(tmp_path / "checkpoint-7", "--pretrained", pretrained, "--baseline", file, "--prompts", prompts)
    assert code == 0
    (row,) = history(tmp_path)
    assert row["step"] == 7
    assert load_file(tmp_path / "memwatch" / "maps" / "step_0000007.safetensors")["a-red-poster/score"].max() == 0


# --- resuming ------------------------------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(scan, trained, pretrained, images, tmp_path):
    arguments = (trained, "--images", images, "--pretrained", pretrained)
    assert scan(*arguments)[0] == 0
    before = without_time(history(tmp_path))
    gone = next((tmp_path / "memwatch" / "looks" / "step_0000002").glob("control1-*"))
    gone.unlink()
    code, measured = scan(*arguments)
    assert code == 0
    assert measured == ["control1", "control1"]  # now and unconditional; the baseline comes from the earlier look
    assert without_time(history(tmp_path)) == before


def test_other_settings_measure_anew(scan, trained, pretrained, prompts, tmp_path):
    arguments = (trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    assert len(scan(*arguments)[1]) == 6
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(SETTINGS | {"alerts": {"max_p": 0.5}, "signals": {"smooth": 1}}), encoding="utf-8")
    assert scan(*arguments, settings=str(other))[1] == []  # judged differently, measured the same
    other.write_text(json.dumps(SETTINGS | {"seed": 3}), encoding="utf-8")
    assert len(scan(*arguments, settings=str(other))[1]) == 6


def test_a_damaged_look_is_measured_again(scan, trained, pretrained, prompts, tmp_path):
    arguments = (trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    scan(*arguments)
    look = next((tmp_path / "memwatch" / "looks").rglob("a-red-poster-*.safetensors"))
    look.write_bytes(look.read_bytes()[:500])
    assert scan(*arguments)[1] == ["a-red-poster"] * 3


def test_looks_survive_the_disk(trained, pretrained, images):
    loop = Loop(pretrained, trained / "unused")
    watch = loop.watch(pretrained, [Probe("a poster", name="p", seed=1), Probe("a cat", picture(0), name="c")])
    for look, prepared in zip(watch._look(0, watch._prepared), watch._prepared, strict=True):
        again = from_tensors(to_tensors(look), prepared)
        assert (again.name, again.prompt, again.timesteps, again.baseline, again.baseline_step) == (
            look.name,
            look.prompt,
            look.timesteps,
            None,
            None,
        )
        assert torch.equal(again.now.rho.samples, look.now.rho.samples)
        assert torch.equal(again.null.epsilon, look.null.epsilon)
        assert (again.image == look.image).all()
        assert (again.eps is None) == (look.eps is None)


# --- bad input -----------------------------------------------------------------------------------------------------------------------------


def test_one_prompts_failure_is_named_and_the_others_go_on(
    scan, trained, pretrained, prompts, tmp_path, capsys, monkeypatch
):
    real = memwatch.callback.prompt_view

    def failing(prepared, *rest):
        if "cat" in prepared.name:
            raise RuntimeError("no kernel for this")
        return real(prepared, *rest)

    arguments = (trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)
    with monkeypatch.context() as patch:
        patch.setattr(memwatch.callback, "prompt_view", failing)
        assert scan(*arguments)[0] == 1
    assert "a-cat-on-a-sofa: no kernel for this" in capsys.readouterr().err
    assert [f["name"] for f in history(tmp_path)[0]["findings"]] == ["a-red-poster"]
    code, measured = scan(*arguments)  # and the second run does only what is missing
    assert code == 0
    assert measured == ["a-cat-on-a-sofa"] * 3


def test_an_image_that_cannot_be_read_is_named_and_skipped(scan, trained, pretrained, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    file = tmp_path / "images" / "control1.png"
    file.write_bytes(file.read_bytes()[:60])
    assert scan(trained / "pipeline", "--baseline", pretrained, "--images", tmp_path / "images")[0] == 1
    assert "control1: cannot read image" in capsys.readouterr().err
    assert [f["name"] for f in history(tmp_path)[0]["findings"]] == ["control0", "control2"]


def test_a_truncated_checkpoint_is_named_and_the_others_are_scanned(
    scan, trained, pretrained, images, tmp_path, capsys
):
    for step in (0, 2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    cut(tmp_path / "run" / "checkpoint-2" / "unet" / "diffusion_pytorch_model.safetensors")
    assert scan(tmp_path / "run", "--images", images, "--pretrained", pretrained)[0] == 1
    assert "checkpoint-2: cannot be read: " in capsys.readouterr().err
    assert [row["step"] for row in history(tmp_path)] == [0, 4]


def test_a_truncated_first_checkpoint_makes_the_next_one_the_baseline(scan, trained, pretrained, images, tmp_path):
    for step in (0, 2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    cut(tmp_path / "run" / "checkpoint-0" / "unet" / "diffusion_pytorch_model.safetensors")
    assert scan(tmp_path / "run", "--images", images, "--pretrained", pretrained)[0] == 1
    assert [f["baseline_step"] for f in history(tmp_path)[1]["findings"]] == [2, 2, 2]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def smaller(folder):
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    unet.save_pretrained(folder / "unet")
    return folder


def other_family(folder):
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    unet.save_pretrained(folder / "unet")
    return folder


def other_prediction(folder, trained):
    shutil.copytree(trained / "pipeline", folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"prediction_type": "v_prediction"}), encoding="utf-8"
    )
    return folder


def truncated(folder, trained):
    shutil.copytree(trained / "checkpoint-4", folder)
    cut(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda t, d: [t / "pipeline", "--baseline", smaller(d / "s")], "has shape"),
        (
            lambda t, d: [t / "pipeline", "--baseline", other_family(d / "o")],
            "holds a UNet2DModel, expected a UNet2DConditionModel",
        ),
        (lambda t, d: [t / "pipeline", "--baseline", truncated(d / "t", t)], "t: cannot be read"),
        (
            lambda t, d: [truncated(d / "t", t), "--baseline", "unconditional", "--pretrained", t / "pipeline"],
            "t: cannot be read",
        ),
        (
            lambda t, d: [t / "pipeline", "--baseline", other_prediction(d / "v", t)],
            "predicts v_prediction, the model epsilon",
        ),
        (
            lambda t, d: [t / "pipeline", "--baseline", "unconditional", "--prompts", d / "empty.txt"],
            "holds no image and no prompt",
        ),
        (
            lambda t, d: [t / "pipeline", "--baseline", "unconditional", "--prompts", d / "none.txt"],
            "neither a folder nor a file",
        ),
        (lambda t, d: [t / "pipeline", "--baseline", "unconditional", "--prompts"], "nothing to look at"),
        (lambda t, d: [d / "gone.safetensors", "--pretrained", t / "pipeline"], "gone.safetensors: cannot be read"),
        (lambda t, d: [t / "pipeline"], "--baseline: missing"),
        (lambda t, d: [t / "pipeline", "--baseline", "previous"], "needs a folder of checkpoints"),
        (lambda t, d: [t / "pipeline", "--baseline", "base"], "no LoRA layers"),
        (lambda t, d: [t / "checkpoint-4", "--baseline", "unconditional"], "--pretrained: missing"),
        (lambda t, d: [t / "memwatch", "--baseline", "unconditional", "--pretrained", t / "pipeline"], "no unet or"),
        (
            lambda t, d: [t / "pipeline", "--baseline", "unconditional", "--preset", "papper"],
            "--preset.*allowed: .*paper",
        ),
    ],
)
def test_bad_input_is_one_clear_message(scan, trained, prompts, tmp_path, capsys, config, arguments, message):
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    arguments = arguments(trained, tmp_path)
    if "--prompts" not in arguments:
        arguments += ["--prompts", prompts]
    elif arguments[-1] == "--prompts":
        arguments.pop()
    code, _ = scan(*arguments, settings=None if "--preset" in arguments else config)
    errors = capsys.readouterr().err
    assert code == 2
    assert re.search(message, errors), errors


def test_a_trainings_history_is_never_overwritten(scan, trained, pretrained, prompts, tmp_path, capsys):
    (tmp_path / "memwatch").mkdir()
    (tmp_path / "memwatch" / "history.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    assert scan(trained / "pipeline", "--baseline", pretrained, "--prompts", prompts)[0] == 2
    assert "that no scan wrote" in capsys.readouterr().err
    assert (tmp_path / "memwatch" / "history.jsonl").read_text(encoding="utf-8") == '{"step": 0}\n'


def test_prompts_longer_than_the_text_encoder_still_work(scan, trained, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("a cat " * TOKENS + "\n", encoding="utf-8")
    assert scan(trained / "pipeline", "--baseline", "unconditional", "--prompts", file)[0] == 0
