"""``memwatch report``: the page, verdicts for pipelines, and exit codes."""

from __future__ import annotations

import pytest
from support.runs import memorized, write_run

from memwatch.cli import main


def quiet(folder, **event):
    return write_run(folder, [{"name": "cat"}], [{"step": 0}, {"step": 100} | event])


def stored(folder):
    return quiet(folder, rows={"cat": memorized()})


@pytest.mark.parametrize("kind", ["html", "md"])
def test_the_exit_code_tells_a_pipeline_what_was_found(kind, tmp_path, capsys):
    assert main(["report", str(quiet(tmp_path / "a")), "--format", kind]) == 0
    assert main(["report", str(stored(tmp_path / "b")), "--format", kind]) == 3
    once = write_run(tmp_path / "c", [{"name": "cat"}], [{"step": 0, "rows": {"cat": memorized()}}, {"step": 100}])
    assert main(["report", str(once), "--format", kind]) == 3
    assert capsys.readouterr().err == ""


def test_the_page_goes_where_it_is_told(tmp_path, capsys):
    folder = stored(tmp_path / "run")
    main(["report", str(folder)])
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    main(["report", str(folder), "--output", str(tmp_path / "deep" / "page.html")])
    page = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert page == (folder / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert not list(tmp_path.rglob("*.part*"))


def test_markdown_is_printed_or_written(tmp_path, capsys):
    folder = stored(tmp_path / "run")
    main(["report", str(folder), "--format", "md"])
    printed = capsys.readouterr().out
    assert printed.startswith("# 1 of 1 probes is memorized")
    main(["report", str(folder), "--format", "md", "--output", str(tmp_path / "out.md")])
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == printed
    assert not (folder / "report.html").exists()


def test_where_there_is_no_run_it_says_so(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"memwatch report: {tmp_path} holds no history.jsonl; allowed: ")
