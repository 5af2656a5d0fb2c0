"""The second rule calls copies what is one, whatever its exposure, and nothing else; both rules are counted right."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evidence.old.agreement import (
    Compared,
    agreement_row,
    agreement_table,
    called_table,
    compare_run,
    disagreements,
    second_states,
)
from evidence.old.by_rule import ByRule
from evidence.old.descriptor import SIDE, Rule, cropped, read_descriptor
from evidence.runs.finished import finished_runs
from evidence.verdicts.stored import is_fixed
from evidence.worlds.items import Kind
from evidence.worlds.sets import STRONG
from evidence.worlds.shapes import ellipse, rectangle
from support.planted import is_stored
from support.textures import textures

WHOLE = np.ones((64, 64), dtype=bool)
DISC = ellipse(30, 25, 11, 9)


@pytest.fixture(scope="module")
def compared(runs) -> list[Compared]:
    """The made-up runs by patches; their generations did not go through an autoencoder."""
    return [compare_run(ByRule(run.home, read_descriptor(None), None)) for run in finished_runs(runs)]


# --- the rule --------------------------------------------------------------------------------------------------------


def test_a_copy_is_similar_enough_and_more_similar_than_chance():
    def brightness(target: np.ndarray, pictures: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return pictures[:, 0, 0, 0] / 100

    def at(*values: int) -> np.ndarray:
        return np.stack([np.full((64, 64, 3), value, dtype=np.uint8) for value in values])

    def copied(pictures: np.ndarray, others: np.ndarray) -> list[bool]:
        found: list[bool] = rule.copies(target, pictures, WHOLE, rule.chance(target, others, WHOLE)).tolist()
        return found

    rule, target = Rule("", brightness, 0.5), textures(1)[0]
    assert copied(at(40, 50, 90), at(10, 20)) == [False, True, True]
    assert copied(at(40, 50, 90), at(10, 70)) == [False, False, True]
    assert copied(at(70, 90), at(90)) == [False, False]
    assert copied(at(40, 50), np.zeros((0, 64, 64, 3), np.uint8)) == [False, True]


def test_nothing_copies_what_is_flat():
    flat = np.full((64, 64, 3), 90, dtype=np.uint8)
    alike = Rule("", lambda target, pictures, mask: np.linspace(1, 0.9, len(pictures)), 0.5)
    assert not alike.copies(flat, flat[None], WHOLE, alike.chance(flat, textures(1), WHOLE)).any()
    assert alike.chance(textures(1)[0], flat[None], WHOLE) == 1


def test_crops_show_the_mask_alone():
    target, other = textures(2)
    assert np.array_equal(*cropped(np.stack([target, np.where(DISC[..., None], target, other)]), DISC))
    assert cropped(target[None], DISC).shape == (1, SIDE, SIDE, 3)
    corner = rectangle(0, 0, 8, 8)
    assert np.abs(cropped(np.full((1, 64, 64, 3), 7, np.uint8), corner).astype(int) - 7).max() == 0


def message(number: int, value: bytes | int) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return bytes([number << 3, value]) if number < 16 else bytes([number << 3 & 127 | 128, number >> 4, value])
    return bytes([number << 3 | 2, len(value) & 127 | 128, len(value) >> 7]) + value


def onnx_file(file: Path) -> Path:
    """A descriptor as ONNX: uint8 pictures as floats, flattened and normalized."""

    def node(op: bytes, before: bytes, after: bytes, attribute: bytes = b"") -> bytes:
        return message(1, message(1, before) + message(2, after) + message(4, op) + attribute)

    def value(name: bytes, kind: int, sides: int) -> bytes:
        shape = b"".join(message(1, message(2, b"side%d" % i)) for i in range(sides))
        return message(1, name) + message(2, message(1, message(1, kind) + message(2, shape)))

    to_float = message(5, message(1, b"to") + message(3, 1) + message(20, 2))
    nodes = node(b"Cast", b"image", b"floats", to_float) + node(b"Flatten", b"floats", b"flat")
    nodes += node(b"LpNormalization", b"flat", b"embedding")
    graph = nodes + message(2, b"g") + message(11, value(b"image", 2, 4)) + message(12, value(b"embedding", 1, 2))
    file.write_bytes(message(1, 8) + message(7, graph) + message(8, message(1, b"") + message(2, 13)))
    return file


def test_a_model_file_compares_inside_the_mask(tmp_path):
    pytest.importorskip("onnxruntime")
    rule = read_descriptor(onnx_file(tmp_path / "sscd.onnx"))
    target, other, *rest = textures(6)
    made = np.stack([target, np.where(DISC[..., None], target, other), other])
    found = rule.similarity(target, made, DISC)
    assert found[:2] == pytest.approx(1, abs=1e-4)
    assert found[2] < 0.99
    assert rule.similarity(target, made, DISC) == pytest.approx(found)  # from what it remembers
    chance = rule.chance(target, np.stack([other, *rest]), DISC)
    assert rule.copies(target, made, DISC, chance).tolist() == [True, True, False]
    assert "sscd.onnx" in rule.says


def test_files_that_are_no_model_are_named(tmp_path):
    pytest.importorskip("onnxruntime")
    file = tmp_path / "sscd.onnx"
    with pytest.raises(ValueError, match="--sscd .*sscd.onnx: not a readable"):
        read_descriptor(file)
    file.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="--sscd .*sscd.onnx: not a readable"):
        read_descriptor(file)


def test_without_onnxruntime_the_message_says_what_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"sscd.onnx: needs onnxruntime; pip install"):
        read_descriptor(tmp_path / "sscd.onnx")


# --- agreement -------------------------------------------------------------------------------------------------------


def test_stored_by_the_second_rule_is_what_the_runs_copy(compared):
    for c in compared:
        fixed = [item for item in c.run.watched if is_fixed(item)]
        copied = {item.name for item in fixed if is_stored(item) and item.dose == STRONG}
        states = second_states(c)
        assert set(states) == {item.name for item in fixed}
        assert {name for name, stored in states.items() if stored} == copied
        assert len(c.false_copies) == 4 * len(c.run.of_kind(Kind.HELD_OUT))
        assert not c.false_copies.any()


def test_a_table_where_both_agree(compared):
    (world, total) = agreement_table(compared)
    assert (world["world"], total["world"]) == ("captions", "all")
    assert {key: value for key, value in world.items() if key != "world"} == {
        key: value for key, value in total.items() if key != "world"
    }
    assert world["by the region rule alone"] == world["by the second rule alone"] == 0
    assert world["stored by both"] + world["by neither"] == world["items"] == sum(len(c.opinions) for c in compared)
    assert world["share that agrees"] == world["share of them by both"] == 1
    assert world["share that the second rule calls copies"] == 0
    assert disagreements(compared) == []


def test_a_table_where_they_do_not(compared):
    """Of the first run, the second rule misses one item wholly and one by a quarter, and sees one too many."""
    first = compared[0]
    stored = [o for o in first.opinions if o.is_stored(o.first)]
    never = [o for o in first.opinions if not o.is_stored(o.first)]
    changed = {
        stored[0].item.name: np.array([False] * 4),
        stored[1].item.name: np.array([True, True, True, False]),
        never[0].item.name: np.array([True, True, False, False]),
    }
    opinions = [replace(o, second=changed.get(o.item.name, o.second)) for o in first.opinions]
    other = Compared(first.run, opinions, np.array([True, False, False, False]))
    row = agreement_row("captions", [other])
    assert (row["by the region rule alone"], row["by the second rule alone"]) == (1, 1)
    assert (row["stored by both"], row["by neither"]) == (len(stored) - 1, len(never) - 1)
    assert row["copies by either rule"] == 4 * len(stored) + 2
    assert row["share of them by both"] == pytest.approx((4 * len(stored) - 5) / (4 * len(stored) + 2))
    assert row["share that agrees"] == pytest.approx(1 - 7 / row["generations"])
    assert row["share that the second rule calls copies"] == 0.25
    lines = disagreements([other])
    assert len(lines) == 2
    assert any(
        line.startswith(f"captions-0 {stored[0].item.name} (") and "with 4 copies of 4" in line for line in lines
    )
    assert any("not stored by the region rule with 0 copies of 4 (median ratio 0.90), stored" in line for line in lines)


def test_half_of_its_share_of_a_caption_is_enough(compared):
    opinion = replace(compared[0].opinions[0], share=0.25)
    assert opinion.is_stored(np.array([True] + [False] * 7))
    assert not opinion.is_stored(np.array([True] + [False] * 8))


def test_what_was_called_by_each_definition(compared, products):
    rows = {row["stored by"]: row for row in called_table(compared, products)}
    strong = [i for p in products for i in p.run.watched if is_stored(i) and i.dose == STRONG]
    called = sum(p.called(i) for p in products for i in p.run.watched if i in strong)
    assert rows["the region rule"]["items"] == len(strong)
    assert rows["the region rule"]["recall"] == pytest.approx(called / len(strong))
    assert rows["the region rule"]["called, not stored"] > 0  # what is on its way
    assert rows["both"]["items"] <= min(rows[name]["items"] for name in ("the region rule", "the second rule"))
    assert rows["either"]["items"] >= max(rows[name]["items"] for name in ("the region rule", "the second rule"))
    assert rows["either"]["precision"] >= rows["both"]["precision"]


def test_no_runs_no_numbers():
    row = agreement_row("all", [])
    assert row["items"] == 0
    assert row["share that agrees"] is row["share that the second rule calls copies"] is None
