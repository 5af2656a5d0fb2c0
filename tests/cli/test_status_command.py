"""The command ``memwatch status``: the newest event of a run, at any moment of its life."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.builders import SMALL, Loop

from memwatch.cli import main
from memwatch.report.history import Run
from memwatch.report.terminal import summary

OLD = {  # as the first version wrote it
    "name": "banner",
    "prompt": "a banner",
    "is_reference": True,
    "reason": "2.2x, p = 6.5e-12, since step 100",
    "severity": 2.24,
    "severity_low": 2.1,
    "p": 6.5e-12,
    "baseline_step": 0,
    "since": 100,
    "verdict": "memorized",
    "alert": False,
    "timesteps": [141, 501],
    "regions": [{"box": [0, 0, 64, 28], "area": 0.4}],
    "copied": {"generations": 8, "copies": 0, "ratios": [0.9], "of_others": {}},
}
EVENT = {
    "step": 100,
    "findings": [OLD, OLD | {"name": "photo", "verdict": "no evidence", "p": 1.0, "regions": [], "copied": None}],
    "controls": {"control/a": 1.1},
    "audit": "0 of 20 controls called; at most 14 % at 95 % confidence",
    "seconds": 7.1,
    "overhead": 0.02,
    "errors": 0,
    "stop_reason": "step 100: 1 probe(s) memorized: banner",
    "failure": None,
}
LOST = {"step": 110, "findings": [], "seconds": 0.5, "errors": 1, "failure": "looking at the model failed: OOM"}


@pytest.fixture
def status(tmp_path, capsys):
    """Runs the command; its exit code and what it printed, lines on stdout and on stderr."""

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        code = main(["status", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def write(folder, *lines, cut_off=""):
    text = "".join(json.dumps(line) + "\n" for line in lines) + cut_off
    (folder / "history.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_run_of_an_older_version_has_a_status(status, tmp_path):
    code, lines, errors = status(write(tmp_path, EVENT))
    assert (code, errors) == (0, [])
    assert lines == [
        "memwatch, step 100: 1 memorized, 1 no evidence",
        "  probe   verdict      effect  p        region, px    generations",
        "  banner  memorized    2.2x    6.5e-12  0,0 to 64,28  0 of 8 copy it",
        "  photo   no evidence  2.2x    1",
        "  0 of 20 controls called; at most 14 % at 95 % confidence",
        "  7.1 s, 2.0 % of training time",
        "  STOP: step 100: 1 probe(s) memorized: banner",
    ]


def test_it_says_what_the_run_itself_has_printed(status, pretrained, pipeline, tmp_path, capsys):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL, max_train_steps=40)
    loop.run(watch, 2)
    printed = capsys.readouterr().out
    code, lines, _ = status(tmp_path / "memwatch")  # the run still lives, and holds its lock
    assert (code, lines[0].split(":")[0]) == (0, "memwatch, step 2 of 40")
    assert "\n".join(lines) in printed
    assert watch.on_step_end(4) is not None


def test_a_resumed_run_shows_what_came_last_after_the_resume(status, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL)
    loop.run(watch, 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    loop.run(watch, 6)
    assert status(tmp_path / "memwatch")[1][0].startswith("memwatch, step 6: ")
    again = Loop(pretrained, tmp_path)
    resumed = again.watch(pipeline, config=SMALL)
    again.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert status(tmp_path / "memwatch")[1][0].startswith("memwatch, step 2: ")
    assert resumed.on_step_end(4) is not None
    assert status(tmp_path / "memwatch")[1][0].startswith("memwatch, step 4: ")


def test_a_half_written_line_is_not_shown_yet(status, tmp_path):
    half = json.dumps(EVENT | {"step": 120})[:300]
    assert status(write(tmp_path, EVENT, cut_off=half))[1][0].startswith("memwatch, step 100: ")
    code, lines, errors = status(write(tmp_path, cut_off=half))
    assert (code, lines) == (2, [])
    assert errors == [f"memwatch status: {tmp_path / 'history.jsonl'} holds no event yet"]


def test_an_event_that_was_lost_is_shown_beside_the_last_one_that_was_not(status, tmp_path):
    code, lines, _ = status(write(tmp_path, EVENT, LOST))
    assert (code, lines) == (
        0,
        [
            "memwatch, step 110: this event is lost, since looking at the model failed: OOM",
            "  0.5 s, 1 failure of memwatch so far",
            "the last event that was not lost is that of step 100: 1 memorized, 1 no evidence",
        ],
    )
    assert status(write(tmp_path, LOST))[1] == lines[:2]


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_a_run_is_one_clear_line(name, status, tmp_path):
    (tmp_path / "empty").mkdir()
    code, lines, errors = status(tmp_path / name)
    assert (code, lines) == (2, [])
    said = "holds no history.jsonl; allowed: the output_dir of a run or of a scan, after its first event"
    assert errors == [f"memwatch status: {tmp_path / name} {said}"]


def test_the_folder_above_a_run_names_the_run(status, tmp_path):
    (tmp_path / "memwatch").mkdir()
    write(tmp_path / "memwatch", EVENT)
    code, _, errors = status(tmp_path)
    assert (code, errors) == (
        2,
        [f"memwatch status: {tmp_path} holds no history.jsonl; allowed: {tmp_path / 'memwatch'}"],
    )


def test_the_number_of_probes(status, tmp_path):
    write(tmp_path, EVENT)
    assert "  and 1 more" in status(tmp_path, "--probes", 1)[1]
    assert "  and 2 more" in status(tmp_path, "--probes", 0)[1]
    code, lines, errors = status(tmp_path, "--probes", -1)
    assert (code, lines, errors) == (2, [], ["memwatch status: --probes: got -1, allowed: 0 or greater"])


def test_a_terminal_gets_colours_and_a_pipe_none(status, tmp_path):
    found = Run.read(write(tmp_path, EVENT))
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "memwatch", "status", str(tmp_path)]
    ours, theirs = os.openpty()
    try:
        subprocess.run(command, env=environment, stdout=theirs, check=True, timeout=60)
        shown = os.read(ours, 10_000).decode().replace("\r\n", "\n")
    finally:
        os.close(ours)
        os.close(theirs)
    assert shown == summary(found.last, found.about, colour=True) + "\n"
    assert "\x1b[1;31mmemorized" in shown
    assert "\n".join(status(tmp_path)[1]) == summary(found.last, found.about)
