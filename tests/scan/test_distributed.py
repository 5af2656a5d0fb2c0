"""``memwatch scan`` and its ``--follow`` in two gloo processes: prompts are shared out, and every rank ends alike."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.builders import CONFIG, history, maps, without_time
from support.followed import QUICK, rows_in, save_loras
from support.processes import new_process, on_two_ranks
from support.scans import scan_into

from memwatch.cli import main
from memwatch.measure.observer import Observer

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD = 2
PROMPTS = ["a cat", "a dog", "a poster"]


def command(folder: Path) -> list[str]:
    """Two models by their prompts."""
    return [str(folder / "now"), "--baseline", str(folder / "earlier"), "--prompts", str(folder / "prompts.txt")]


def follow(folder: Path, output: Path) -> int:
    """The exit code of following a folder in which one file cannot be read; it ends soon after the last one."""
    given = ["--pretrained", folder / "earlier", "--prompts", folder / "prompts.txt", "--output", output]
    waits = ["--config", folder / "quick.json", "--poll", "0.01", "--idle", "0.001"]
    return main(["scan", "--follow", *map(str, (folder / "run", *given, *waits))])


def on_one_rank(folder: Path, what: str) -> None:
    """A scan in which one prompt fails, or a follower."""
    real = Observer.view

    def failing(self, p):
        if p.name == "a-dog":  # the second prompt: the second rank's
            raise RuntimeError("no kernel for this")
        return real(self, p)

    if what == "follow":
        code = follow(folder, folder / "followed")
    else:
        Observer.view = failing
        config, output = str(folder / "config.json"), str(folder / "shared" / "memwatch")
        code = main(["scan", *command(folder), "--config", config, "--output", output])
    (folder / f"{what}{os.environ['RANK']}").write_text(str(code), encoding="utf-8")


@pytest.fixture(scope="module")
def ranks(pretrained, tmp_path_factory):
    """The folder, the exit codes of both ranks, and what the scan printed."""
    folder = tmp_path_factory.mktemp("ranks")
    pipeline = StableDiffusionPipeline.from_pretrained(pretrained)
    pipeline.save_pretrained(folder / "earlier")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    pipeline.save_pretrained(folder / "now")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "quick.json").write_text(json.dumps(QUICK), encoding="utf-8")
    save_loras(pretrained, folder / "run", (2, 6))
    (folder / "run" / "run-step00000004.safetensors").write_bytes(b"nothing")
    said = {what: on_two_ranks(__file__, folder, what, folder=folder) for what in ("scan", "follow")}
    codes = [int((folder / f"{what}{rank}").read_text(encoding="utf-8")) for what in said for rank in range(WORLD)]
    return folder, codes, said["scan"]


@pytest.fixture
def one_thread():
    """As on the ranks: another number of threads sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(folder, name):
    """The same scan in this process; its exit code, and what was measured."""
    return scan_into(folder / name / "memwatch", *command(folder), settings=str(folder / "config.json"))


def test_a_failure_on_one_rank_is_in_every_ranks_exit_code(ranks):
    folder, codes, said = ranks
    assert codes == [1, 1, 1, 1]
    assert [f["name"] for f in history(folder / "shared")[0]["findings"]] == ["a-cat", "a-poster"]
    assert "skipped: step 0, a-dog: no kernel for this" in said


def test_sharing_out_changes_no_number(ranks):
    folder, *_ = ranks
    assert alone(folder, "alone")[0] == 0
    own, shared = maps(folder / "alone", 0), maps(folder / "shared", 0)
    assert own["a-cat/score"].max() > 0
    assert own.keys() > shared.keys()
    floored = {key for key in shared if key.split("/")[1].split(".")[0] in ("loss_log_ratio", "decisive", "heatmap")}
    same = {key for key in shared if torch.equal(shared[key], own[key])}
    assert same | floored == shared.keys()  # without controls the loss's floor is of all probes, here one fewer


def test_one_process_goes_on_where_two_were(ranks):
    folder, *_ = ranks
    shutil.copytree(folder / "shared", folder / "again")
    assert alone(folder, "again") == (0, ["a-dog"] * 4)
    assert [f["name"] for f in history(folder / "again")[0]["findings"]] == ["a-cat", "a-dog", "a-poster"]


def test_both_ranks_follow_alike_and_write_the_history_of_one(ranks):
    folder, *_ = ranks
    new_process()
    assert follow(folder, folder / "followed-alone") == 1
    ours = rows_in(folder / "followed")
    assert [row["step"] for row in ours] == [0, 2, 6]
    assert without_time(ours) == without_time(rows_in(folder / "followed-alone"))


if __name__ == "__main__":
    on_one_rank(Path(sys.argv[1]), sys.argv[2])
