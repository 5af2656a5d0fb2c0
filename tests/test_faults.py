"""Faults: counted, reported once, tried again; the third in a row switches a part off, or lets it rest."""

from __future__ import annotations

import logging

import pytest

from memwatch.faults import REST, Faults

PART, OTHER = "the sink 'files'", "measuring the probes"
AGAIN = PART + " failed ({}); memwatch will try again at the next event. Training goes on."
OFF = PART + " failed ({}); that was 3 times in a row, so it is switched off. Training goes on."


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "memwatch")
    return caplog


def test_the_first_failure_in_a_row_is_reported_and_the_third_switches_off(said):
    faults = Faults()
    for i in range(3):
        assert not faults.is_off(PART)
        faults.failed(PART, f"failure {i}", None)
        faults.failed(OTHER, "another", None, "what it holds is kept in memory")
        faults.worked(OTHER)  # after which counting in a row begins anew
    assert faults.is_off(PART)
    assert not faults.is_off(OTHER)
    assert faults.count == 6  # of all parts, also those that were mended
    others = [f"{OTHER} failed (another); what it holds is kept in memory. Training goes on."] * 3
    assert [m for m in said.messages if PART in m] == [AGAIN.format("failure 0"), OFF.format("failure 2")]
    assert [m for m in said.messages if OTHER in m] == others


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
        AGAIN.format(repr(OSError("disk full 0"))),
        OFF.format(repr(OSError("disk full 2"))).replace("so it is switched off", then),
        f"{PART} works again, after 4 failures in a row; what came in between is missing.",
    ]


def test_strict_raises_and_counts_once_and_the_user_may_interrupt(said):
    faults, error = Faults(strict=True), OSError("disk full")
    raises = pytest.raises(RuntimeError, match=r"memwatch: the sink 'files' failed: .*disk full")
    with raises as caught, faults.surviving(OTHER), faults.surviving(PART):
        raise error
    assert caught.value.__cause__ is error
    with pytest.raises(KeyboardInterrupt), faults.surviving(PART):
        raise KeyboardInterrupt
    assert faults.count == 1
    assert said.messages == []
