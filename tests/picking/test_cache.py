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
from support.picked import photo, save_folder

import memwatch
import memwatch.picking.cache
from memwatch.picking.cache import KEPT, cache_folder, digest_of, forget_oldest, shared_survey
from memwatch.picking.rows import as_training_set

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
    real, sizes = memwatch.picking.cache.survey, []

    def survey(rows):
        sizes.append(len(rows))
        return real(rows)

    monkeypatch.setattr(memwatch.picking.cache, "survey", survey)
    return sizes


def found(survey):
    return survey.bits.tolist(), survey.groups, survey.captions, survey.strangeness.tolist(), dict(survey.unreadable)


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.json"))


def test_a_second_call_reads_what_the_first_has_found(train, cache, surveys):
    first = shared_survey(as_training_set(train))
    assert cache_folder() == cache
    assert [file.stem for file in kept(cache)] == [digest_of(as_training_set(train))]
    assert found(shared_survey(as_training_set(str(train)))) == found(first)
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


def test_no_more_than_so_many_surveys_stay(cache):
    cache.mkdir(parents=True)
    for i in range(KEPT + 5):
        for suffix in ("json", "lock"):
            (cache / f"{i}.{suffix}").write_bytes(b"")
            os.utime(cache / f"{i}.{suffix}", (i, i))
    (cache / "mine.txt").write_bytes(b"")
    forget_oldest(cache)
    assert {int(file.stem) for file in kept(cache)} == set(range(5, KEPT + 5))
    assert {int(file.stem) for file in cache.glob("*.lock")} == set(range(5, KEPT + 5))
    assert (cache / "mine.txt").exists()


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
