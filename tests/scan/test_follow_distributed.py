"""``memwatch scan --follow`` in two gloo processes: one looks into the folder, and both do as it says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from support.builders import without_time
from support.followed import QUICK, rows_in, save_loras
from support.processes import new_process, on_two_ranks

from memwatch.cli import main

WORLD = 2


def follow(folder: Path, output: Path) -> int:
    """The exit code of the command, which ends soon after the last checkpoint."""
    waits = ["--poll", "0.01", "--idle", "0.001"]
    given = ["--prompts", folder / "prompts.txt", "--config", folder / "config.json", "--output", output]
    pretrained = (folder / "pretrained.txt").read_text(encoding="utf-8")
    return main(["scan", "--follow", *map(str, (folder / "run", "--pretrained", pretrained, *given)), *waits])


def on_one_rank(folder: Path) -> None:
    code = follow(folder, folder / "shared")
    (folder / f"code{os.environ['RANK']}").write_text(str(code), encoding="utf-8")


@pytest.fixture(scope="module")
def ranks(pretrained, tmp_path_factory):
    """The folder, and the exit code of each rank; one of the files cannot be read."""
    folder = tmp_path_factory.mktemp("ranks")
    save_loras(pretrained, folder / "run", (2, 6))
    (folder / "run" / "run-step00000004.safetensors").write_bytes(b"nothing")
    (folder / "pretrained.txt").write_text(str(pretrained), encoding="utf-8")
    (folder / "prompts.txt").write_text("a cat\na dog\na poster", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(QUICK), encoding="utf-8")
    on_two_ranks(__file__, folder, folder=folder)
    return folder, [int((folder / f"code{rank}").read_text(encoding="utf-8")) for rank in range(WORLD)]


def test_both_ranks_end_alike_and_with_the_history_of_one(ranks):
    folder, codes = ranks
    assert codes == [1, 1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks: another number of threads sums in another order
    try:
        new_process()
        assert follow(folder, folder / "alone") == 1
    finally:
        torch.set_num_threads(threads)
    ours = rows_in(folder / "shared")
    assert [row["step"] for row in ours] == [0, 2, 6]
    assert without_time(ours) == without_time(rows_in(folder / "alone"))


if __name__ == "__main__":
    on_one_rank(Path(sys.argv[1]))
