"""Borrowed networks: gradient checkpointing for a while, and CUDA's settings as they were."""

from __future__ import annotations

import pytest
import torch
from support.builders import Loop

from memwatch.denoiser import checkpointed
from memwatch.denoiser.borrow import CHECKPOINTING, deterministic, deterministic_settings


def switches(model) -> list:
    """The switches of every module, and whether they are attributes of its own."""
    return [{name: module.__dict__.get(name, "none") for name in CHECKPOINTING} for module in model.modules()]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_is_switched_on_for_a_while(lora, raises, pretrained):
    unet = Loop(pretrained, lora=lora).bare
    unet.down_blocks[0].gradient_checkpointing = True  # a user may have chosen one block
    unet.down_blocks[0]._gradient_checkpointing_func = print
    before = switches(unet)
    with pytest.raises(ZeroDivisionError) if raises else torch.enable_grad(), checkpointed(unet):
        assert unet.up_blocks[0].gradient_checkpointing
        assert unet.down_blocks[0]._gradient_checkpointing_func is not print
        if raises:
            raise ZeroDivisionError
    assert switches(unet) == before


def cuda_settings() -> list:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found = [cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32]
    found += [torch.utils.deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()]
    return [*found, torch.get_float32_matmul_precision()]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(("variable", "mode"), [(None, 1), (":4096:8", 2)])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_settings_of_cuda_are_changed_and_restored(precision, variable, mode, raises, monkeypatch):
    """The switches exist on every machine, so that this needs no GPU."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    if variable is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", variable)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        before = cuda_settings()
        with pytest.raises(ZeroDivisionError) if raises else torch.enable_grad(), deterministic():
            owners = deterministic_settings()
            assert all(getattr(owner, name) == value for owner, name, value in owners)
            assert torch.get_deterministic_debug_mode() == mode
            if raises:
                raise ZeroDivisionError
        assert cuda_settings() == before
    finally:
        torch.set_float32_matmul_precision(was)
