"""The store of earlier steps: bounded, on disk, and there again after a resume."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors.torch import load_file
from support.builders import assert_same

import memwatch.measure.snapshots
from memwatch.measure.snapshots import SnapshotStore


def tensors(value: float, size: int = 1) -> dict[str, torch.Tensor]:
    return {"w": torch.full((size,), float(value))}


@pytest.mark.parametrize("keep", [1, 2])
def test_the_first_and_the_latest_are_kept(keep, tmp_path):
    store = SnapshotStore(tmp_path / "store", keep)
    for step in range(0, 60, 10):
        store.add(step, tensors(step))
        assert store.steps == sorted({0, *range(0, step + 10, 10)[-keep:]})
    assert all(float(store.get(s)["w"][0]) == s for s in store.steps)
    names = [f"step_{s:07d}.safetensors" for s in store.steps]
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == names


def test_a_new_process_goes_on_with_what_is_on_disk(tmp_path):
    store = SnapshotStore(tmp_path, 3)
    for step in (0, 2, 4, 6):
        store.add(step, tensors(step))
    again = SnapshotStore(tmp_path, 3)
    again.resume([0, 2, 4])  # the checkpoint knew no more
    assert again.steps == [0, 2, 4]
    assert float(again.get(4)["w"]) == 4
    again.add(6, tensors(-6))  # the run that went on wrote another one
    assert float(load_file(tmp_path / "step_0000006.safetensors")["w"]) == float(again.get(6)["w"]) == -6
    again.add(2, tensors(-2))  # a step taken again replaces itself and what came after
    assert again.steps == [0, 2]
    (tmp_path / "step_0000002.safetensors").write_bytes(b"damaged")
    third = SnapshotStore(tmp_path, 3)
    third.resume([0, 2, 4, 8])
    assert third.steps == [0, 4]
    assert third.mark(2, "w") is None


def test_what_a_checkpoint_refers_to_outlasts_newer_steps(tmp_path):
    store = SnapshotStore(tmp_path, keep=1)
    for step in (0, 1, 2):
        store.add(step, tensors(step))
    saved = store.protect()
    assert saved == [0, 2]
    store.add(3, tensors(3))
    assert store.steps == [0, 3]
    assert float(store.get(2)["w"]) == 2
    assert store.protect() == [0, 3]  # the next checkpoint lets go of it
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_0000000.safetensors", "step_0000003.safetensors"]


def test_a_process_that_does_not_write_reads_what_another_wrote(tmp_path):
    writer, reader = SnapshotStore(tmp_path, 2), SnapshotStore(tmp_path, 2, writes=False)
    for step in (0, 2, 4, 6):
        reader.add(step, tensors(step))
        assert not reader.has(step)  # nor when the disk is full for the other one
        writer.add(step, tensors(step))
    assert reader.steps == writer.steps == [0, 4, 6]
    assert float(reader.get(4)["w"]) == 4
    for store in (reader, writer):
        store.extend(0, {"late": torch.ones(2)}, {"late": "m"})
        assert store.mark(0, "late") == "m"
    assert_same(reader.read(0, ["late", "w"]), {"late": torch.ones(2)} | tensors(0))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_loses_nothing_on_the_process_that_writes(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = SnapshotStore(tmp_path, 2)
    store.add(0, tensors(0))
    monkeypatch.setattr(memwatch.measure.snapshots, "write_safetensors", full)
    for step in (2, 0):  # a step taken again does not leave the older file in its place
        with pytest.raises(OSError, match="No space"):
            store.add(step, tensors(step + 1))
        assert float(store.get(step)["w"]) == step + 1
        assert float(store.read(step, ["w", "missing"])["w"]) == step + 1
    with pytest.raises(OSError, match="No space"):
        store.extend(0, {"late": torch.ones(1)}, {})
    store.resume([0])
    assert store.steps == [0]
    assert set(store.get(0)) == {"w", "late"}


def test_marks_lie_beside_the_tensors_and_only_what_is_asked_for_is_read(tmp_path):
    store, again = SnapshotStore(tmp_path, 2), SnapshotStore(tmp_path, 2)
    store.add(0, {name: torch.full((1000,), float(i)) for i, name in enumerate("abc")}, {"cat": "run/ä", "": "x"})
    again.resume([0])
    for read in (store, again):
        assert [read.mark(0, name) for name in ("cat", "", "dog")] == ["run/ä", "x", None]
        assert set(read.get(0)) == set("abc")
    found = store.read(0, ["b", "missing"])
    assert set(found) == {"b"}
    assert found["b"].untyped_storage().nbytes() == 4000  # as it is pickled for other ranks
