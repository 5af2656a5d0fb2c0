"""The command ``memwatch scan --follow``: options, what it prints, and its exit codes."""

from __future__ import annotations

import functools
import json
import logging
import shutil

import pytest
from filelock import FileLock
from support.builders import picture
from support.followed import QUICK, Script, interrupt, nothing, save_loras, steps_in
from support.processes import new_process
from support.webhooks import serving

import memwatch.cli.scan
from memwatch.cli import main
from memwatch.scan.follow import Follow


@pytest.fixture(scope="module")
def loras(pretrained, tmp_path_factory):
    return save_loras(pretrained, tmp_path_factory.mktemp("loras"), (2, 4))


@pytest.fixture
def command(loras, pretrained, prompts, images, tmp_path, monkeypatch):
    """Runs the command on ``tmp_path/run``, into which the first ``steps`` were saved; its exit code."""
    folder = tmp_path / "run"

    def run(*arguments, happens=(), steps=(2, 4), config=QUICK, pipeline=pretrained, watched=("--images", images)):
        new_process()
        folder.mkdir(exist_ok=True)
        for step in steps:
            shutil.copy2(loras[step], folder / loras[step].name)
        script = Script(*happens)
        monkeypatch.setattr(memwatch.cli.scan, "Follow", functools.partial(Follow, clock=script))
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        given = ["--config", file, "--pretrained", pipeline] if pipeline else ["--config", file]
        return main(["scan", "--follow", *map(str, (folder, *given, *watched, *arguments))])

    return run


def test_it_ends_with_0_when_nothing_new_comes_and_by_ctrl_c(command, tmp_path, capsys):
    output = tmp_path / "run" / "memwatch"
    assert command(happens=[nothing, nothing, nothing, interrupt]) == 0
    assert steps_in(output) == [0, 2, 4]
    assert command("--idle", "1", "--poll", "30") == 0  # it goes on, although nothing is new
    assert steps_in(output) == [0, 2, 4]
    said = capsys.readouterr()
    assert f"report: {output / 'report.html'}" in said.out.splitlines()
    assert "skipped" not in said.err


def test_what_was_skipped_makes_it_1(command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run-step00000003.safetensors").write_bytes(b"nothing")
    assert command("--idle", "1") == 1
    assert "skipped: step 3, " in capsys.readouterr().err
    assert steps_in(tmp_path / "run" / "memwatch") == [0, 2, 4]


def test_without_a_checkpoint_it_is_2(command, tmp_path, capsys):
    assert command("--idle", "1", steps=()) == 2
    assert "report:" not in capsys.readouterr().out
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.usefixtures("eager")
def test_a_stop_makes_it_3_and_its_alerts_are_posted(command, tmp_path):
    with serving() as server:
        assert command("--webhook", server.url, config=QUICK) == 3
        server.wait_for(1)
    (body,) = server.bodies
    assert body["run"] == "run"
    assert {alert["verdict"] for alert in body["alerts"]} == {"memorized"}
    assert (tmp_path / "run" / "STOP").is_file()
    assert steps_in(tmp_path / "run" / "memwatch") == [0, 2]
    assert command("--keep-going", "--idle", "1", config=QUICK) == 3
    assert steps_in(tmp_path / "run" / "memwatch") == [0, 2, 4]


def test_another_live_run_keeps_it_out(command, tmp_path, capsys):
    output = tmp_path / "run" / "memwatch"
    output.mkdir(parents=True)
    with FileLock(output / "memwatch.lock"):
        assert command("--idle", "1") == 2
    assert "a folder that no other live run uses" in capsys.readouterr().err
    assert command("--idle", "1") == 0


def test_a_training_set_is_picked_from_and_what_it_flags_names_its_rows(
    command, images, tmp_path, caplog, eager, monkeypatch
):
    train = tmp_path / "train"
    train.mkdir()
    for i in range(6):
        picture(i % 5).save(train / f"{i}.png")  # the first and the last are one picture
        (train / f"{i}.txt").write_text(f"a photo of number {i}", encoding="utf-8")
    config = QUICK
    with caplog.at_level(logging.WARNING, logger="memwatch"):
        assert command(watched=("--dataset", train), config=config, steps=(2,)) == 3
    assert any("memwatch cannot take controls from it" in message for message in caplog.messages)
    flagged = (tmp_path / "run" / "memwatch" / "flagged.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line)["rows"] for line in flagged.splitlines()]
    assert len(rows) == 5  # all that are no copy of another one
    assert [0, 5] in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--poll", "0"], "--poll: got 0.0, allowed: greater than 0"),
        (["--idle", "-1"], "--idle: got -1.0, allowed: greater than 0"),
        (["--webhook", "hooks.example.com/T0"], "config key 'alerts.webhook'"),
        (["--webhook", "$MEMWATCH_TEST_UNSET"], "MEMWATCH_TEST_UNSET"),
        (["--dataset", "{folder}/none"], "none"),
        (["--baseline", "{folder}/none.safetensors"], "none.safetensors"),
        (["--pretrained", "{folder}/no-model"], "no-model: cannot be read"),
    ],
)
def test_wrong_options_are_one_clear_line_at_once(command, tmp_path, capsys, arguments, message):
    code = command(*(argument.format(folder=tmp_path) for argument in arguments))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memwatch scan: ")]
    assert (code, len(said)) == (2, 1)
    assert message in said[0]
    assert not (tmp_path / "run" / "memwatch" / "history.jsonl").exists()
