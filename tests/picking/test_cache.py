"""One survey per machine: who comes later reads it, who comes at the same time waits for its file and says so."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from filelock import FileLock
from support.picked import hugging_face, photo, same_survey, save_folder, with_logo

from memwatch.picking import cache as module
from memwatch.picking.cache import KEPT, cache_folder, digest_of, read_survey, shared_survey, write_survey
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import survey

PHOTOS = [photo(i, 32) for i in range(6)]
TEXTS = [f"a photo of number {i}" for i in range(6)]
ROWS = [*zip(PHOTOS, TEXTS, strict=True)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memwatch"


@pytest.fixture
def train(tmp_path) -> Path:
    pictures = {f"{i}.png": picture for i, picture in enumerate(PHOTOS)}
    return save_folder(tmp_path / "train", pictures, dict(zip(pictures, TEXTS, strict=True)))


@pytest.fixture
def surveys(monkeypatch) -> list[int]:
    """The sizes of what is surveyed."""
    sizes = []
    monkeypatch.setattr(module, "survey", lambda rows: sizes.append(len(rows)) or survey(rows))
    return sizes


@pytest.fixture
def said(caplog):
    """What is logged by memwatch."""
    caplog.set_level(logging.WARNING, "memwatch")
    return caplog


@pytest.mark.parametrize("kind", ["folder", "list", "hugging face", "selection"])
def test_a_second_call_reads_what_the_first_has_found(kind, train, cache, surveys):
    source = {"folder": train, "list": ROWS}.get(kind) or hugging_face(image=PHOTOS, text=TEXTS)
    source = source.select([0, 1]) if kind == "selection" else source
    first, second = (shared_survey(as_training_set(source)) for _ in range(2))
    assert same_survey(first, second)
    assert surveys == [2 if kind == "selection" else 6]
    assert cache_folder() == cache
    assert [file.stem for file in cache.glob("*.json")] == [digest_of(as_training_set(source))]


def test_a_folder_that_has_changed_is_another_set(train):
    digests = {digest_of(as_training_set(train)), digest_of(as_training_set(train, prompt="a prompt"))}
    lines = [json.dumps({"file_name": f"{i}.png", "text": "another"}) for i in range(7)]
    for number, change in enumerate(
        [
            lambda: photo(9, 32).save(train / "3.png"),
            lambda: os.utime(train / "4.png", ns=(1, 1)),  # another picture of the same size
            lambda: (train / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8"),
            lambda: (train / "5.png").unlink(),
            lambda: photo(5, 32).save(train / "6.png"),
        ]
    ):
        change()
        digests.add(digest_of(as_training_set(train)))
        assert len(digests) == 3 + number


def test_other_pictures_captions_or_orders_in_memory_are_other_sets(monkeypatch):
    others = [*ROWS[:5], (photo(9, 32), TEXTS[5])], [*ROWS[:5], (PHOTOS[5], "another")], ROWS[:5], ROWS[::-1]
    digests = {digest_of(as_training_set(some)) for some in (ROWS, list(ROWS), *others)}
    assert len(digests) == 5
    is_there = module.has_opencv()
    monkeypatch.setattr(module, "has_opencv", lambda: not is_there)  # which finds more parts
    assert digest_of(as_training_set(ROWS)) not in digests


def test_no_more_than_so_many_surveys_stay(cache, train):
    cache.mkdir(parents=True)
    for i in range(KEPT + 4):
        for suffix in ("json", "lock"):
            (cache / f"{i}.{suffix}").write_bytes(b"")
            os.utime(cache / f"{i}.{suffix}", (i, i))
    rows = as_training_set(train)
    shared_survey(rows)
    expected = {digest_of(rows), *map(str, range(5, KEPT + 4))}
    for suffix in ("json", "lock"):
        assert {file.stem for file in cache.glob(f"*.{suffix}")} == expected


def test_a_file_gives_the_survey_back(tmp_path):
    pictures = [*(with_logo(photo(i)) for i in range(6)), photo(10), photo(10), {}]
    texts = ["a cat"] * 4 + [f"number {i} of a quokka" for i in range(5)]
    found = survey(as_training_set(list(zip(pictures, texts, strict=True))))
    assert len(found.groups) == 2
    file = tmp_path / "deep" / "survey.json"
    write_survey(file, found)
    assert same_survey(read_survey(file), found)
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_file_that_cannot_be_read_is_none(tmp_path, said):
    file = tmp_path / "survey.json"
    assert read_survey(file) is None
    write_survey(file, survey(as_training_set([photo(0), photo(0)])))
    saved = json.loads(file.read_text(encoding="utf-8"))
    for text in ("", "[]", json.dumps(saved)[:-20], json.dumps(saved | {"survey": saved["survey"] | {"size": 3}})):
        file.write_text(text, encoding="utf-8")
        said.clear()
        assert read_survey(file) is None
        assert "surveyed anew" in said.text
    file.write_text(json.dumps(saved | {"version": 0}), encoding="utf-8")
    assert read_survey(file) is None


def refuse(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("why", "expected"),
    [
        ("no folder", ""),
        ("full disk", "/cache/memwatch (no space left on device); every process makes its own"),
        ("no lock", ".lock cannot be locked (no space left on device), so every process makes its own survey"),
    ],
)
def test_where_nothing_can_be_kept_every_process_surveys(why, expected, train, tmp_path, monkeypatch, surveys, said):
    if why == "no folder":
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif why == "full disk":
        monkeypatch.setattr(module, "write_survey", refuse)
    else:
        monkeypatch.setattr(FileLock, "acquire", refuse)
    assert shared_survey(as_training_set(train)).size == 6
    assert surveys == [6]
    assert expected in said.text
    assert len(said.messages) == bool(expected)


def test_while_another_process_surveys_this_one_waits_for_its_file_and_says_so(train, cache, monkeypatch, surveys):
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    rows = as_training_set(train)
    cache.mkdir(parents=True)
    file = cache / f"{digest_of(rows)}.json"
    other, theirs, said = FileLock(file.with_suffix(".lock")), survey(rows), []
    other.acquire()

    def is_done(text, *values):
        said.append(text % values)
        write_survey(file, theirs)
        other.release()

    monkeypatch.setattr(module.logger, "warning", is_done)
    assert same_survey(shared_survey(rows), theirs)
    assert surveys == []
    assert said == ["another process surveys these 6 rows; this one waits for it"]
