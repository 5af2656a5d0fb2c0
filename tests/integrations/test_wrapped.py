"""A network and what hangs in its layers, as one module."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from support.processes import new_process
from torch import nn

from memwatch.denoiser import StableDiffusion, StableDiffusion3, family_of
from memwatch.integrations.wrapped import Patched, patched


def test_both_have_their_parameters_and_the_network_its_ways(pretrained):
    unet, lora = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet"), nn.Linear(2, 2)
    together = patched(unet, lora)
    assert isinstance(together, Patched)
    assert [*together.parameters()] == [*unet.parameters(), *lora.parameters()]
    assert together.config is unet.config
    assert together.dtype is unet.dtype
    assert family_of(together) is StableDiffusion
    inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 32, 16)
    assert torch.equal(together.eval()(*inputs).sample, unet(*inputs).sample)


def test_a_family_that_goes_by_its_class_is_known(families):
    transformer = families["sd3"].transformer
    assert family_of(patched(transformer, nn.Linear(2, 2))) is StableDiffusion3


def test_accelerates_mixed_precision_is_passed_by():
    new_process()
    bare = nn.Linear(8, 8)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(bare)
    mixed, x = prepared.forward, torch.randn(4, 8)
    assert torch.equal(Patched(prepared, nn.Linear(2, 2))(x), nn.functional.linear(x, bare.weight, bare.bias))
    assert not torch.equal(prepared(x), nn.functional.linear(x, bare.weight, bare.bias))
    assert prepared.forward == mixed
