"""Borrow foreign networks: find them inside their wrappers, use them, and give them back exactly as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


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
    """Inside, the networks run in eval mode, eagerly and without autocast.

    Afterwards the networks and every random number generator are exactly as they were, also after an exception.
    accelerate's mixed-precision wrapper enters autocast by itself, so it is bypassed and not only disabled.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    forwards = [(model, model.__dict__["forward"]) for model in models if "_original_forward" in model.__dict__]
    python, numpy_, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    grad_enabled = torch.is_grad_enabled()
    try:
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.autocast(_device_type(models), enabled=False))
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
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _device_type(models: Sequence[nn.Module]) -> str:
    return next((p.device.type for model in models for p in model.parameters()), "cpu")
