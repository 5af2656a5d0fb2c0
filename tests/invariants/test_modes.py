"""Ways to train beside the plain one: every wrapper, layout, dtype and processor is looked through, and left as it was found."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import SlicedAttnProcessor
from support.builders import CONFIG, SNAPSHOT_MAPS, TOKENS, Loop, assert_same, maps

SMALL = CONFIG | {
    "strict": True,
    "levels": {"timesteps": [61], "draws": 2},
    "curvature": {"vectors": 2, "tile": 2},
    "sampling": {"num_inference_steps": 2, "guidance_scale": 3.0},
    "signals": {"unconditional": False},
}


@functools.cache
def loaded(pretrained) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(pretrained)


def watched(pretrained, folder, steps: int = 2, **kind) -> tuple[Loop, list]:
    loop = Loop(pretrained, folder, **kind)
    watch = loop.watch(loaded(pretrained), config=SMALL)
    return loop, [watch.begin(), *loop.run(watch, steps)]


def assert_untouched(pretrained, folder, **kind) -> Loop:
    """The same training with and without, and the same objects before and after."""
    bare = Loop(pretrained, **kind)
    bare.run(None, 3)
    loop = Loop(pretrained, folder, **kind)
    before = loop.identities()
    watch = loop.watch(loaded(pretrained), config=SMALL)
    loop.run(watch, 3)
    assert_same(bare.state(), loop.state())
    after = loop.identities()
    assert after["processors"] == before["processors"]
    assert after["forward"] == before["forward"]
    return loop


# --- precision --------------------------------------------------------------------------------------------------------------------------


def test_mixed_precision_is_looked_through_to_the_float32_weights(pretrained, tmp_path):
    watched(pretrained, tmp_path / "whole", steps=0)
    watched(pretrained, tmp_path / "mixed", steps=0, precision="bf16")
    assert_same(maps(tmp_path / "whole", 0), maps(tmp_path / "mixed", 0))


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "no")], ids=str)
def test_float32_adapters_on_a_low_precision_base(dtype, precision, pretrained, tmp_path):
    kind = {"lora": True, "dtype": dtype, "precision": precision}
    loop = assert_untouched(pretrained, tmp_path / "kept", **kind)
    assert {p.dtype for p in loop.bare.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in loop.bare.parameters() if not p.requires_grad} == {dtype}
    _, reports = watched(pretrained, tmp_path / "low", lr=5e-2, **kind)
    watched(pretrained, tmp_path / "high", steps=0, lora=True)
    low, high = maps(tmp_path / "low", 0)["cat/raw"].float(), maps(tmp_path / "high", 0)["cat/raw"].float()
    assert float((low - high).abs().mean()) < 0.1 * float(high.abs().mean())
    assert all(f.signals.collapse.samples.any() for f in reports[-1].findings)


# --- checkpointing, compilation ---------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_number(pretrained, tmp_path):
    """Activations are computed a second time inside the backward pass: with the live weights, were the swap over by then."""
    for name, checkpointing in {"plain": False, "checkpointing": True}.items():
        watched(pretrained, tmp_path / name, checkpointing=checkpointing, lr=3e-2, lora=True)
    plain, checkpointed = maps(tmp_path / "plain", 2), maps(tmp_path / "checkpointing", 2)
    assert plain["poster/collapse"].any()
    assert_same(plain, checkpointed)


class Counting:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def whole(self, unet):
        return torch.compile(unet, backend=self)

    def blocks(self, unet):
        for block in (*unet.down_blocks, *unet.up_blocks):
            block.compile(backend=self)
        return unet


@pytest.mark.filterwarnings("ignore")  # dynamo warns of what it traces
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_compiled_model_is_looked_at_eagerly_and_not_compiled_again(how, pretrained, tmp_path):
    torch._dynamo.reset()
    alone = Counting()
    bare = Loop(pretrained, adapt=getattr(alone, how), lora=True)
    bare.run(None, 2)
    assert alone.graphs > 0

    torch._dynamo.reset()
    beside = Counting()
    loop = Loop(pretrained, tmp_path / how, adapt=getattr(beside, how), lora=True)
    watch = loop.watch(loaded(pretrained), config=SMALL)
    loop.run(watch, 2)
    assert beside.graphs == alone.graphs
    assert_same(bare.state(), loop.state())

    torch._dynamo.reset()
    eager = Loop(pretrained, tmp_path / "eager", lora=True)
    eager.watch(loaded(pretrained), config=SMALL).begin()
    assert_same(maps(tmp_path / "eager", 0), maps(tmp_path / how, 0))


# --- layouts and processors -------------------------------------------------------------------------------------------------------------


def test_channels_last_stays_so_and_an_unchanged_model_reads_zero(pretrained, tmp_path):
    def channels_last(unet):
        return unet.to(memory_format=torch.channels_last)

    loop, reports = watched(pretrained, tmp_path / "zero", adapt=channels_last, lr=0.0)
    weight = loop.bare.get_parameter("conv_in.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    for finding in reports[-1].findings:
        assert not any(
            value.samples.any() for name, value in finding.signals.maps().items() if name in SNAPSHOT_MAPS
        ), finding.name
    assert_untouched(pretrained, tmp_path / "kept", adapt=channels_last)


def test_sliced_attention_stays_and_gives_the_same_maps(pretrained, tmp_path):
    def sliced(unet):
        unet.set_attention_slice(1)
        return unet

    loop = assert_untouched(pretrained, tmp_path / "sliced", adapt=sliced)
    assert all(isinstance(processor, SlicedAttnProcessor) for processor in loop.bare.attn_processors.values())
    watched(pretrained, tmp_path / "plain", steps=0)
    for name, value in maps(tmp_path / "plain", 0).items():
        torch.testing.assert_close(value, maps(tmp_path / "sliced", 0)[name], rtol=1e-3, atol=1e-4, msg=name)


# --- what else is trained, or averaged --------------------------------------------------------------------------------------------------


def test_an_average_of_the_adapters_alone_is_watched_too(pretrained, tmp_path):
    from diffusers.training_utils import EMAModel

    loop = Loop(pretrained, tmp_path, lora=True, lr=3e-2)
    loop.ema = EMAModel([p for p in loop.bare.parameters() if p.requires_grad], decay=0.9)
    watch = loop.watch(loaded(pretrained), weights="ema", config=SMALL)
    watch.begin()
    average, loop.ema = loop.ema, None
    unmoved = loop.run(watch, 2)[-1]
    assert not any(f.signals.collapse.samples.any() for f in unmoved.findings)
    average.step([p for p in loop.bare.parameters() if p.requires_grad])
    moved = loop.run(watch, 4)[-1]
    assert all(f.signals.collapse.samples.any() for f in moved.findings)


def test_a_prepared_text_encoder_with_adapters_is_asked_afresh_in_float32_and_given_back(pretrained, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import CLIPTextModel

    text_encoder = CLIPTextModel.from_pretrained(pretrained, subfolder="text_encoder").requires_grad_(False).train()
    inject_adapter_in_model(LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]), text_encoder)
    loop = Loop(pretrained, tmp_path, precision="bf16", lr=0.0)  # the UNet stands still
    text_encoder = loop.accelerator.prepare(text_encoder)
    trained = [p for p in text_encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=10.0)
    forward, wrapped = text_encoder.forward, text_encoder(torch.ones(1, TOKENS, dtype=torch.long))[0].dtype
    watch = loop.watch(loaded(pretrained), text_encoder=text_encoder, config=SMALL)
    watch.begin()
    still = watch.on_step_end(2)
    for _ in range(2):
        text_encoder(torch.ones(1, TOKENS, dtype=torch.long))[0].float().square().sum().backward()
        optimizer.step()
    moved = watch.on_step_end(4)
    assert not still.findings[0].signals.collapse.samples.any()
    assert moved.findings[0].signals.collapse.samples.any()
    assert text_encoder.forward == forward
    assert text_encoder(torch.ones(1, TOKENS, dtype=torch.long))[0].dtype is wrapped
    assert all(module.training for module in text_encoder.modules())
    assert all(p.grad is not None for p in trained)
