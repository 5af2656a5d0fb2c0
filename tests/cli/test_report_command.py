"""``memwatch report``: the page, verdicts for pipelines, exit codes, and going on with a run."""

from __future__ import annotations

import json

import pytest
from support.runs import memorized, write_run

import memwatch.cli.report
from memwatch.cli import main
from memwatch.cli.report import watch


def quiet(folder, **event):
    return write_run(folder, [{"name": "cat"}], [{"step": 0}, {"step": 100} | event])


def stored(folder):
    return quiet(folder, rows={"cat": memorized()})


@pytest.mark.parametrize("kind", ["html", "md", "json"])
def test_the_exit_code_tells_a_pipeline_what_was_found(kind, tmp_path, capsys):
    assert main(["report", str(quiet(tmp_path / "a")), "--format", kind]) == 0
    assert main(["report", str(stored(tmp_path / "b")), "--format", kind]) == 3
    assert capsys.readouterr().err == ""


def test_what_was_memorized_once_is_not_forgotten(tmp_path):
    events = [{"step": 0, "rows": {"cat": memorized()}}, {"step": 100}]
    folder = write_run(tmp_path, [{"name": "cat"}], events)
    assert main(["report", str(folder), "--format", "json"]) == 3


def test_the_page_goes_where_it_is_told(tmp_path, capsys):
    folder = stored(tmp_path / "run")
    main(["report", str(folder)])
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    main(["report", str(folder), "--output", str(tmp_path / "deep" / "page.html")])
    page = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert page == (folder / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "data-renew" not in page.split("<script")[0]
    assert not list(tmp_path.rglob("*.part*"))


def test_formats_for_pipelines_are_printed_or_written(tmp_path, capsys):
    folder = stored(tmp_path / "run")
    main(["report", str(folder), "--format", "json"])
    printed = capsys.readouterr().out
    assert json.loads(printed)["memorized"] == ["cat"]
    main(["report", str(folder), "--format", "json", "--output", str(tmp_path / "out.json")])
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == printed
    main(["report", str(folder), "--format", "md"])
    assert capsys.readouterr().out.startswith("# 1 of 1 probes is memorized")
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--every", "0"], "--every: got 0.0, allowed: greater than 0"),
        (["--serve", "--port", "70000"], "--port: got 70000, allowed: 0 to 65535"),
        (["--watch", "--format", "md"], "--format: got md, allowed: html with --watch and --serve"),
    ],
)
def test_wrong_options_are_named(more, said, tmp_path, capsys):
    assert main(["report", str(quiet(tmp_path)), *more]) == 2
    assert said in capsys.readouterr().err


def test_where_there_is_no_run_it_says_so(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no history.jsonl" in capsys.readouterr().err
    (tmp_path / "history.jsonl").write_text('{"st', encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no event yet" in capsys.readouterr().err


def test_a_run_of_an_older_version_can_be_read(tmp_path, capsys):
    old = {"name": "cat", "prompt": "a cat", "is_reference": True, "reason": "1.0x", "severity": 1.0, "p": None}
    old |= {"severity_low": 1.0, "since": None, "verdict": "inconclusive", "alert": False, "timesteps": [61]}
    old |= {"regions": [], "copied": None}
    line = {"step": 0, "findings": [old], "controls": {}, "audit": "no controls", "scalars": {}, "seconds": 1.0}
    (tmp_path / "history.jsonl").write_text(json.dumps(line | {"errors": 0, "stop_reason": None}), encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "kept no settings" in text
    assert "Nothing can be said yet" in text


def test_watching_writes_the_page_only_when_there_is_something_new(tmp_path, capsys):
    """Turns: nothing there; half a line; one event; the same; a second event."""
    turns = iter(
        [
            lambda: (tmp_path / "history.jsonl").write_text('{"st', encoding="utf-8"),
            lambda: quiet(tmp_path),
            lambda: None,
            lambda: stored(tmp_path),
        ]
    )

    def wait(seconds):
        assert seconds == 0.5
        try:
            next(turns)()
        except StopIteration:
            raise KeyboardInterrupt from None

    watch(tmp_path, None, 0.5, wait)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"waiting for the first event in {tmp_path}",
        *[f"report: {tmp_path / 'report.html'}"] * 2,
        "the page stays as it is",
    ]
    assert 'data-renew="0.5"' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_serving_is_asked_for_by_one_word(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(memwatch.cli.report, "serve", lambda *args: asked.append(args))
    assert main(["report", str(stored(tmp_path)), "--serve", "--port", "0", "--every", "3"]) == 0
    assert asked == [(tmp_path, 0, 3.0)]
