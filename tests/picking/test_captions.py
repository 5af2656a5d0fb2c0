"""Captions that rows share, and rare ones."""

from __future__ import annotations

import math

import pytest

from memwatch.picking import captions
from memwatch.picking.captions import caption_groups, rare_captions


def test_case_and_spaces_do_not_count():
    given = ["A cat", "a  cat ", "a dog", "", "", "a CAT", "a dog", "a bird"]
    assert caption_groups(given) == [(0, 1, 5), (2, 6)]
    assert caption_groups([]) == []


def test_rare_words_make_rare_captions():
    given = ["a red cat", "a red dog", "a red cat", "a blue cat", "a quokka", "a red horse"]
    # of 5 different captions: red in 3, cat in 2, dog, blue, quokka and horse in 1; "a" counts nothing
    rarity = {
        0: math.log(5 / 3) + math.log(5 / 2),
        1: math.log(5 / 3) + math.log(5),
        3: math.log(5 / 2) + math.log(5),
        4: math.log(5),
        5: math.log(5 / 3) + math.log(5),
    }
    mean = sum(rarity.values()) / 5
    expected = sorted((row for row in rarity if rarity[row] > mean), key=lambda row: (-rarity[row], row))
    assert rare_captions(given) == expected == [3, 1, 5]


@pytest.mark.parametrize("given", [[], ["", ""], ["a cat"], ["a cat"] * 5, ["a cat", "a dog"]])
def test_where_none_is_rarer_than_another_none_is_rare(given):
    assert rare_captions(given) == []


def test_there_is_an_end_to_it(monkeypatch):
    monkeypatch.setattr(captions, "RARE", 2)
    assert len(rare_captions([*(f"a cat {i} of odd make" for i in range(5)), *["a cat"] * 20])) == 2
