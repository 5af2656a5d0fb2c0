"""The store of earlier steps: bounded, on disk or in memory, and there again after a resume."""

from __future__ import annotations

import errno
import weakref

import pytest
import torch
from safetensors.torch import load_file
from support.builders import assert_same

import memwatch.measure.snapshots
from memwatch.measure.snapshots import SnapshotStore


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("keep", [1, 2])
def test_the_first_is_pinned_and_the_latest_are_kept(on_disk, keep, tmp_path):
    folder = tmp_path / "store" if on_disk else None
    store = SnapshotStore(folder, keep)
    added = []
    for step in range(0, 60, 10):
        tensors = {"w": torch.full((3,), float(step))}
        added.append(weakref.ref(tensors["w"]))
        store.add(step, tensors)
        del tensors
        expected = sorted({0, *range(0, step + 10, 10)[-keep:]})
        assert store.steps == expected
        assert all(float(store.get(s)["w"][0]) == s for s in expected)
    assert 50 in store
    assert 10 not in store
    if on_disk:
        assert sorted(file.name for file in folder.iterdir()) == [f"step_{s:07d}.safetensors" for s in store.steps]
    in_memory_still = sum(tensor() is not None for tensor in added)
    assert in_memory_still == (0 if on_disk else keep + 1)


def test_a_new_process_goes_on_with_what_is_on_disk(tmp_path):
    store = SnapshotStore(tmp_path, 3)
    for step in (0, 2, 4, 6):
        store.add(step, {"w": torch.tensor([float(step)])})
    again = SnapshotStore(tmp_path, 3)
    again.resume([0, 2, 4])  # the checkpoint knew no more
    assert again.steps == [0, 2, 4]
    assert float(again.get(4)["w"]) == 4
    again.add(6, {"w": torch.tensor([-6.0])})  # the run that went on wrote another one
    assert float(again.get(6)["w"]) == -6
    assert float(load_file(tmp_path / "step_0000006.safetensors")["w"]) == -6
    (tmp_path / "step_0000002.safetensors").unlink()
    third = SnapshotStore(tmp_path, 3)
    third.resume([0, 2, 4, 6])
    assert third.steps == [0, 4, 6]


def test_memory_alone_does_not_survive_a_new_process_and_says_so_by_its_steps():
    store = SnapshotStore(None, 2)
    store.add(0, {"w": torch.zeros(1)})
    store.resume([0])
    assert store.steps == [0]
    fresh = SnapshotStore(None, 2)
    fresh.resume([0])
    assert fresh.steps == []


def test_what_a_checkpoint_refers_to_outlasts_the_ring(tmp_path):
    store = SnapshotStore(tmp_path, keep=1)
    for step in (0, 1, 2):
        store.add(step, {"w": torch.full((2,), float(step))})
    saved = store.protect()
    assert saved == [0, 2]
    store.add(3, {"w": torch.full((2,), 3.0)})
    assert store.steps == [0, 3]
    resumed = SnapshotStore(tmp_path, keep=1)
    resumed.resume(saved)
    assert resumed.steps == saved
    assert resumed.get(2)["w"].tolist() == [2, 2]
    assert store.protect() == [0, 3]  # the next checkpoint lets go of it
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_0000000.safetensors", "step_0000003.safetensors"]


def test_a_step_taken_again_replaces_itself_and_what_came_after():
    store = SnapshotStore(None, 4)
    for step in (0, 2, 4, 2):
        store.add(step, {"w": torch.tensor([float(step)])})
    assert store.steps == [0, 2]


