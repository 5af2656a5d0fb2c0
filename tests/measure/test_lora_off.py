"""LoRA off is the model before its LoRA, in numbers, or it is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, inject_adapter_in_model
from support.builders import Loop, assert_same, moved
from support.families import TOKENS

from memwatch import ConfigError
from memwatch.measure.lora_off import lora_off, trained_adapters, why_not_base
from memwatch.measure.weights import swapped

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of settings that are meant here

TARGETS = ["to_q", "to_out.0"]
BASE = {"baseline": "base"}
SAME = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 8},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "lora_bias": {"lora_bias": True},
}
OTHER = {
    "dora": ({"use_dora": True}, "adapter 'default' of the UNet2DConditionModel is a DoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, r"out of the base's weights \(init_lora_weights='pissa'\)"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, r"init_lora_weights='olora'"),
    "bias": ({"bias": "all"}, r"trains \d+ parameters beside its LoRA, conv_in\.bias first"),
    "lora_only": ({"bias": "lora_only"}, r"beside its LoRA, \S+\.bias first"),
    "modules_to_save": ({"modules_to_save": ["conv_out"]}, r"beside its LoRA, conv_out\.modules_to_save\S+ first"),
}


def said(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    x, hidden = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, TOKENS, 16, generator=generator)
    with torch.no_grad():
        return unet.eval()(x, 100, hidden).sample


def with_adapter(base: torch.nn.Module, **settings) -> torch.nn.Module:
    unet = copy.deepcopy(base).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, **settings))
    return unet


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", SAME)
def test_it_is_the_model_before_the_adapter(kind, pipeline):
    base = pipeline.unet
    unet = with_adapter(base, **SAME[kind])
    assert why_not_base([unet]) is None
    moved(unet, 0.1)
    assert difference(said(unet), said(base)) > 0.01
    with swapped(unet, lora_off(unet)):
        assert difference(said(unet), said(base)) < 1e-6


@pytest.mark.parametrize("kind", OTHER)
def test_what_it_cannot_be_is_refused_by_name(kind, pipeline):
    settings, cause = OTHER[kind]
    base = pipeline.unet
    unet = with_adapter(base, **settings)
    moved(unet, 0.1)
    with swapped(unet, lora_off(unet)):
        assert difference(said(unet), said(base)) > 0.01
    with pytest.raises(AssertionError, match=cause):
        assert why_not_base([unet]) is None


@pytest.mark.parametrize(
    ("settings", "options"),
    [(LoHaConfig, {"r": 2}), (LoKrConfig, {"r": 2}), (OFTConfig, {"r": 0, "oft_block_size": 8})],
)
def test_other_adapters_are_no_lora(settings, options, pipeline):
    unet = get_peft_model(copy.deepcopy(pipeline.unet), settings(target_modules=["to_q"], **options)).get_base_model()
    assert lora_off(unet) == {}
    assert "no LoRA layers to switch off" in why_not_base([unet])


def test_an_adapter_that_is_not_trained_is_part_of_the_base(pipeline):
    base = with_adapter(pipeline.unet, use_dora=True)
    moved(base, 0.1)
    unet = copy.deepcopy(base).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), adapter_name="second")
    unet.set_adapters(["default", "second"])
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".second." in name)
    assert trained_adapters(unet) == {"second"}
    assert why_not_base([unet]) is None
    moved(unet, 0.1)
    assert difference(said(unet), said(base)) > 0.01
    with swapped(unet, lora_off(unet)):
        assert difference(said(unet), said(base)) < 1e-6


def test_a_run_refuses_it_at_construction_also_for_a_text_encoder(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lora=True)
    text_encoder = copy.deepcopy(pipeline.text_encoder).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), text_encoder)
    cause = "adapter 'default' of the CLIPTextModel is a DoRA"
    with pytest.raises(ConfigError, match=f"key 'signals.baseline': got 'base', allowed: .*{cause}"):
        loop.watch(pipeline, signals=BASE, text_encoder=text_encoder)
    loop.watch(pipeline, signals=BASE, text_encoder=text_encoder.requires_grad_(False))


def test_the_base_stays_when_a_text_encoder_is_frozen_in_mid_run(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lora=True)
    text_encoder = copy.deepcopy(pipeline.text_encoder).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), text_encoder)
    observer = loop.watch(pipeline, signals=BASE, text_encoder=text_encoder).observer
    before = observer.weights_without_lora()
    moved(text_encoder, 0.1)
    text_encoder.requires_grad_(False)
    assert_same(observer.weights_without_lora(), before)
