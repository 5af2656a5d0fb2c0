"""Weights: swapped in and out exactly, named tensors beside them, and files that are whole or not there."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from support.builders import TOKENS, Loop, assert_same

import memwatch.measure.weights
from memwatch.measure.curvature import diag_jacobian
from memwatch.measure.curvature import test_vectors as vectors_of
from memwatch.measure.weights import (
    read_safetensors,
    swapped,
    trainable,
    with_conditioning,
    without_conditioning,
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


def test_swapping_is_seen_under_autocast():
    """Autocast keeps its cast copies of parameters; they must be those of the weights that are in place."""
    layer, x = torch.nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with swapped(layer, {"weight": torch.full((2, 2), 3.0)}):
            assert layer(x).tolist() == [[6, 6]]
        assert torch.equal(layer(x), before)


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
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.default.weight"
    assert not torch.equal(copies[name], loop.bare.get_parameter(name))


def test_conditioning_and_weights_come_apart_again():
    weights = {"down.weight": torch.ones(2)}
    conditioning = {"a//b": {"text_embeds": torch.zeros(3)}, "c": {"time_ids": torch.ones(6)}}
    assert_same(without_conditioning(with_conditioning(weights, conditioning)), (weights, conditioning))
    assert without_conditioning(weights) == (weights, {})


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
