"""A run by another rule: the same items, the same calls, and only ``copied`` asks the rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evidence.old.by_rule import ByRule, by_rule
from evidence.old.descriptor import Rule, read_descriptor
from evidence.runs.finished import finished_runs
from evidence.verdicts.stored import State, is_fixed, state_of, stored_items
from evidence.verdicts.tables import recall
from evidence.worlds.items import Kind
from evidence.worlds.sets import STRONG
from support.planted import is_stored

from memwatch.denoiser import Components


@pytest.fixture(scope="module")
def run(runs) -> ByRule:
    """Its generations did not go through an autoencoder."""
    return ByRule(next(finished_runs(runs)).home, read_descriptor(None), None)


def test_what_is_stored_is_asked_of_the_rule(run):
    first = next(item for item in run.watched if is_stored(item) and item.dose == STRONG)
    assert state_of(run, first) is State.STORED
    nothing = replace(run, rule=Rule("", lambda target, pictures, mask: np.zeros(len(pictures)), 0.5))
    assert all(state_of(nothing, item) is State.NEVER for item in run.watched)
    everything = replace(run, rule=Rule("", lambda target, pictures, mask: np.arange(1.0, len(pictures) + 1), -1.0))
    everything._chance.update({(i.name, i.mask.tobytes()): -2.0 for i in run.items})
    stored = {item.name for item in run.watched if state_of(everything, item) is State.STORED}
    assert stored == {item.name for item in run.watched if is_fixed(item)}


def test_what_was_never_shown_or_has_nothing_fixed_is_not_copied(run):
    held_out = run.of_kind(Kind.HELD_OUT)[0]
    assert run.copied(held_out, run.last) == 0
    assert all(run.copied(item, run.last) == 0 for item in run.watched if not item.mask.any())
    assert all(run.copied(item, run.steps[0]) == 0 for item in run.watched)  # nothing was generated


def test_chance_is_what_was_never_shown(run):
    items = {item.name: item for item in run.items}
    numbered = replace(run)
    numbered.__dict__["_targets"] = {name: np.full((1, 1, 3), i, dtype=np.uint8) for i, name in enumerate(items)}
    held_out = run.of_kind(Kind.HELD_OUT)[0]
    shown = [list(items)[i] for i in numbered.never_shown(held_out)[:, 0, 0, 0]]
    assert held_out.name not in shown
    assert {items[name].dose for name in shown} == {0}
    assert {items[name].kind for name in shown} == {Kind.HELD_OUT, Kind.CONTROL}


def test_both_rules_find_the_same_stored_in_pictures_that_are_plain_copies(products):
    again = by_rule([p.run for p in products], read_descriptor(None), lambda base: Components(None))
    by_patches = [replace(product, run=run) for product, run in zip(products, again, strict=True)]
    for old, new in zip(products, by_patches, strict=True):
        assert (new.first_alert, new.stop, new.run.name) == (old.first_alert, old.stop, old.run.name)
        assert [i.name for i in stored_items(new.run)] == [i.name for i in stored_items(old.run)]
    assert str(recall(by_patches)) == str(recall(products))
