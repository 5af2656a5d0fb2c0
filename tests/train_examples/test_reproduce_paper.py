"""reproduce_paper.py: its loaders on a folder of the hub's layout, Bright Ending by hand, and the script end to end."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from evidence import planted, reproduce_paper
from evidence.runs.bright_ending import bright_ending, recording
from evidence.templates_verbs import memorized
from PIL import Image
from support.processes import new_process

from memwatch.config_file import load_config
from memwatch.denoiser import family_of
from memwatch.denoiser.schedule import NoiseSchedule


def save(file, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def save_prompts(folder, *prompts):
    """The ground truth of ``sdv1``: kinds, and their pairs of a seed and a template."""
    rows = [{"caption": "a phone case", "overfit_type": kind, "gen_seeds": seeds} for kind, seeds in prompts]
    save(folder / "sdv1_bb_groundtruth.parquet", rows)


@pytest.fixture
def layout(tmp_path):
    """As on the hub: two templates, prompts of every kind; one mask's path is from the root, the other's anywhere."""
    folder = tmp_path / "templates-verbs"
    (folder / "templates" / "mask").mkdir(parents=True)
    half, corner = np.zeros((512, 512), np.uint8), np.zeros((128, 128), np.uint8)
    half[:, :256], corner[:64, :64] = 255, 255
    Image.fromarray(half).save(folder / "templates" / "mask" / "half_mask.jpg")
    Image.fromarray(corner).save(folder / "templates" / "corner_mask.png")
    files = ["templates/mask/half_mask.jpg", "elsewhere/corner_mask.png"]
    save(folder / "templates" / "metadata.parquet", [{"mask_file": file} for file in files])
    retrieved = ("RV", [[seed, -1] for seed in range(6)])
    save_prompts(folder, ("TV", [[3, 0], [7, 1]]), ("MV", [[5, -1]]), retrieved, ("N", [[0, -1]]), ("TV", None))
    save(folder / "sdv1_all.parquet", [{"caption": "not matched yet"}])
    return folder


def test_cases_of_every_kind(layout):
    cases, problems = memorized(layout, "sdv1")
    assert problems == []
    names = [case.name for case in cases]
    assert names[:3] == ["template-0000-seed-03", "template-0000-seed-07", "verbatim-0001-seed-05"]
    assert names[3:] == [f"verbatim-0002-seed-{seed:02d}" for seed in range(4)]  # four seeds a prompt
    left, top = np.indices((256, 256))[::-1] < 128
    for case, expected in zip(cases, (left, left & top, left | True), strict=False):
        assert np.array_equal(case.mask, expected), case.name


def test_a_missing_mask_is_named_and_the_others_stay(layout):
    (layout / "templates" / "mask" / "half_mask.jpg").unlink()
    save_prompts(layout, ("TV", [[3, 0], [7, 1], [8, 2]]))
    (case,), (no_file, no_row) = memorized(layout, "sdv1")
    assert case.name == "template-0000-seed-07"
    assert re.match("template-0000-seed-03: .*half_mask.jpg", no_file)
    assert no_row == "template-0000-seed-08: template 2 is not in a table of 2"


def test_bright_ending_is_the_last_tokens_attention(pipeline):
    """The tiny network has one layer of cross-attention on its way down, at 4x4."""
    denoiser = family_of(pipeline.unet)(pipeline.unet, NoiseSchedule.from_scheduler(pipeline.scheduler))
    torch.manual_seed(0)
    x, hidden, token = torch.randn(4, 8, 8), torch.randn(32, 16), 5
    layer = pipeline.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    plain = denoiser(x[None], torch.tensor([1]), {"encoder_hidden_states": hidden[None]})
    before = dict(pipeline.unet.attn_processors)
    found = bright_ending(denoiser, x, 1, {"encoder_hidden_states": hidden}, token)
    hook.remove()

    assert pipeline.unet.attn_processors == before  # the very same objects
    with recording(pipeline.unet, token):
        again = denoiser(x[None], torch.tensor([1]), {"encoder_hidden_states": hidden[None]})
    assert torch.equal(plain, again)  # recording changes nothing
    with torch.no_grad():
        queries = layer.to_q(seen[0][0]).unflatten(-1, (layer.heads, -1))
        keys = layer.to_k(hidden).unflatten(-1, (layer.heads, -1))
        attention = (torch.einsum("phd,thd->hpt", queries, keys) * queries.shape[-1] ** -0.5).softmax(-1)
    np.testing.assert_allclose(found, attention[:, :, token].mean(0).reshape(4, 4).numpy(), rtol=1e-4)


def test_the_whole_script(tmp_path, capsys, monkeypatch):
    """The smoke run with fewer steps of everything; what it finds means nothing."""
    monkeypatch.setattr(planted, "STEPS", 2)
    config = load_config(reproduce_paper.CONFIG, sampling={"num_inference_steps": 4}, curvature={"vectors": 4})
    monkeypatch.setattr(reproduce_paper, "CONFIG", config)
    assert reproduce_paper.main(["--smoke", "--output_dir", str(tmp_path)]) == 0
    new_process()
    assert re.search("(?s)no comparison.*SMOKE", capsys.readouterr().out)
    assert "bright_ending" in (tmp_path / "table.txt").read_text(encoding="utf-8")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["smoke"] is True
    assert result["paper"]["curvature_earlier"] == {"iou": 0.921, "auc": 0.989, "tpr_at_1_fpr": 0.9}
    assert set(result["signals"]) == set(reproduce_paper.PAPER)
    for name, numbers in result["signals"].items():
        assert numbers["num_maps"] == {"template": 4, "verbatim": 1, "non_memorized": 3}, name
    masks = [planted.BOXES[name] for name in ("banner", "sticker")]
    share = np.mean([(right - left) * (bottom - top) / 64**2 for left, top, right, bottom in masks])
    assert result["signals"]["all_ones"]["template"]["oracle"]["iou"] == pytest.approx(share)
    assert result["signals"]["all_ones"]["auc"] == 0.5

    maps = tmp_path / "maps" / "score_earlier"
    assert np.load(maps / "template-0000-seed-00.npy").shape == (16, 16)
    before = {file: file.stat().st_mtime_ns for file in maps.glob("*.npy")}
    gone = maps / "template-0000-seed-01.npy"
    gone.unlink()
    assert reproduce_paper.main(["--smoke", "--output_dir", str(tmp_path)]) == 0  # goes on where it was
    assert {file for file in maps.glob("*.npy") if before[file] != file.stat().st_mtime_ns} == {gone}
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["signals"] == result["signals"]


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks.*")  # diffusers, towards the hub's client
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_dir", "none"], r"none: no sdv1\*.parquet"),
        (["--non_memorized", "none.txt", "--data_dir", "LAYOUT"], "none.txt: no such file"),
        ([], "hub data set fraisdufour/templates-verbs cannot be loaded; a folder of it can be passed as --data_dir"),
        (["--data_dir", "LAYOUT", "--model", "no/such-model"], "no/such-model"),
    ],
)
def test_what_is_missing_is_one_line(layout, tmp_path, capsys, arguments, message):
    arguments = [str(layout) if argument == "LAYOUT" else argument for argument in arguments]
    assert reproduce_paper.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reproduce_paper: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors
