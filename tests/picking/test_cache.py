"""One survey per machine: who comes later reads it, who comes at the same time waits for its file and says so."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from filelock import FileLock
from support.picked import photo, same_survey, save_folder, with_logo

import memwatch
import memwatch.picking.cache
from memwatch.picking.cache import KEPT, cache_folder, digest_of, read_survey, shared_survey, write_survey
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import survey

TEXTS = [f"a photo of number {i}" for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memwatch"


@pytest.fixture
def train(tmp_path) -> Path:
    pictures = {f"{i}.png": photo(i, 32) for i in range(6)}
    return save_folder(tmp_path / "train", pictures, dict(zip(pictures, TEXTS, strict=True)))


@pytest.fixture
def surveys(monkeypatch) -> list[int]:
    """The sizes of what is surveyed."""
    sizes = []
    monkeypatch.setattr(memwatch.picking.cache, "survey", lambda rows: sizes.append(len(rows)) or survey(rows))
    return sizes


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.json"))


def test_a_second_call_reads_what_the_first_has_found(train, cache, surveys):
    first = shared_survey(as_training_set(train))
    assert cache_folder() == cache
    assert [file.stem for file in kept(cache)] == [digest_of(as_training_set(train))]
    assert same_survey(shared_survey(as_training_set(str(train))), first)
    assert surveys == [6]


def test_any_kind_of_rows_is_known_again(cache, surveys):
    datasets = pytest.importorskip("datasets")  # the lowest versions are tested without it
    pictures = [photo(i, 32) for i in range(6)]
    columns = datasets.Dataset.from_dict({"image": pictures, "text": TEXTS}).cast_column("image", datasets.Image())
    for source in ([*zip(pictures, TEXTS, strict=True)], columns, columns.select([0, 1])):
        for _ in range(2):
            assert shared_survey(as_training_set(source)).size == len(source)
    assert surveys == [6, 6, 2]
    assert len(kept(cache)) == 3


def test_a_changed_file_caption_or_prompt_is_another_set(train, surveys):
    digests = [digest_of(as_training_set(train))]

    def changed(**options):
        digests.append(digest_of(as_training_set(train, **options)))

    changed(prompt="a prompt")
    photo(9, 32).save(train / "3.png")
    changed()
    os.utime(train / "4.png", ns=(1, 1))  # another picture of the same size
    changed()
    lines = (train / "metadata.jsonl").read_text(encoding="utf-8")
    (train / "metadata.jsonl").write_text(lines.replace("number 2", "number two"), encoding="utf-8")
    changed()
    (train / "5.png").unlink()
    changed()
    photo(5, 32).save(train / "6.png")
    changed()
    assert len(set(digests)) == len(digests)
    pictures = [(photo(i, 32), text) for i, text in enumerate(TEXTS)]
    in_memory = [pictures, [*pictures[:5], (photo(9, 32), TEXTS[5])], [*pictures[:5], (pictures[5][0], "another")]]
    assert len({digest_of(as_training_set(rows)) for rows in (*in_memory, pictures[:5], pictures[::-1])}) == 5
    assert digest_of(as_training_set(list(pictures))) == digest_of(as_training_set(pictures))


def test_no_more_than_so_many_surveys_stay(cache, train):
    cache.mkdir(parents=True)
    for i in range(KEPT + 4):
        for suffix in ("json", "lock"):
            (cache / f"{i}.{suffix}").write_bytes(b"")
            os.utime(cache / f"{i}.{suffix}", (i, i))
    (cache / "mine.txt").write_bytes(b"")
    rows = as_training_set(train)
    shared_survey(rows)
    expected = {digest_of(rows), *map(str, range(5, KEPT + 4))}
    assert {file.stem for file in kept(cache)} == {file.stem for file in cache.glob("*.lock")} == expected
    assert (cache / "mine.txt").exists()


def test_with_and_without_opencv_are_two_surveys(train, monkeypatch):
    digests = set()
    for is_there in (True, False):
        monkeypatch.setattr(memwatch.picking.cache, "has_opencv", lambda is_there=is_there: is_there)
        digests.add(digest_of(as_training_set(train)))
    assert len(digests) == 2


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_survey_back(tmp_path):
    pictures = [*(with_logo(photo(i)) for i in range(6)), photo(10), photo(10), {}]
    texts = ["a cat"] * 4 + [f"number {i} of a quokka" for i in range(5)]
    found = survey(as_training_set(list(zip(pictures, texts, strict=True))), progress=False)
    assert len(found.groups) == 2
    file = tmp_path / "deep" / "survey.json"
    write_survey(file, found)
    assert same_survey(read_survey(file), found)
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_file_that_cannot_be_read_is_none(tmp_path, caplog):
    file = tmp_path / "survey.json"
    assert read_survey(file) is None
    write_survey(file, survey(as_training_set([photo(0), photo(0)]), progress=False))
    saved = json.loads(file.read_text(encoding="utf-8"))
    for text in ("", "[]", "{", json.dumps(saved)[:-20], json.dumps(saved | {"survey": saved["survey"] | {"size": 3}})):
        file.write_text(text, encoding="utf-8")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "memwatch"):
            assert read_survey(file) is None
        assert "surveyed anew" in caplog.text
    file.write_text(json.dumps(saved | {"version": 0}), encoding="utf-8")
    assert read_survey(file) is None


# --- where nothing can be kept ---------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_done_without(train, tmp_path, monkeypatch, surveys, caplog):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() is None
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert [shared_survey(as_training_set(train)).size for _ in range(2)] == [6, 6]
    assert surveys == [6, 6]
    assert caplog.messages == []


def test_a_full_disk_is_said_and_costs_the_next_one_time(train, monkeypatch, surveys, caplog, cache):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(memwatch.picking.cache, "write_survey", full)
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert [shared_survey(as_training_set(train)).size for _ in range(2)] == [6, 6]
    assert surveys == [6, 6]
    assert caplog.messages[0] == (
        f"memwatch: the survey cannot be kept in {cache} (no space left on device); every process makes its own"
    )


def test_a_lock_that_cannot_be_had_lets_everyone_survey(train, monkeypatch, surveys, caplog):
    def refuse(*_, **__):
        raise OSError("locks are not supported here")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert shared_survey(as_training_set(train)).size == 6
    assert "cannot be locked (locks are not supported here), so that every process surveys for itself" in caplog.text


def test_a_large_set_is_told_to_survey_ahead_of_time(train, monkeypatch, caplog):
    monkeypatch.setattr(memwatch.picking.cache, "LARGE", 6)
    with caplog.at_level(logging.WARNING, "memwatch"):
        shared_survey(as_training_set(train))
        shared_survey(as_training_set(train))
    (said,) = caplog.messages
    assert "6 rows are surveyed now, once; that takes minutes. 'memwatch pick TRAIN --out WATCH'" in said


# --- several processes -----------------------------------------------------------------------------------------------

SURVEYS = """
import json, sys
import memwatch, memwatch.picking.cache as shared
real = shared.survey
def survey(rows):
    print("begun", flush=True)
    sys.stdin.readline()  # until it is told to go on
    return real(rows)
shared.survey = survey
picked = memwatch.pick(sys.argv[1], probes=3, controls=0)
print(json.dumps([[w.row for w in picked.watched], picked.rotation, picked.notes]))
"""
HOLDS = """
import os, sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("begun", flush=True)
    sys.stdin.readline()
    os._exit(1)  # it dies with the lock
"""


@contextmanager
def at_the_same_time(script: str, argument: Path, monkeypatch) -> Iterator[subprocess.Popen[str]]:
    """Another process that has begun, and that goes on as soon as this one says that it waits."""
    monkeypatch.setattr(memwatch.picking.cache, "PATIENCE", 0.02)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", script, str(argument)], **pipes)

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(OSError, ValueError):  # it has been told already
                other.stdin.write("go on\n")
                other.stdin.flush()

    handler = Waits()
    logging.getLogger("memwatch").addHandler(handler)
    try:
        assert other.stdout.readline() == "begun\n"
        yield other
    finally:
        logging.getLogger("memwatch").removeHandler(handler)
        other.kill()
        other.communicate()


def test_of_several_processes_one_surveys_and_the_others_wait_for_its_file(train, monkeypatch, surveys, caplog):
    with (
        at_the_same_time(SURVEYS, train, monkeypatch) as other,
        caplog.at_level(logging.WARNING, "memwatch"),
    ):
        picked = memwatch.pick(train, probes=3, controls=0)
        theirs = json.loads(other.stdout.readline())
    assert theirs == json.loads(json.dumps([[w.row for w in picked.watched], picked.rotation, picked.notes]))
    assert surveys == []
    assert caplog.messages[0] == "memwatch: another process surveys these 6 rows; this one waits for it, 0 s so far"


def test_a_process_that_dies_lets_the_next_one_in(train, cache, monkeypatch, surveys, caplog):
    cache.mkdir(parents=True)
    lock = cache / f"{digest_of(as_training_set(train))}.lock"
    with at_the_same_time(HOLDS, lock, monkeypatch), caplog.at_level(logging.WARNING, "memwatch"):
        assert shared_survey(as_training_set(train)).size == 6
    assert surveys == [6]
    assert "this one waits for it" in caplog.messages[0]
