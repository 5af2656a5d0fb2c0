"""Borrow foreign networks: find them inside their wrappers, use them, and give them back exactly as they were."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from memwatch.denoiser.log_filter import swap


def unwrap(model: nn.Module) -> nn.Module:
    """The eager network inside DDP, ``torch.compile`` and ``PeftModel`` wrappers. The wrappers stay as they are."""
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    model = getattr(model, "_orig_mod", model)
    base: Any = getattr(model, "get_base_model", lambda: model)
    inner: nn.Module = base()
    return inner


@contextmanager
def borrow(*models: nn.Module) -> Iterator[None]:
    """Inside, the networks run in eval mode, eagerly and without autocast; on CUDA by ``deterministic`` kernels.

    Afterwards the networks and every random number generator are exactly as they were, also after an exception.
    Gradient checkpointing stays on where training uses it. accelerate's mixed-precision wrapper, which enters autocast
    by itself, is bypassed.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    forwards = [(model, model.__dict__["forward"]) for model in models if "_original_forward" in model.__dict__]
    grad_enabled = torch.is_grad_enabled()
    device_type = next((p.device.type for model in models for p in model.parameters()), "cpu")
    try:
        with ExitStack() as stack:
            stack.enter_context(untouched_streams())
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.autocast(device_type, enabled=False))
            stack.enter_context(deterministic())
            for model in models:
                model.eval()
            for model, _ in forwards:
                model.forward = model.__dict__["_original_forward"]
            yield
    finally:
        for module, training in modes:
            module.training = training
        for model, forward in forwards:
            model.forward = forward
        torch.set_grad_enabled(grad_enabled)


@contextmanager
def untouched_streams() -> Iterator[None]:
    """Afterwards the random number generators of Python, NumPy and torch are as they were, also after an exception."""
    python, numpy_, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, CUDA gives the same numbers for the same input, in float32 without TF32; nothing happens without CUDA.

    cuBLAS reads its variable when a process starts, so memwatch cannot set it. Without
    ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` PyTorch lets the backward passes of attention add up in any order, and a model
    that is compared with itself reads 0 up to rounding.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield
        return
    known = os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")
    with ExitStack() as back, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*determinis")  # of what stays as it is, once per kernel
        for owner, name, value in deterministic_settings():
            swap(back, owner, name, value)
        back.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("error" if known else "warn")
        yield


def deterministic_settings() -> list[tuple[Any, str, Any]]:
    """Owner, name and value of each; before PyTorch 2.9 TF32 is one switch."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    settings: list[tuple[Any, str, Any]] = [(cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    settings.append((torch.utils.deterministic, "fill_uninitialized_memory", False))  # it costs time
    if hasattr(matmul, "fp32_precision"):
        parts: tuple[Any, ...] = (matmul, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
        return settings + [(part, "fp32_precision", "ieee") for part in parts]
    return [*settings, (cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]


CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")  # diffusers' switches on its modules


def can_checkpoint(model: nn.Module) -> bool:
    """Whether the model knows gradient checkpointing, and training does not use it already."""
    known = bool(getattr(model, "_supports_gradient_checkpointing", False))
    return known and not getattr(model, "is_gradient_checkpointing", False)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside, a diffusers model recomputes its activations when it goes backward, which takes less memory.

    Weights must stay in place until the gradients are taken.
    """
    switches = [
        (module, {name: module.__dict__[name] for name in CHECKPOINTING if name in module.__dict__})
        for module in model.modules()
    ]
    turn_on: Any = getattr(model, "enable_gradient_checkpointing")  # noqa: B009  # nn.Module does not declare it
    try:
        turn_on()
        yield
    finally:
        for module, was in switches:
            for name in CHECKPOINTING:
                module.__dict__.pop(name, None)
            module.__dict__.update(was)
