"""Faults: counted, said once, tried again; the third in a row switches a part off, or lets it rest."""

from __future__ import annotations

import json
import logging

import pytest

from memwatch.faults import LIMIT, REST, Faults

AGAIN = "memwatch: the sink 'files' failed ({what}); memwatch will try again at the next event. Training goes on."
OFF = "memwatch: the sink 'files' failed ({what}); that was 3 times in a row, so it is switched off. Training goes on."
PART = "the sink 'files'"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "memwatch")
    return caplog


def test_a_failure_is_counted_and_said_once(said):
    faults = Faults()
    assert faults.count == 0
    faults.failed(PART, "disk full", None)
    faults.failed(PART, "disk still full", None)
    assert faults.count == 2
    assert said.messages == [AGAIN.format(what="disk full")]
    assert not faults.is_off(PART)


def test_the_third_in_a_row_switches_off_and_says_so(said):
    faults = Faults()
    assert LIMIT == 3
    for i in range(3):
        assert not faults.is_off(PART)
        faults.failed(PART, f"failure {i}", None)
    assert faults.is_off(PART)
    assert said.messages == [AGAIN.format(what="failure 0"), OFF.format(what="failure 2")]


def test_after_it_worked_counting_in_a_row_begins_anew(said):
    faults = Faults()
    for _ in range(4):
        faults.failed(PART, "a", None)
        faults.failed(PART, "b", None)
        faults.worked(PART)
        assert not faults.is_off(PART)
    assert faults.count == 8  # of all failures, also those that were mended
    assert said.messages == [AGAIN.format(what="a")] * 4  # a new series is news


def test_parts_are_counted_apart(said):
    faults = Faults()
    for _ in range(3):
        faults.failed(PART, "a", None)
    faults.failed("looking at the model", "b", None)
    assert faults.is_off(PART)
    assert not faults.is_off("looking at the model")
    faults.worked("looking at the model")
    assert faults.is_off(PART)


def test_a_part_that_rests_is_tried_at_every_tenth_event_and_says_when_it_works(said):
    faults, tried = Faults(), []
    for at in range(40):
        if faults.is_resting(PART):
            continue
        tried.append(at)
        with faults.surviving(PART, missing="what came in between is missing"):
            if at < 20:
                raise OSError(f"disk full {at}")
    assert tried == [0, 1, 2, 2 + REST, 2 + 2 * REST, *range(3 + 2 * REST, 40)]
    assert faults.count == 4
    assert not faults.is_off(PART)
    then = "so it is tried at every 10th event from now on"
    assert said.messages == [
        AGAIN.format(what=repr(OSError("disk full 0"))),
        OFF.format(what=repr(OSError("disk full 2"))).replace("so it is switched off", then),
        f"memwatch: {PART} works again, after 4 failures in a row; what came in between is missing.",
    ]


def test_what_memwatch_does_instead_is_said(said):
    Faults().failed("writing the ledger", "disk full", None, "what it holds is kept in memory")
    message = "memwatch: writing the ledger failed (disk full); what it holds is kept in memory. Training goes on."
    assert said.messages == [message]


def test_strict_raises_and_counts(said):
    faults, error = Faults(strict=True), OSError("disk full")
    with pytest.raises(RuntimeError, match=r"memwatch: the sink 'files' failed: disk full") as caught:
        faults.failed(PART, "disk full", error)
    assert caught.value.__cause__ is error
    assert faults.count == 1
    assert said.messages == []


def test_surviving_a_block_that_fails_and_one_that_works(said):
    faults, done = Faults(), []
    for i in range(5):
        with faults.surviving(PART):
            done.append(i)
            if i != 2:
                raise OSError(f"disk full {i}")
    assert done == [0, 1, 2, 3, 4]
    assert faults.count == 4
    assert not faults.is_off(PART)  # 2 in a row, one that worked, 2 in a row
    assert said.messages == [AGAIN.format(what=repr(OSError(f"disk full {i}"))) for i in (0, 3)]


def test_surviving_lets_the_user_interrupt():
    faults = Faults()
    with pytest.raises(KeyboardInterrupt), faults.surviving(PART):
        raise KeyboardInterrupt
    assert faults.count == 0


def test_surviving_raises_when_strict():
    with pytest.raises(RuntimeError, match="files' failed.*disk full"), Faults(strict=True).surviving(PART):
        raise OSError("disk full")


def test_counts_survive_a_checkpoint():
    faults, again = Faults(), Faults()
    for part in (PART, PART, PART, "looking at the model"):
        faults.failed(part, "a", None)
    saved = json.loads(json.dumps(faults.state_dict()))
    again.load_state_dict(saved)
    assert again.count == 4
    assert again.is_off(PART)
    for _ in range(2):
        assert not again.is_off("looking at the model")
        again.failed("looking at the model", "a", None)
    assert again.is_off("looking at the model")
    faults.worked(PART)
    assert saved["in_a_row"][PART] == 3  # a copy


def test_a_strict_failure_within_another_part_is_counted_once():
    faults = Faults(strict=True)
    with pytest.raises(RuntimeError, match="inner failed"), faults.surviving("outer"), faults.surviving("inner"):
        raise OSError("disk full")
    assert faults.count == 1
