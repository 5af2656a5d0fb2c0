"""``memwatch status``: the newest event of a run, at any moment of its life."""

from __future__ import annotations

import pytest
from support.builders import SMALL, Loop
from support.runs import memorized, write_run

from memwatch.cli import COMMANDS, main


@pytest.fixture
def status(capsys):
    """Runs the command; its exit code and what it printed, lines on stdout and on stderr."""

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        code = main(["status", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def stored(folder, *more):
    return write_run(folder, [{"name": "cat"}, {"name": "dog"}], [{"step": 100, "rows": {"cat": memorized()}}, *more])


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


def test_an_event_that_was_lost_is_shown_beside_the_last_one_that_was_not(status, tmp_path):
    code, lines, _ = status(stored(tmp_path, {"step": 110, "failure": "out of memory", "errors": 1}))
    assert (code, lines) == (
        0,
        [
            "memwatch, step 110 of 1000: this event is lost, because out of memory",
            "  2.0 s, 1.7 % of training time, 1 failure of memwatch so far",
            "the last event that was not lost is that of step 100: 1 memorized, 1 no evidence",
        ],
    )


def test_a_folder_without_a_run_is_one_clear_line(status, tmp_path):
    code, lines, errors = status(tmp_path)
    assert (code, lines) == (2, [])
    said = "holds no history.jsonl; allowed: the output_dir of a run or of a scan, after its first event"
    assert errors == [f"memwatch status: {tmp_path} {said}"]


def test_the_number_of_probes(status, tmp_path):
    stored(tmp_path)
    dog = "1 more without evidence: a photo of dog (dog)"
    assert f"  {dog}" in status(tmp_path, "--probes", 1)[1]
    assert f"  1 more memorized: a photo of cat (cat); {dog}" in status(tmp_path, "--probes", 0)[1]
    assert status(tmp_path, "--probes", -1) == (2, [], ["memwatch status: --probes: got -1, allowed: 0 or greater"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_page(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"memwatch {name}" in capsys.readouterr().out


def test_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["scam"])
    assert stopped.value.code == 2
    assert "scan" in capsys.readouterr().err
