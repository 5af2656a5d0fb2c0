"""Weights: swapped in and out exactly, whole in files or not there, and kept on disk without memory or a trace."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from support.builders import CONFIG, Loop, assert_same, call_every_change, picture
from support.families import TOKENS
from support.memory import bytes_held, mapped_files

import memwatch.measure.weights
from memwatch import Probe
from memwatch.denoiser import borrow
from memwatch.measure.curvature import test_vectors as vectors_of
from memwatch.measure.curvature import value_and_diag_jacobian
from memwatch.measure.weights import (
    OffloadedNetwork,
    kept_on_disk,
    read_safetensors,
    swapped,
    trainable,
    write_safetensors,
)

CPU = torch.device("cpu")


def other_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return {name: value + 0.1 * torch.randn(value.shape, generator=g) for name, value in trainable(model).items()}


def products(unet) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and diagonal Jacobian products at a fixed input."""
    generator = torch.Generator().manual_seed(8)
    x, hidden = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, TOKENS, 16, generator=generator)
    vectors = torch.stack([vectors_of(4, (4, 8, 8), generator, tile=4) for _ in range(2)], dim=1)
    with borrow(unet):
        return value_and_diag_jacobian(lambda x: unet(x, 100, hidden).sample, x, vectors)


@pytest.mark.parametrize("kind", [{}, {"lora": True}, {"checkpointing": True}, {"lora": True, "checkpointing": True}])
def test_swapping_is_the_other_model_inside_and_exactly_the_first_outside(kind, pretrained):
    loop = Loop(pretrained, **kind)
    loop.run(None, 2)
    values = other_values(loop.bare)
    reference = Loop(pretrained, **kind).bare  # a model loaded with these weights
    reference.load_state_dict({**loop.bare.state_dict(), **values})
    expected, own = products(reference), products(loop.bare)
    before, identities = loop.state(), loop.identities()
    with swapped(loop.bare, values):
        assert_same(products(loop.bare), expected)
    assert not torch.equal(own[1], expected[1])
    assert_same(products(loop.bare), own)
    assert_same(loop.state(), before)
    assert loop.identities() == identities


def test_swapping_back_survives_an_error_and_nests(pretrained):
    unet = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet")
    before, pointers = trainable(unet), [p.data_ptr() for p in unet.parameters()]
    doubled = {name: 2 * value for name, value in before.items()}
    with pytest.raises(KeyError), swapped(unet, other_values(unet)), swapped(unet, doubled):
        raise KeyError("in the middle")
    assert_same(trainable(unet), before)
    assert pointers == [p.data_ptr() for p in unet.parameters()]


def test_swapped_values_are_seen_under_autocast():
    """Autocast keeps its cast copies of parameters; they must be those of the weights that are in place."""
    layer, x = torch.nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with swapped(layer, {"weight": torch.full((2, 2), 3.0)}):
            assert layer(x).tolist() == [[6, 6]]
        assert torch.equal(layer(x), before)


def test_a_snapshot_of_another_model_is_refused_and_nothing_changes():
    layer = torch.nn.Linear(2, 2)
    before = trainable(layer)
    with pytest.raises(ValueError, match=r"no\.such\.name.*no such parameter"):
        swapped(layer, {"no.such.name": torch.zeros(2)}).__enter__()
    with pytest.raises(ValueError, match=r"weight has shape \(3, 3\), the model \(2, 2\)"):
        swapped(layer, {"bias": torch.zeros(2), "weight": torch.zeros(3, 3)}).__enter__()
    assert_same(trainable(layer), before)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.safetensors"
    write_safetensors(path, {"w": torch.arange(6.0).reshape(2, 3).T})
    assert torch.equal(read_safetensors(path)["w"], torch.arange(6.0).reshape(2, 3).T)

    def broken(tensors, part, metadata):
        part.write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(memwatch.measure.weights, "save_file", broken)
    with pytest.raises(OSError, match=r"cannot write .*file\.safetensors.*No space"):
        write_safetensors(path, {"w": torch.zeros(1)})
    assert [file.name for file in path.parent.iterdir()] == ["file.safetensors"]
    assert read_safetensors(path)["w"].shape == (3, 2)
    tensors = {"a": torch.ones(2)}
    assert kept_on_disk(tensors, tmp_path)["a"] is tensors["a"]  # where the disk refuses, it stays in memory
    assert [file.name for file in tmp_path.iterdir()] == ["deep"]


def is_mapped(tensor: torch.Tensor) -> bool:
    return any(start <= tensor.data_ptr() < end for start, end in mapped_files())


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux where memory lies")


@linux
def test_tensors_kept_on_disk_come_back_and_no_file_is_left(tmp_path):
    image = torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3)
    tensors = {"image": image, "a/b": torch.randn(3), "": torch.tensor(1)}
    found = kept_on_disk(tensors, tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    assert_same(found, tensors)
    assert all(is_mapped(tensor) for tensor in found.values())
    assert np.array_equal(pickle.loads(pickle.dumps(found["image"].numpy())), image.numpy())


@linux
def test_an_offloaded_network_computes_the_same(tmp_path):
    network, x = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval(), torch.randn(2, 3)
    expected = network(x)
    resting = OffloadedNetwork(network, tmp_path)
    for _ in range(2):
        with resting.on(CPU):
            assert_same(network(x), expected)
        with pytest.raises(ZeroDivisionError), resting.on(CPU):
            raise ZeroDivisionError
        assert all(is_mapped(p) for p in (*network.parameters(), *network.buffers()))


@linux
@pytest.mark.parametrize("baseline", ["first", "path"])
def test_a_watch_holds_next_to_nothing_between_events(baseline, pretrained, tmp_path, monkeypatch):
    """After events with everything in them: alerts, proofs, ledger. Scaled up, 64 probes at 512 px stay below 64 MB."""
    call_every_change(monkeypatch)
    loop, count = Loop(pretrained, tmp_path), 6
    if baseline == "path":
        save_file({name: p.detach().clone() for name, p in loop.bare.named_parameters()}, tmp_path / "w.safetensors")
        baseline = f"path:{tmp_path / 'w.safetensors'}"
    probes = [Probe(f"a cat {i}", picture(i), name=f"cat {i}") for i in range(count)]
    controls = [Probe(f"a dog {i}", picture(50 + i), name=f"dog {i}") for i in range(2)]
    watch = loop.watch(pretrained, probes, controls=controls, config=CONFIG, signals={"baseline": baseline})
    reports = loop.run(watch, 4)
    assert any(f.proof is not None for f in reports[-1].findings)
    del reports
    gc.collect()
    others = [loop.accelerator, loop.bare, loop.unet, loop.loader, watch.accelerator, watch.observer.parts.scheduler]
    image = 16 * 16 * 3
    assert bytes_held(watch, others) < (count + 2) * image + 20_000  # the unconditional branch, the schedule
