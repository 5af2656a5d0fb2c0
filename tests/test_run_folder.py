"""The folder of a run: one live run at a time, and nothing of an earlier run is overwritten or deleted."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.builders import SMALL, Loop, history, picture
from support.picked import contents
from support.processes import ROOT

from memwatch import ConfigError, Probe
from memwatch.measure.weights import trainable
from memwatch.run_folder import OWNER, RunFolder, owner_of

PROBES = [Probe("a cat", picture(0), name="cat"), Probe("a poster", name="poster")]


def ours(folder: Path) -> dict[str, bytes]:
    """All but the lock, and what lies in ``earlier``."""
    return {k: v for k, v in contents(folder).items() if k != "memwatch.lock" and not k.startswith("earlier")}


@pytest.fixture
def start(pretrained, pipeline, tmp_path):
    """Makes another loop with a watch in the same folder."""

    def make(loop=None, **overrides):
        loop = loop or Loop(pretrained, tmp_path)
        return loop, loop.watch(pipeline, PROBES, config=SMALL, **overrides)

    return make


def test_a_second_live_run_is_refused_and_the_folder_is_free_when_the_first_is_gone(start, tmp_path):
    loop, first = start()
    first.begin()
    before = ours(tmp_path / "memwatch")
    with pytest.raises(ConfigError, match=r"'output_dir': got '.*memwatch', allowed: a folder that no other live run"):
        start(loop)
    assert ours(tmp_path / "memwatch") == before
    start(loop, output_dir=str(tmp_path / "other"))
    assert first.on_step_end(2) is not None
    first.close()
    with pytest.raises(ConfigError) as caught:
        start(loop, resolution=17)
    assert caught.traceback  # which holds on to what was made until then
    _, second = start(loop)
    loop.accelerator.end_training()
    assert first.on_step_end(2) is second.on_step_end(2) is None
    _, third = start(loop)
    assert third.begin() is not None
    third.itself = third  # a circle, which only the collector takes apart
    gc.disable()
    try:
        del third
        start(loop)
    finally:
        gc.enable()


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
    assert "cannot be locked" in caplog.text


def test_a_script_may_change_its_working_directory(pretrained, pipeline, tmp_path, monkeypatch):
    """Relative paths are those of the directory that MemWatch was constructed in."""
    (tmp_path / "first" / "probes").mkdir(parents=True)
    (tmp_path / "second").mkdir()
    picture(0).save(tmp_path / "first" / "probes" / "cat.png")
    save_file(trainable(Loop(pretrained).bare), tmp_path / "first" / "before.safetensors")
    options = {"config": SMALL, "output_dir": "memwatch", "signals": {"baseline": "path:before.safetensors"}}
    monkeypatch.chdir(tmp_path / "first")
    loop = Loop(pretrained, tmp_path / "first")
    watch = loop.watch(pipeline, "probes", **options)
    monkeypatch.chdir(tmp_path / "second")
    (report,) = loop.run(watch, 2)
    assert report.failure is None
    assert report.baseline_text(report.findings[0]) == "before.safetensors"
    assert str(tmp_path) not in json.dumps(watch.about.settings)
    watch.close()
    folder = tmp_path / "first" / "memwatch"
    assert [row["step"] for row in history(tmp_path / "first")] == [0, 2]
    assert (folder / "report.html").is_file()
    assert list((tmp_path / "second").iterdir()) == []
    assert len(list((folder / "overview").iterdir())) == 2


def test_a_fresh_run_moves_the_files_of_another_aside(start, tmp_path, caplog):
    folder, kept = tmp_path / "memwatch", []
    for number in range(3):
        loop, watch = start()
        (folder / "notes.txt").write_text("the user's own", encoding="utf-8")
        caplog.clear()
        with caplog.at_level(logging.INFO, "memwatch"):
            loop.run(watch, 2)
            watch.close()
        moved = f"the files of another run in {folder} were moved to {folder}/earlier/{number:04d}"
        assert [m for m in caplog.messages if "another run" in m] == [moved][:number]
        kept.append({name: data for name, data in ours(folder).items() if name != "notes.txt"})
        names = {"history.jsonl", "about.json", "report.html", "images/cat.png", "heatmaps/cat/step_0000002.jpg"}
        assert names | {f"{name}/step_0000000.safetensors" for name in ("ledger", "snapshots")} <= set(kept[-1])
        assert [row["step"] for row in history(tmp_path)] == [0, 2]
    assert [contents(folder / "earlier" / name) for name in ("0001", "0002")] == kept[:2]
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "the user's own"


def test_what_is_moved_and_what_stays(tmp_path):
    """Files without an owner are memwatch's where there is a history; a run that left nothing leaves no folder."""
    for name in ("maps", "snapshots"):
        (tmp_path / name).mkdir()
    RunFolder(tmp_path).enter("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps", OWNER, "snapshots"]
    (tmp_path / OWNER).unlink()
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    RunFolder(tmp_path).enter("b")
    assert {path.name for path in (tmp_path / "earlier" / "0001").iterdir()} == {"history.jsonl", "maps", "snapshots"}
    RunFolder(tmp_path).enter("c")
    assert [path.name for path in (tmp_path / "earlier").iterdir()] == ["0001"]
    assert owner_of(tmp_path) == "c"


def test_a_resumed_run_goes_on_in_place_also_when_another_was_there_meanwhile(start, tmp_path):
    folder = tmp_path / "memwatch"
    loop, watch = start()
    loop.run(watch, 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    left = {name: data for name, data in ours(folder).items() if "step_" in name}
    between, other = start()
    between.run(other, 4)
    theirs = ours(folder)
    resumed, watch = start()
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert {name: data for name, data in ours(folder).items() if "step_" in name} == left
    assert [row["step"] for row in history(tmp_path)] == [0, 2]
    assert contents(folder / "earlier" / "0002") == theirs
    assert not (folder / "earlier" / "0001").exists()
    resumed.step = 2
    report = resumed.run(watch, 4)[-1]
    assert {f.observation.baseline_step for f in report.findings} == {0}
    assert [row["step"] for row in history(tmp_path)] == [0, 2, 4]
