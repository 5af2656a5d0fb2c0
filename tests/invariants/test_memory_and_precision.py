"""Where memory is short, and in the loop's mixed precision: training is untouched and a model equals itself."""

from __future__ import annotations

import pytest
import torch
from support.builders import SMALL, Loop, assert_same, maps, picture
from torch.nn.functional import mse_loss

from memwatch import Probe

CAT = [Probe("a cat", picture(0), name="cat")]
ALL = {"proof": {"enabled": False}}


def states(loop: Loop, watch, steps: int = 2) -> list:
    seen = []
    loop.run(watch, steps, each=lambda running: seen.append(running.state()))
    return seen


def fits_only_when_checkpointed(unet):
    """A look, unlike training, runs out of memory unless activations are recomputed."""

    def check(module, args, kwargs):
        is_look = torch.is_grad_enabled() and not module.training
        if is_look and not module.down_blocks[1].gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    unet.register_forward_pre_hook(check, with_kwargs=True)
    return unet


@pytest.mark.parametrize("lora", [False, True])
def test_a_look_that_does_not_fit_recomputes_its_activations(lora, pretrained, pipeline, tmp_path):
    bare = states(Loop(pretrained, lora=lora), None)
    loop = Loop(pretrained, tmp_path / "short", lora=lora, adapt=fits_only_when_checkpointed)
    watch = loop.watch(pipeline, CAT, config=SMALL, **ALL)
    assert_same(bare, states(loop, watch))
    assert watch.observer.batches.with_gradients.spares
    plain = Loop(pretrained, tmp_path / "plain", lora=lora)
    plain.watch(pipeline, CAT, config=SMALL | {"curvature": {"vectors": 2, "tile": 2, "batch_size": 1}}, **ALL).begin()
    assert_same(maps(tmp_path / "plain", 0), maps(tmp_path / "short", 0))


def test_a_model_that_cannot_checkpoint_costs_the_look(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, adapt=fits_only_when_checkpointed)
    type(loop.bare)._supports_gradient_checkpointing, was = False, True
    try:
        watch = loop.watch(pipeline, CAT, config=SMALL | {"strict": False}, **ALL)
    finally:
        type(loop.bare)._supports_gradient_checkpointing = was
    assert "OutOfMemoryError" in watch.begin().failure


# --- the loop's precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_the_loop_s_precision_a_frozen_model_reads_exactly_0(checkpointing, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, precision="bf16", lr=0.0, checkpointing=checkpointing)
    watch = loop.watch(pipeline, CAT, config=SMALL, precision="loop", **ALL)
    (report,) = loop.run(watch, 2)
    (finding,) = report.findings
    snapshot, now = finding.signals.snapshot, finding.observation.now
    assert not any(getattr(snapshot, name).samples.any() for name in ("collapse", "variance", "score", "loss"))
    assert now.epsilon.dtype == now.rho.samples.dtype == torch.float32
    full = loop.watch(pipeline, CAT, config=SMALL, output_dir=str(tmp_path / "full"), **ALL).begin()
    epsilon = full.findings[0].observation.now.epsilon
    away = (now.epsilon - epsilon).abs().max() / epsilon.abs().max()
    assert 1e-5 < away < 0.1  # it is another precision, and not another model


def test_in_the_loop_s_precision_training_is_bit_identical(pretrained, pipeline, tmp_path):
    bare = states(Loop(pretrained, precision="bf16"), None)
    loop = Loop(pretrained, tmp_path, precision="bf16")
    assert_same(bare, states(loop, loop.watch(pipeline, CAT, config=SMALL, precision="loop", **ALL)))


@pytest.mark.usefixtures("screened")
def test_inside_an_autocast_of_the_loop_no_copy_without_gradient_is_left(pretrained, pipeline, tmp_path):
    """Forward-only looks would fill a shared cache of low-precision weights with copies that take no gradient."""
    loop = Loop(pretrained, tmp_path, precision="bf16")
    watch = loop.watch(pipeline, CAT, config=SMALL, precision="loop", **ALL)
    with torch.autocast("cpu", torch.bfloat16):
        watch.begin()
        output = loop.bare(torch.ones(1, 4, 8, 8), torch.tensor(61), torch.ones(1, 32, 16)).sample
        mse_loss(output.float(), torch.zeros(1, 4, 8, 8)).backward()
    assert all(p.grad is not None for p in loop.bare.parameters())
