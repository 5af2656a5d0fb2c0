"""Measuring a view: the true retained variance of known laws, batches that fit into memory, and what an event costs."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support.builders import CONFIG, Loop, picture
from support.oracles import LEVELS, DiagonalGaussian, full_gaussian, look_at, spread, view_of

import memwatch.config
from memwatch import Probe
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config
from memwatch.measure.measure import Batches, EventBatches, count_passes
from memwatch.measure.observer import Observer


def test_diagonal_gaussian_is_exact_with_one_vector():
    oracle, view = DiagonalGaussian(spread(), mean=spread(seed=1)), view_of(LEVELS, draws=2)
    found = look_at(oracle, view, vectors=1, tile=1)
    assert found.rho.samples.shape == (3, 2, 8, 8)
    for level, timestep in enumerate(LEVELS):
        expected = oracle.rho(timestep).mean(0).float()
        for draw in range(2):
            torch.testing.assert_close(found.rho.samples[level, draw], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 16])
def test_rotated_gaussian_within_four_standard_errors(tile):
    oracle = full_gaussian()
    rho = look_at(oracle, view_of(LEVELS, shape=(4, 4, 4)), vectors=1024, tile=tile).rho
    assert rho.samples.shape[1] == 1024 // tile
    for level, timestep in enumerate(LEVELS):
        away = (rho.mean[level] - oracle.rho(timestep).mean(0)).abs()
        assert (away <= 4 * rho.sem[level]).all()
        assert rho.sem[level].max() < 0.02


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "flow"])
def test_one_map_whatever_the_prediction_type(prediction_type):
    variance, mean = spread(), spread(seed=1)
    expected = look_at(DiagonalGaussian(variance, mean), view_of(LEVELS, 2))
    view = view_of(LEVELS, 2, flow=prediction_type == "flow")
    found = look_at(DiagonalGaussian(variance, mean, prediction_type), view)
    torch.testing.assert_close(found.rho.samples, expected.rho.samples, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.epsilon, expected.epsilon, rtol=1e-4, atol=1e-4)


def test_a_block_spans_the_noise_draws_of_a_level():
    """The Jacobian of a Gaussian law is the same at every draw: 4 draws of 16 vectors are exact on 64 coordinates.

    The error bar does not know: it is that of independent draws, which is more.
    """
    oracle, view = full_gaussian(), view_of(LEVELS, draws=4, shape=(4, 4, 4))
    block, independent = (look_at(oracle, view, vectors=16, tile=tile).rho for tile in (64, 1))
    assert block.samples.shape == (3, 4, 4, 4)
    for level, timestep in enumerate(LEVELS):
        torch.testing.assert_close(block.mean[level], oracle.rho(timestep).mean(0).float(), rtol=1e-4, atol=1e-4)
    assert (independent.mean - block.mean).abs().max() > 1e-3
    assert block.sem.mean() > 0.5 * independent.sem.mean()


class Work:
    """Twice every row; memory runs out above ``limit`` rows. ``calls`` are the batches that it was asked for."""

    def __init__(self, limit: int) -> None:
        self.limit, self.calls = limit, []

    def __call__(self, rows):
        self.calls.append(len(rows))
        if len(rows) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * row for row in rows]


def test_the_size_that_fits_is_found_once():
    batches, work = Batches(8), Work(limit=3)
    assert batches.run(range(10), work) == [2 * row for row in range(10)]
    assert work.calls == [8, 4, 2, 2, 2, 2, 2]
    work.limit, work.calls = 8, []  # it never grows again: rounding would change once more
    batches.run(range(11), work)
    assert work.calls == [2, 2, 2, 2, 2, 1]
    assert batches.size == 2  # a remainder does not shrink it
    work.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        batches.run(range(3), work)


def test_what_the_failed_batch_computed_is_gone_before_the_cache_is_emptied(monkeypatch):
    graphs, alive = [], []

    def work(rows):
        x = torch.ones(len(rows), requires_grad=True)
        y = x * 2  # holds the graph, as the network's frames do
        graphs.append(weakref.ref(y))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return y.tolist()

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append([graph() is not None for graph in graphs]))
    assert Batches(4).run(range(4), work) == [2.0] * 4
    assert alive == [[False], [False, False]]


def test_a_single_row_is_tried_again_sparingly_and_all_after_it():
    inside, seen = [], []

    @contextmanager
    def sparing():
        inside.append(True)
        try:
            yield
        finally:
            inside.pop()

    def work(rows):
        seen.append((len(rows), bool(inside)))
        if not inside:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    batches = Batches(2, sparing)
    for _ in range(2):
        assert batches.run([7, 8], work) == [7, 8]
    assert seen == [(2, False), (1, False), (1, True), (1, True), (1, True), (1, True)]
    assert not inside


@pytest.mark.parametrize(
    ("device", "mixed", "precision", "rows", "expected"),
    [
        ("cpu", "bf16", "full", 1, (8, 32, 4, False)),
        ("cuda", "no", "full", 64, (8, 32, 4, False)),
        ("cuda", "bf16", "full", 4, (2, 8, 4, False)),  # a row of float32 takes twice as much
        ("cuda", "bf16", "loop", 4, (4, 16, 4, False)),
        ("cuda", "fp16", "full", 1, (1, 1, 1, True)),  # not even half a row
    ],
)
def test_a_look_takes_no_more_rows_than_a_step_of_the_loop(device, mixed, precision, rows, expected):
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=mixed)
    observer = object.__new__(Observer)
    observer.ranks, observer.config = SimpleNamespace(accelerator=accelerator), load_config(None, precision=precision)
    observer.denoiser, observer.batches = SimpleNamespace(dtype=torch.float32), EventBatches(8, None)
    observer.limit_batches(rows)
    b = observer.batches
    assert (b.with_gradients.size, b.forward_only.size, b.sampling.size, b.with_gradients.spares) == expected


class Counter:
    """Counts rows through a network: forward by a hook on its call, backward by one on its input's gradient."""

    def __init__(self, network) -> None:
        self.passes = 0
        network.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, module, args, kwargs) -> None:
        x = args[0]
        self.passes += len(x)
        if x.requires_grad:
            x.register_hook(lambda grad: setattr(self, "passes", self.passes + len(grad)))


@pytest.mark.parametrize("screen", [True, False])
def test_the_passes_of_an_event_are_those_that_are_counted(screen, pretrained, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(MemWatchConfig, "screens", screen)
    monkeypatch.setattr(memwatch.config, "FULL_EVERY", 2)
    loop = Loop(pretrained, tmp_path, lr=0.0)
    probes = [Probe("a cat", picture(0), name="cat"), Probe("a dog", picture(1), name="dog")]
    watch = loop.watch(pipeline, probes=probes, config=CONFIG)
    counter, counts = Counter(loop.bare), []
    for step in range(4):
        before = counter.passes
        watch._event(step)
        counts.append(counter.passes - before)
    expected = count_passes(watch.config, 2, 0)
    assert watch.observer.passes == expected
    screened, full = expected.of_event(), expected.of_event(1)
    late = expected.full  # at the first full event the baseline is measured as well
    assert counts == ([screened, screened, full + late, screened] if screen else [full] * 4)


def test_the_screen_is_cheap():
    assert count_passes(MemWatchConfig(), num_references=28, num_prompts=0).of_event() <= 400
