"""Weights swapped in and out exactly, and the bounded store of earlier steps."""

from __future__ import annotations

import errno

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from support.builders import TOKENS, Loop, assert_same

import memwatch.measure.snapshots
from memwatch.measure.curvature import CurvatureMap, diag_jacobian
from memwatch.measure.curvature import test_vectors as vectors_of
from memwatch.measure.signals import Measurement
from memwatch.measure.snapshots import (
    SnapshotStore,
    from_ledger,
    swapped,
    to_ledger,
    trainable,
    without_lora,
    write_safetensors,
)

KINDS = [{}, {"lora": True}, {"checkpointing": True}, {"lora": True, "checkpointing": True}]


def other_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in trainable(model).items()
    }


def products(unet) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and diagonal Jacobian products at a fixed input."""
    generator = torch.Generator().manual_seed(8)
    x, hidden = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, TOKENS, 16, generator=generator)
    vectors = torch.stack([vectors_of(4, (4, 8, 8), generator, tile=4) for _ in range(2)], dim=1)
    training = unet.training
    unet.eval()
    result = unet(x, 100, hidden).sample.detach(), diag_jacobian(lambda x: unet(x, 100, hidden).sample, x, vectors)
    unet.train(training)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_is_the_other_model_inside_and_exactly_the_first_outside(kind, pretrained):
    loop = Loop(pretrained, **kind)
    loop.run(None, 2)
    values = other_values(loop.bare)
    untouched = {name: value.clone() for name, value in values.items()}

    reference = Loop(pretrained, **kind).bare  # a model loaded with these weights
    reference.load_state_dict({**loop.bare.state_dict(), **values})
    expected = products(reference)
    own = products(loop.bare)
    before, identities = loop.state(), loop.identities()
    with swapped(loop.bare, values):
        assert_same(products(loop.bare), expected)
    assert not torch.equal(own[1], expected[1])
    assert_same(products(loop.bare), own)
    assert_same(loop.state(), before)
    assert loop.identities() == identities
    assert_same(values, untouched)


def test_swapping_back_survives_an_error_and_nests(pretrained):
    unet = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet")
    before, pointers = trainable(unet), [p.data_ptr() for p in unet.parameters()]
    one, two = other_values(unet), {name: 2 * value for name, value in before.items()}

    def swap_and_fail():
        with swapped(unet, one), swapped(unet, two):
            assert_same(trainable(unet), two)
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        swap_and_fail()
    assert_same(trainable(unet), before)
    assert pointers == [p.data_ptr() for p in unet.parameters()]


def test_swapped_values_take_the_dtype_of_the_model():
    layer = torch.nn.Linear(2, 2).to(torch.bfloat16)
    with swapped(layer, {"weight": torch.ones(2, 2)}):
        assert layer.weight.dtype is torch.bfloat16
        assert layer.weight.sum() == 4


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"no.such.name": torch.zeros(2)}, r"no\.such\.name.*no such parameter"),
        ({"bias": torch.zeros(2), "weight": torch.zeros(3, 3)}, r"weight has shape \(3, 3\), the model \(2, 2\)"),
    ],
)
def test_a_snapshot_of_another_model_is_refused_and_nothing_changes(tensors, message):
    layer = torch.nn.Linear(2, 2)
    before = trainable(layer)
    with pytest.raises(ValueError, match=message), swapped(layer, tensors):
        pass
    assert_same(trainable(layer), before)


def test_trainable_is_a_copy_and_small_for_lora(pretrained):
    loop = Loop(pretrained, lora=True, lr=0.1)
    copies = trainable(loop.bare)
    assert copies
    assert all("lora_" in name for name in copies)
    loop.run(None, 1)
    assert not torch.equal(
        copies["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.default.weight"],
        loop.bare.get_parameter("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.default.weight"),
    )


def test_without_lora_is_the_base_model(pretrained):
    base = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet")
    loop = Loop(pretrained, lora=True, lr=0.1)
    loop.run(None, 2)
    with swapped(loop.bare, without_lora(loop.bare)):
        torch.testing.assert_close(products(loop.bare), products(base))
    assert not torch.allclose(products(loop.bare)[0], products(base)[0])
    assert without_lora(base) == {}


# --- the store --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_disk", "in_memory"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("keep", [1, 2])
def test_the_first_is_pinned_and_the_latest_are_kept(on_disk, in_memory, keep, tmp_path):
    folder = tmp_path / "store" if on_disk else None
    store = SnapshotStore(folder, keep, in_memory=in_memory)
    for step in range(0, 60, 10):
        store.add(step, {"w": torch.full((3,), float(step))})
        expected = sorted({0, *range(0, step + 10, 10)[-keep:]})
        assert store.steps == expected
        assert all(float(store.get(s)["w"][0]) == s for s in expected)
    assert 50 in store
    assert 10 not in store
    if on_disk:
        assert sorted(file.name for file in folder.iterdir()) == [f"step_{s:07d}.safetensors" for s in store.steps]
    assert len(store._held) == (0 if on_disk and not in_memory else keep + 1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_new_process_goes_on_with_what_is_on_disk(in_memory, tmp_path):
    store = SnapshotStore(tmp_path, 3, in_memory=in_memory)
    for step in (0, 2, 4, 6):
        store.add(step, {"w": torch.tensor([float(step)])})
    again = SnapshotStore(tmp_path, 3, in_memory=in_memory)
    again.resume([0, 2, 4])  # the checkpoint knew no more
    assert again.steps == [0, 2, 4]
    assert float(again.get(4)["w"]) == 4
    again.add(6, {"w": torch.tensor([-6.0])})  # the run that went on wrote another one
    assert float(again.get(6)["w"]) == -6
    assert float(load_file(tmp_path / "step_0000006.safetensors")["w"]) == -6
    (tmp_path / "step_0000002.safetensors").unlink()
    third = SnapshotStore(tmp_path, 3, in_memory=in_memory)
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


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_full_disk_loses_nothing(in_memory, tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path, 2, in_memory=in_memory)
    store.add(0, {"w": torch.zeros(1)})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(memwatch.measure.snapshots, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        store.add(2, {"w": torch.full((1,), 2.0)})
    assert store.steps == [0, 2]
    assert float(store.get(2)["w"]) == 2
    assert float(store.get(0)["w"]) == 0


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    path = tmp_path / "deep" / "file.safetensors"
    write_safetensors(path, {"w": torch.arange(6.0).reshape(2, 3).T})
    assert torch.equal(load_file(path)["w"], torch.arange(6.0).reshape(2, 3).T)

    def broken(tensors, part):
        part.write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(memwatch.measure.snapshots, "save_file", broken)
    with pytest.raises(OSError, match=r"cannot write .*file\.safetensors.*No space"):
        write_safetensors(path, {"w": torch.zeros(1)})
    assert [file.name for file in path.parent.iterdir()] == ["file.safetensors"]
    assert load_file(path)["w"].shape == (3, 2)


def test_the_ledger_gives_back_what_was_measured():
    one = Measurement(CurvatureMap(torch.rand(2, 4, 8, 8)), torch.rand(2, 2, 4, 8, 8))
    two = Measurement(CurvatureMap(torch.rand(2, 4, 8, 8)), torch.rand(2, 2, 4, 8, 8))
    tensors = to_ledger({"cat": one, "control/cat": two})
    for name, measured in {"cat": one, "control/cat": two}.items():
        found = from_ledger(tensors, name)
        assert torch.equal(found.rho.samples, measured.rho.samples)
        assert torch.equal(found.epsilon, measured.epsilon)
    assert from_ledger(tensors, "dog") is None
