"""The shelf: the same numbers, no memory, no file left behind; and what a whole watch holds between events."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import CONFIG, EAGER, Loop, assert_same, call_every_change, picture

import memwatch.measure.weights
from memwatch import Probe
from memwatch.bench.held import bytes_held
from memwatch.measure.baselines import Baselines
from memwatch.measure.observer import Observer
from memwatch.measure.weights import OffloadedNetwork, kept_on_disk


def test_tensors_come_back_and_no_file_is_left(tmp_path):
    tensors = {
        "image": torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3),
        "a/b": torch.randn(3),
        "": torch.tensor(1),
    }
    found = kept_on_disk(tensors, tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    assert_same(found, tensors)
    assert all(is_mapped(tensor) for tensor in found.values())
    again = pickle.loads(pickle.dumps(found["image"].numpy()))
    assert np.array_equal(again, tensors["image"].numpy())


def test_where_the_disk_refuses_they_stay_in_memory(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(memwatch.measure.weights, "write_safetensors", full)
    tensors = {"a": torch.ones(2)}
    assert kept_on_disk(tensors, tmp_path)["a"] is tensors["a"]
    (tmp_path / "file").touch()
    assert kept_on_disk(tensors, tmp_path / "file")["a"] is tensors["a"]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_network_on_the_shelf_computes_the_same(tmp_path):
    network, x = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval(), torch.randn(2, 3)
    expected = network(x)
    resting = OffloadedNetwork(network, tmp_path)
    for _ in range(2):
        with resting.on(torch.device("cpu")):
            assert_same(network(x), expected)
        with pytest.raises(ZeroDivisionError), resting.on(torch.device("cpu")):
            raise ZeroDivisionError
        assert all(is_mapped(p) for p in (*network.parameters(), *network.buffers()))


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether it lies in a file (Linux)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return int(inode) != 0
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux where memory lies")
@pytest.mark.parametrize("baseline", ["first", "path"])
def test_a_watch_holds_next_to_nothing_between_events(baseline, pretrained, tmp_path, monkeypatch):
    """After events with everything in them: alerts, proofs, ledger. Scaled up, 64 probes at 512 px stay below 64 MB."""
    call_every_change(monkeypatch)
    loop, count = Loop(pretrained, tmp_path), 6
    if baseline == "path":
        from safetensors.torch import save_file

        save_file({name: p.detach().clone() for name, p in loop.bare.named_parameters()}, tmp_path / "w.safetensors")
        baseline = f"path:{tmp_path / 'w.safetensors'}"
    probes = [Probe(f"a cat {i}", picture(i), name=f"cat {i}") for i in range(count)]
    controls = [Probe(f"a dog {i}", picture(50 + i), name=f"dog {i}") for i in range(2)]
    watch = loop.watch(pretrained, probes, controls=controls, config=CONFIG, **EAGER, signals={"baseline": baseline})
    reports = loop.run(watch, 4)
    assert any(f.proof is not None for f in reports[-1].findings)
    del reports
    gc.collect()
    others = [loop.accelerator, loop.bare, loop.unet, loop.loader, watch.accelerator, watch.observer.parts.scheduler]
    held = bytes_held(watch, others)["cpu"]
    assert isinstance(watch.observer, Observer)
    assert isinstance(watch.baselines, Baselines)
    image = 16 * 16 * 3
    assert held < (count + 2) * image + 20_000  # the unconditional branch, the schedule
