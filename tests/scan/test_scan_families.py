"""``memwatch scan`` on every family: against an earlier model, and a LoRA on its base."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from support import families as tiny
from support.builders import CONFIG, maps
from support.families import SIZE
from support.processes import new_process

from memwatch.cli import main
from memwatch.scan.checkpoints import PARTS

FAMILIES = ("sdxl", "sd3", "flux", "unconditional")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The earlier pipeline, and the folder of a later one, whole and as diffusers' scripts leave a checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    earlier = getattr(tiny, request.param)(folder)
    pipeline = DiffusionPipeline.from_pretrained(earlier)
    part = part_of(pipeline)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in getattr(pipeline, part).parameters():
            parameter.add_(0.2 * parameter.std(correction=0) * torch.randn_like(parameter))
    pipeline.save_pretrained(folder / "now")
    getattr(pipeline, part).save_pretrained(folder / "checkpoint-3" / part)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"resolution": SIZE}), encoding="utf-8")
    return earlier, folder


def scan(folder, output, *arguments):
    """Run the command into ``output/memwatch``; its exit code."""
    new_process()
    where = ["--config", str(folder / "config.json"), "--output", str(output / "memwatch")]
    return main(["scan", *map(str, arguments), *where])


def part_of(pipeline) -> str:
    """The name of what denoises in it."""
    return next(name for name in PARTS if hasattr(pipeline, name))


def test_two_models(family, images, tmp_path):
    earlier, folder = family
    assert scan(folder, tmp_path, folder / "now", "--baseline", earlier, "--images", images) == 0
    whole = maps(tmp_path, 0)
    assert all(whole[f"control{i}/score"].max() > 0 for i in range(3))
    arguments = (folder / "checkpoint-3", "--pretrained", earlier, "--baseline", folder / "now", "--images", images)
    assert scan(folder, tmp_path / "again", *arguments) == 0
    itself = maps(tmp_path / "again", 3)
    assert all((itself[f"control{i}/score"] == 0).all() for i in range(3))
