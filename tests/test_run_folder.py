"""The folder of a run: one live run at a time, and nothing of an earlier run is overwritten or deleted."""

from __future__ import annotations

import gc
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.builders import SMALL, Loop, history, picture
from support.processes import ROOT, new_process

from memwatch import ConfigError, Probe
from memwatch.run_folder import OWNER, RunFolder, owner_of

PROBES = [Probe("a cat", picture(0), name="cat"), Probe("a poster", name="poster")]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def ours(folder: Path) -> dict[str, bytes]:
    """All but the lock, and what lies in ``earlier``."""
    return {k: v for k, v in files_of(folder).items() if k != "memwatch.lock" and not k.startswith("earlier")}


# --- one live run -----------------------------------------------------------------------------------------------------


def test_a_second_live_run_in_the_same_folder_is_refused(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    first = loop.watch(pipeline, PROBES, config=SMALL)
    first.begin()
    before = ours(tmp_path / "memwatch")
    with pytest.raises(ConfigError, match=r"'output_dir': got '.*memwatch', allowed: a folder that no other live run"):
        loop.watch(pipeline, PROBES, config=SMALL)
    assert ours(tmp_path / "memwatch") == before
    loop.watch(pipeline, PROBES, config=SMALL, output_dir=str(tmp_path / "other"))
    assert first.on_step_end(2) is not None


def test_after_closing_the_folder_is_free(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    first = loop.watch(pipeline, PROBES, config=SMALL)
    first.close()
    second = loop.watch(pipeline, PROBES, config=SMALL)
    loop.accelerator.end_training()
    third = loop.watch(pipeline, PROBES, config=SMALL)
    assert first.on_step_end(2) is second.on_step_end(2) is None
    assert third.begin() is not None


def test_a_watch_that_nobody_holds_lets_go(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    for _ in range(2):
        loop.watch(pipeline, PROBES, config=SMALL)
    watch = loop.watch(pipeline, PROBES, config=SMALL)
    watch.itself = watch  # a circle, which only the collector takes apart
    gc.disable()
    try:
        del watch
        loop.watch(pipeline, PROBES, config=SMALL)
    finally:
        gc.enable()


def test_a_construction_that_failed_holds_nothing(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    with pytest.raises(ConfigError) as caught:
        loop.watch(pipeline, PROBES, config=SMALL, resolution=17)
    assert caught.traceback  # which holds on to what was made until then
    loop.watch(pipeline, PROBES, config=SMALL)


def test_the_lock_of_another_process_is_seen_and_ends_with_it(tmp_path):
    code = (
        "import sys, pathlib; from memwatch.run_folder import RunFolder\n"
        "print(RunFolder(pathlib.Path(sys.argv[1])).lock() and (held := RunFolder(pathlib.Path(sys.argv[2]))).lock())\n"
        "sys.stdout.flush(); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    folder = RunFolder(tmp_path / "b")
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline().strip() == "True"
        assert not folder.lock()
        other.kill()
    assert folder.lock()


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert RunFolder(tmp_path / "file").lock()
    (said,) = caplog.messages
    assert "cannot be locked" in said
    assert "no two runs use it" in said


def test_construction_draws_no_random_number(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loop.watch(pipeline, PROBES, config=SMALL)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_script_may_change_its_working_directory(pretrained, pipeline, tmp_path, monkeypatch):
    """Relative paths are those of the directory that MemWatch was constructed in."""
    (tmp_path / "first" / "probes").mkdir(parents=True)
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    picture(0).save("probes/cat.png")
    weights = {name: p.detach() for name, p in Loop(pretrained).bare.named_parameters()}
    save_file(weights, "before.safetensors")
    options = {"config": SMALL, "output_dir": "memwatch", "signals": {"baseline": "path:before.safetensors"}}
    loop = Loop(pretrained, tmp_path / "first")
    watch = loop.watch(pipeline, "probes", **options)
    monkeypatch.chdir(tmp_path / "second")
    (report,) = loop.run(watch, 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    assert report.failure is None
    assert report.findings[0].signals.snapshot is not None
    assert report.baseline_text(report.findings[0]) == "before.safetensors"
    assert str(tmp_path) not in json.dumps(watch.about.settings)
    watch.close()

    monkeypatch.chdir(tmp_path / "first")
    resumed = Loop(pretrained, tmp_path / "first")
    watch = resumed.watch(pipeline, "probes", **options)
    monkeypatch.chdir(tmp_path / "second")
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    resumed.step = 2
    (report,) = resumed.run(watch, 4)
    watch.close()
    assert report.findings[0].signals.snapshot is not None
    assert [row["step"] for row in history(tmp_path / "first")] == [0, 2, 4]
    assert (tmp_path / "first" / "memwatch" / "report.html").is_file()
    assert list((tmp_path / "second").iterdir()) == []


def test_the_ledger_is_found_after_a_change_of_directory(pretrained, pipeline, tmp_path, monkeypatch):
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path)
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, PROBES, config=SMALL, output_dir="memwatch")
    watch.begin()
    monkeypatch.chdir(tmp_path / "second")
    (report,) = loop.run(watch, 2)
    watch.close()
    assert [f.observation.baseline_step for f in report.findings] == [0, 0]
    assert [row["step"] for row in history(tmp_path)] == [0, 2]
    assert list((tmp_path / "second").iterdir()) == []


# --- one run after the other ------------------------------------------------------------------------------------------


def test_a_fresh_run_moves_the_files_of_another_aside(pretrained, pipeline, tmp_path, caplog):
    folder = tmp_path / "memwatch"
    kept = []
    for seed in range(3):
        loop = Loop(pretrained, tmp_path, lr=1e-2 * (1 + seed))
        watch = loop.watch(pipeline, PROBES, config=SMALL)
        (folder / "notes.txt").write_text("the user's own", encoding="utf-8")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "memwatch"):
            loop.run(watch, 2)
            watch.close()
        said = [m for m in caplog.messages if "another run" in m]
        assert (
            said
            == [f"memwatch: {folder} held the files of another run; they are in {folder}/earlier/{seed:04d} now"][:seed]
        )
        found = {name: data for name, data in ours(folder).items() if name != "notes.txt"}
        names = {"history.jsonl", "about.json", "report.html", "images/cat.png", "heatmaps/cat/step_0000002.jpg"}
        names |= {"ledger/step_0000000.safetensors", "snapshots/step_0000000.safetensors"}
        assert names <= set(found)
        assert [row["step"] for row in history(tmp_path)] == [0, 2]
        kept.append(found)
    assert files_of(folder / "earlier" / "0001") == kept[0]
    assert files_of(folder / "earlier" / "0002") == kept[1]
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "the user's own"


def test_files_of_an_older_memwatch_are_moved_as_well(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    (tmp_path / "maps").mkdir()
    folder = RunFolder(tmp_path)
    folder.enter("a")
    assert (tmp_path / "earlier" / "0001" / "history.jsonl").read_text(encoding="utf-8") == '{"step": 0}\n'
    assert (tmp_path / "earlier" / "0001" / "maps").is_dir()
    assert owner_of(tmp_path) == "a"


def test_folders_that_are_not_memwatchs_stay(tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "maps").mkdir()
    RunFolder(tmp_path).enter("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps", OWNER, "snapshots"]


def test_a_run_that_left_nothing_leaves_no_folder(tmp_path):
    RunFolder(tmp_path).enter("a")
    RunFolder(tmp_path).enter("b")
    assert [path.name for path in tmp_path.iterdir()] == [OWNER]


def test_a_resumed_run_goes_on_in_place_also_when_another_was_there_meanwhile(pretrained, pipeline, tmp_path):
    folder = tmp_path / "memwatch"
    first = Loop(pretrained, tmp_path)
    watch = first.watch(pipeline, PROBES, config=SMALL)
    first.run(watch, 2)
    first.accelerator.save_state(str(tmp_path / "checkpoint"))
    left = {name: data for name, data in ours(folder).items() if "step_" in name}

    between = Loop(pretrained, tmp_path)
    other = between.watch(pipeline, PROBES, config=SMALL)
    between.run(other, 4)
    theirs = ours(folder)

    resumed = Loop(pretrained, tmp_path)
    watch = resumed.watch(pipeline, PROBES, config=SMALL)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert {name: data for name, data in ours(folder).items() if "step_" in name} == left
    assert [row["step"] for row in history(tmp_path)] == [0, 2]
    assert files_of(folder / "earlier" / "0002") == theirs
    assert not (folder / "earlier" / "0001").exists()
    resumed.step = 2
    report = resumed.run(watch, 4)[-1]
    assert {f.observation.baseline_step for f in report.findings} == {0}
    assert [row["step"] for row in history(tmp_path)] == [0, 2, 4]
    new_process()
