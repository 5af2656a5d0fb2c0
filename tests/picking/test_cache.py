"""One survey per machine: who comes later reads it, who comes at the same time waits for its file and says so."""

from __future__ import annotations

import json
import logging
import os
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


@pytest.mark.parametrize(
    "change",
    [
        lambda train: photo(9, 32).save(train / "3.png"),
        lambda train: os.utime(train / "4.png", ns=(1, 1)),  # another picture of the same size
        lambda train: (train / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "two"}', encoding="utf-8"),
        lambda train: (train / "5.png").unlink(),
        lambda train: photo(5, 32).save(train / "6.png"),
    ],
    ids=["file", "time", "caption", "fewer", "more"],
)
def test_a_folder_that_has_changed_is_another_set(train, change):
    before = digest_of(as_training_set(train))
    assert digest_of(as_training_set(train, prompt="a prompt")) != before
    change(train)
    assert digest_of(as_training_set(train)) != before


def test_other_pictures_captions_or_orders_in_memory_are_other_sets():
    rows = [(photo(i, 32), text) for i, text in enumerate(TEXTS)]
    others = [*rows[:5], (photo(9, 32), TEXTS[5])], [*rows[:5], (rows[5][0], "another")], rows[:5], rows[::-1]
    assert len({digest_of(as_training_set(some)) for some in (rows, *others)}) == 5
    assert digest_of(as_training_set(list(rows))) == digest_of(as_training_set(rows))


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
    found = survey(as_training_set(list(zip(pictures, texts, strict=True))))
    assert len(found.groups) == 2
    file = tmp_path / "deep" / "survey.json"
    write_survey(file, found)
    assert same_survey(read_survey(file), found)
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_file_that_cannot_be_read_is_none(tmp_path, caplog):
    file = tmp_path / "survey.json"
    assert read_survey(file) is None
    write_survey(file, survey(as_training_set([photo(0), photo(0)])))
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
        f"the survey cannot be kept in {cache} (no space left on device); every process makes its own"
    )


def test_a_lock_that_cannot_be_had_lets_everyone_survey(train, monkeypatch, surveys, caplog):
    def refuse(*_, **__):
        raise OSError("locks are not supported here")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert shared_survey(as_training_set(train)).size == 6
    assert "cannot be locked (locks are not supported here), so every process makes its own survey" in caplog.text


def test_a_large_set_is_told_to_survey_ahead_of_time(train, monkeypatch, caplog):
    monkeypatch.setattr(memwatch.picking.cache, "LARGE", 6)
    with caplog.at_level(logging.WARNING, "memwatch"):
        shared_survey(as_training_set(train))
        shared_survey(as_training_set(train))
    (said,) = caplog.messages
    assert "6 rows are surveyed now, once; that takes minutes. 'memwatch pick TRAIN --out WATCH'" in said


# --- several processes -----------------------------------------------------------------------------------------------


def test_while_another_process_surveys_this_one_waits_for_its_file_and_says_so(
    train, cache, monkeypatch, surveys, caplog
):
    monkeypatch.setattr(memwatch.picking.cache, "PATIENCE", 0.02)
    rows = as_training_set(train)
    cache.mkdir(parents=True)
    file = cache / f"{digest_of(rows)}.json"
    other, theirs = FileLock(file.with_suffix(".lock")), survey(rows)
    other.acquire()

    class IsDone(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            write_survey(file, theirs)
            other.release()

    handler = IsDone()
    logging.getLogger("memwatch").addHandler(handler)
    try:
        with caplog.at_level(logging.WARNING, "memwatch"):
            assert same_survey(shared_survey(rows), theirs)
    finally:
        logging.getLogger("memwatch").removeHandler(handler)
    assert surveys == []
    assert caplog.messages == ["another process surveys these 6 rows; this one waits for it, 0 s so far"]
