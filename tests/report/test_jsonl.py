"""Files of one object per line: read while they are written, mended after a full disk, and rewritten whole."""

from __future__ import annotations

import os

import pytest

from memwatch.report.jsonl import append, read_lines, rewrite


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ('{"step": 0}\n{"step": 3}\n', [0, 3]),
        ('{"step": 0}\n{"step": 3, "find', [0]),
        ('{"step": 0}\n{"st\n{"step": 6}\n', [0, 6]),
        ('[1]\n7\n{"no": 1}\n\n{"step": 6}\n', [6]),
    ],
)
def test_a_line_that_is_not_whole_is_passed_over(text, steps, tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text(text, encoding="utf-8")
    assert [row["step"] for row in read_lines(file)] == steps


def test_without_a_file_and_with_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert read_lines(file) == []
    file.write_bytes(b'{"step": 0}\n{"step": 1, "name": "\xff')
    assert read_lines(file) == [{"step": 0}]


def test_what_follows_a_line_that_was_cut_off_is_not_lost(tmp_path):
    file = tmp_path / "lines.jsonl"
    append(file, [{"step": 0}, {"step": 1}])
    file.write_bytes(file.read_bytes()[:-5])  # the disk was full
    append(file, [{"step": 2}])
    append(file, [])
    append(file, [{"step": 3}])
    assert file.read_text(encoding="utf-8") == '{"step": 0}\n{"step"\n{"step": 2}\n{"step": 3}\n'
    assert [row["step"] for row in read_lines(file)] == [0, 2, 3]


def test_a_number_that_json_does_not_know_is_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "lines.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(file, [{"step": 0}, {"step": 1, "value": float("nan")}])
    assert not file.exists()


def test_rewriting_is_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "lines.jsonl"
    append(file, [{"step": 0}, {"step": 1}])
    rewrite(file, [{"step": 0}])
    assert read_lines(file) == [{"step": 0}]

    def refuse(*args):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        rewrite(file, [])
    assert read_lines(file) == [{"step": 0}]