def test_a_process_that_does_not_write_reads_what_another_wrote(tmp_path):
    writer, reader = SnapshotStore(tmp_path, 2), SnapshotStore(tmp_path, 2, writes=False)
    for step in (0, 2, 4, 6):
        reader.add(step, {"w": torch.tensor([float(step)])})
        assert not (tmp_path / f"step_{step:07d}.safetensors").exists()
        writer.add(step, {"w": torch.tensor([float(step)])})
    assert reader.steps == writer.steps == [0, 4, 6]
    assert float(reader.get(4)["w"]) == 4
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path, 2)
    store.add(0, {"w": torch.zeros(1)})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(memwatch.measure.snapshots, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        store.add(2, {"w": torch.full((1,), 2.0)})
    assert store.steps == [0, 2]
    assert float(store.get(2)["w"]) == 2
    assert float(store.get(0)["w"]) == 0


def test_marks_lie_beside_the_tensors_and_not_among_them(tmp_path):
    store = SnapshotStore(tmp_path, 2)
    store.add(0, {"w": torch.zeros(1)}, {"cat": "run/ä", "": "x"})
    store.add(2, {"w": torch.ones(1)})
    again = SnapshotStore(tmp_path, 2)
    again.resume([0, 2])
    for read in (store, again):
        assert (read.mark(0, "cat"), read.mark(0, ""), read.mark(0, "dog"), read.mark(2, "cat")) == (
            "run/ä",
            "x",
            None,
            None,
        )
        assert set(read.get(0)) == {"w"}


def test_a_damaged_file_is_as_good_as_gone(tmp_path):
    store = SnapshotStore(tmp_path, 2)
    for step in (0, 2):
        store.add(step, {"w": torch.full((8,), float(step))}, {"cat": "m"})
    file = tmp_path / "step_0000000.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    again = SnapshotStore(tmp_path, 2)
    again.resume([0, 2])
    assert again.steps == [2]
    assert again.mark(0, "cat") is None


def test_a_process_that_does_not_write_knows_what_it_cannot_read(tmp_path):
    writer, reader = SnapshotStore(tmp_path, 2), SnapshotStore(tmp_path, 2, writes=False)
    for step in (0, 2):
        reader.add(step, {"w": torch.zeros(1)})
    writer.add(0, {"w": torch.zeros(1)})  # the disk was full at step 2
    assert (reader.has(0), reader.has(2), reader.has(4)) == (True, False, False)


def test_a_process_that_waits_lets_go_of_what_lies_on_disk(tmp_path):
    """Small things are lost on no process, also when the disk is full for the one that writes."""
    writer, reader = SnapshotStore(tmp_path, 2), SnapshotStore(tmp_path, 2, writes=False, waits=True)
    for store in (reader, writer):
        store.add(0, {"w": torch.zeros(1)})
    reader.add(2, {"w": torch.ones(1)})  # the disk was full at step 2
    assert (set(reader._held), set(writer._held)) == ({0, 2}, set())
    reader.settle()
    assert set(reader._held) == {2}
    assert (reader.has(0), reader.has(2)) == (True, True)
    for store in (reader, writer):
        store.extend(0, {"late": torch.ones(2)}, {"late": "m"})
    assert set(reader._held) == {0, 2}
    reader.settle()
    assert set(reader._held) == {2}
    assert_same(reader.read(0, ["late", "w"]), {"late": torch.ones(2), "w": torch.zeros(1)})


def test_a_process_that_waits_does_not_take_an_older_file_for_the_new_one(tmp_path, monkeypatch):
    writer, reader = SnapshotStore(tmp_path, 2), SnapshotStore(tmp_path, 2, writes=False, waits=True)
    writer.add(0, {"w": torch.zeros(1)})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(memwatch.measure.snapshots, "write_safetensors", full)
    reader.add(0, {"w": torch.ones(1)})
    with pytest.raises(OSError, match="No space"):
        writer.add(0, {"w": torch.ones(1)})
    reader.settle()
    assert float(reader.get(0)["w"]) == float(writer.get(0)["w"]) == 1
    reader.extend(0, {"late": torch.ones(1)}, {})
    reader.settle()
    assert set(reader.read(0, ["w", "late"])) == {"w", "late"}


@pytest.mark.parametrize("on_disk", [True, False])
def test_only_what_is_asked_for_is_read(on_disk, tmp_path):
    store = SnapshotStore(tmp_path if on_disk else None, 2)
    store.add(0, {name: torch.full((1000,), float(i)) for i, name in enumerate("abc")})
    found = store.read(0, ["b", "missing"])
    assert set(found) == {"b"}
    assert found["b"].untyped_storage().nbytes() == 4000  # as it is pickled for other ranks
    assert float(found["b"][0]) == 1
