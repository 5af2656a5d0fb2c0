"""Weights from a file lie where kernels expect them, wherever the file's header lets them begin.

Rounding depends on where they lie on some machines only, and MKL can be told to be such a one: see the last test.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import trainers as by
from support.families import SIZE, TOKENS
from support.originals import clip_weights, original_weights

from memwatch.config import MemWatchConfig
from memwatch.denoiser import Components, StableDiffusion, load_components
from memwatch.denoiser.components import ALIGNMENT, offset_of
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.prepare import PreparedProbe
from memwatch.measure.probes import Probe
from memwatch.measure.snapshots import SnapshotStore
from memwatch.measure.weights import OffloadedNetwork, swapped, trainable
from memwatch.scan.checkpoint_store import ObservationCache
from memwatch.scan.checkpoints import load_model, make_room, read_weights
from memwatch.scan.lora import DENOISER

SHIFTS = (0, 8, 24, 56)  # a header is padded to a multiple of 8 bytes


def shift(where: Path, by_bytes: int) -> Path:
    """Let the tensors of the files there begin so many bytes later."""
    for file in [where] if where.is_file() else list(where.rglob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata() or {})
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata | {"padding": " " * by_bytes})
    return where


def of(*models: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


def components(source: Path) -> Components:
    names, device = StableDiffusion.text_encoders, torch.device("cpu")
    return load_components(source, Components(None), needs_vae=True, text_encoders=names, device=device)


def lora(source: str, base: Path) -> torch.nn.Module:
    """A network that has room for it."""
    like = load_model(str(base))
    make_room(like, source, DENOISER)
    return like


def snapshots(folder: Path) -> list[torch.Tensor]:
    store = SnapshotStore(folder / "store", 1)
    store.add(0, {f"{i}": torch.randn(i + 1) for i in range(5)})
    shift(folder / "store", 8)
    return [*store.get(0).values(), *store.read(0, ["0", "3"]).values()]


def kept_observations(folder: Path) -> list[torch.Tensor]:
    probe = PreparedProbe(Probe("a cat", name="cat"), {}, None, None)
    kept = ObservationCache(folder / "kept", MemWatchConfig(), [], list)
    kept.write(0, probe, Observation(probe.probe, (61.0,), Measurement(None, torch.randn(1, 3, 1, 2, 1))))
    shift(folder / "kept", 8)
    return [kept.read(0, probe).now.epsilon]


def a_resting_network(folder: Path) -> list[torch.Tensor]:
    network = torch.nn.Sequential(*(torch.nn.Linear(i, 3) for i in (1, 3, 5)))
    with OffloadedNetwork(network, folder).on(torch.device("cpu")):
        return [tensor.data for tensor in of(network)]


def of_a_model(source: str, base: Path) -> list[torch.Tensor]:
    return of(load_model(source, base))


def of_an_encoder(source: str, base: Path) -> list[torch.Tensor]:
    return list(read_weights(source, components(base).text_encoders[0], "text_encoder").values())


DOORS = {  # the file, and what gives tensors of it
    "whole model": ("pipeline", of_a_model),
    "its text encoder": ("pipeline", of_an_encoder),
    "its parts": ("pipeline", lambda source, base: of(components(source).vae, *components(source).text_encoders)),
    "single file": ("original.safetensors", of_a_model),
    "its encoder": ("original.safetensors", of_an_encoder),
    "LoRA": ("lora.safetensors", of_a_model),
    "its factors": ("lora.safetensors", lambda source, base: list(read_weights(source, lora(source, base)).values())),
    "bare tensors": ("bare.safetensors", of_a_model),
    "as they are": (
        "bare.safetensors",
        lambda source, base: list(read_weights(source, load_model(str(base))).values()),
    ),
    "snapshots": (".", lambda source, base: snapshots(Path(source))),
    "kept observations": (".", lambda source, base: kept_observations(Path(source))),
    "a resting network": (".", lambda source, base: a_resting_network(Path(source))),
}


@pytest.fixture
def files(pretrained, pipeline, tmp_path) -> Path:
    """The same weights in every form, and other ones as a LoRA."""
    shutil.copytree(pretrained, tmp_path / "pipeline")
    unet = copy.deepcopy(pipeline.unet)
    save_file({name: p.data.clone() for name, p in unet.named_parameters()}, tmp_path / "bare.safetensors")
    words = clip_weights(pipeline.text_encoder, "cond_stage_model.transformer.")
    save_file(original_weights(unet) | words, tmp_path / "original.safetensors")
    factors = by.factors_of(by.with_lora(unet, ["to_q", "to_v"]))
    save_file(by.kohya(factors, "lora_unet_"), tmp_path / "lora.safetensors")
    return tmp_path


@pytest.mark.parametrize("door", DOORS)
def test_what_comes_through_every_door_lies_well(door, files, pretrained):
    name, tensors_of = DOORS[door]
    for by_bytes in SHIFTS:
        tensors = tensors_of(str(shift(files / name, by_bytes)), pretrained)
        assert tensors
        assert {tensor.data_ptr() % ALIGNMENT for tensor in tensors} == {0}


def said(model: torch.nn.Module) -> torch.Tensor:
    """What it says at fixed noise; one row alone is where kernels differ."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, SIZE // 2, SIZE // 2, generator=generator)
    hidden = torch.randn(1, TOKENS, 16, generator=generator)
    with torch.no_grad():
        return model.eval()(noisy, torch.tensor([301]), hidden).sample


@pytest.mark.parametrize("source", ["pipeline", "original.safetensors", "bare.safetensors"])
def test_the_same_weights_say_exactly_the_same(source, files, pretrained, pipeline):
    expected = said(copy.deepcopy(pipeline.unet))
    for by_bytes in SHIFTS:
        model = load_model(str(shift(files, by_bytes) / source), pretrained)
        assert torch.equal(said(model), expected), by_bytes


def test_a_model_that_is_mapped_and_its_own_weights_say_exactly_the_same(files, pipeline):
    """As a loop on the CPU trains what it has loaded: nobody moves its weights, and earlier ones lie like them."""
    live, starts = copy.deepcopy(pipeline.unet), set()
    for by_bytes in SHIFTS:
        mapped = load_file(shift(files / "bare.safetensors", by_bytes))
        for name, parameter in live.named_parameters():
            parameter.data = mapped[name]
        expected, where = said(live), {name: offset_of(p) for name, p in live.named_parameters()}
        with swapped(live, trainable(live)):
            assert {name: offset_of(p) for name, p in live.named_parameters()} == where
            assert torch.equal(said(live), expected)
        starts.add(mapped["conv_in.bias"].data_ptr() % ALIGNMENT)
    assert len(starts) == len(SHIFTS)  # a header does shift what is mapped


@pytest.mark.skipif("MKL_ENABLE_INSTRUCTIONS" in os.environ, reason="this is that machine")
def test_the_same_on_a_machine_that_rounds_elsewhere():
    """MKL's kernels for older machines; without MKL it is the same again."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "exactly", __file__]
    done = subprocess.run(
        command, env=os.environ | {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
