"""Training is untouched: with and without memwatch it is bit-identical, however the model is trained."""

from __future__ import annotations

import logging

import pytest
import torch
from support import builders
from support.builders import SMALL, Loop, assert_same, history, maps, picture
from support.families import TOKENS

from memwatch import MemWatchConfig, Probe

CAT = [Probe("a cat", picture(0), name="cat")]
ROWS = [Probe(f"row {i}", picture(20 + i), name=f"row{i}", row=i, in_rotation=True) for i in range(5)]


def sliced(unet):
    unet.set_attention_slice(1)
    return unet


ROTATING = {"probes": [*builders.probes_of_both_kinds(), *ROWS], "rotation": {"per_event": 2}}
KINDS = {  # how the model is trained, and what the watch is told
    "full-ema": ({"ema": True}, {}),
    "full-checkpointing-bf16": ({"ema": True, "checkpointing": True, "precision": "bf16"}, {}),
    "lora-checkpointing-bf16-accumulation": (
        {"lora": True, "checkpointing": True, "precision": "bf16", "accumulation": 2},
        {},
    ),
    "in-the-loop's-precision": ({"precision": "bf16"}, {"precision": "loop"}),
    "channels-last": ({"adapt": lambda unet: unet.to(memory_format=torch.channels_last)}, {}),
    "sliced-attention": ({"adapt": sliced}, {}),
    "float32-adapters-on-bfloat16": ({"lora": True, "dtype": torch.bfloat16, "precision": "bf16"}, {}),
    "float32-adapters-on-float16": ({"lora": True, "dtype": torch.float16}, {}),
    "full-screen-rotation": ({}, ROTATING),
    "lora-screen-rotation": ({"lora": True}, ROTATING),
}


def states(loop: Loop, watch, steps: int = 3) -> list:
    """Everything a monitor could disturb, after every step."""
    seen = []
    loop.run(watch, steps, each=lambda running: seen.append(running.state()))
    return seen


def formats(loop: Loop) -> list:
    return [(name, p.dtype, p.stride()) for name, p in loop.bare.named_parameters()]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_with_and_without(kind, pretrained, images, tmp_path, monkeypatch):
    """With everything that an event can hold: controls, alerts, and the generations of their proof."""
    made, overrides = KINDS[kind]
    if overrides is ROTATING:
        monkeypatch.setattr(MemWatchConfig, "screens", builders.SCREENS)
        builders.choose(monkeypatch, "cat", "poster", "row1", "row2")
    without = states(Loop(pretrained, **made), None)
    loop = Loop(pretrained, tmp_path, **made)
    before, formed = loop.identities(), formats(loop)
    watch = loop.watch(pretrained, controls=images, stop={"enabled": False}, **overrides)
    with_watch = states(loop, watch)
    first, second = history(tmp_path)
    assert (first["step"], second["step"]) == (0, 2)
    assert [f["copied"]["generations"] for f in second["findings"]][:2] == [4, 2]
    gradients = with_watch[1]["grad"].values()  # they lay there during the event
    assert any(grad is not None and grad.abs().sum() > 0 for grad in gradients)
    assert_same(without, with_watch)
    after = loop.identities()
    for name in ("forward", "processors", "hooks", "parameters"):
        assert after[name] == before[name], name
    assert formats(loop) == formed


@pytest.mark.parametrize(("kind", "call"), [({"ema": True}, 6), ({"lora": True}, 9)])  # 9: under earlier weights
def test_training_is_bit_identical_after_an_event_that_raised(
    kind, call, pretrained, pipeline, tmp_path, monkeypatch, caplog
):
    without = states(Loop(pretrained, **kind), None)
    loop = Loop(pretrained, tmp_path, **kind)
    watch = loop.watch(pipeline)
    real, calls, swapped_in = watch.observer.measure, [], []
    pointer = loop.optimizer.param_groups[0]["params"][0].data_ptr()

    def failing(view):
        calls.append(view.key)
        result = real(view)
        if len(calls) == call:
            torch.rand(7)
            torch.set_grad_enabled(False)
            swapped_in.append(loop.optimizer.param_groups[0]["params"][0].data_ptr() != pointer)
            raise RuntimeError("partial use")
        return result

    monkeypatch.setattr(watch.observer, "measure", failing)
    before = loop.identities()
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert_same(without, states(loop, watch))
    assert len(calls) == call  # raised, and was not tried again before the next event
    assert swapped_in == [call == 9]
    assert sum("partial use" in message for message in caplog.messages) == 1
    assert loop.identities()["forward"] == before["forward"]


def test_works_under_no_grad_and_inside_an_autocast(pretrained, pipeline, tmp_path):
    """The values are the same wherever it is called from, and so is the surrounding mode afterwards."""
    for context in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        folder = tmp_path / type(context).__name__
        watch = Loop(pretrained, folder).watch(pipeline, CAT)
        with context:
            mode = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            watch.begin()
            assert mode == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        assert_same(maps(tmp_path / "enable_grad", 0), maps(folder, 0))


@pytest.mark.usefixtures("screened")
def test_inside_an_autocast_of_the_loop_no_copy_without_gradient_is_left(pretrained, pipeline, tmp_path):
    """Forward-only looks would fill a shared cache of low-precision weights with copies that take no gradient."""
    loop = Loop(pretrained, tmp_path, precision="bf16")
    watch = loop.watch(pipeline, CAT, config=SMALL, precision="loop")
    with torch.autocast("cpu", torch.bfloat16):
        watch.begin()
        output = loop.bare(torch.ones(1, 4, 8, 8), torch.tensor(61), torch.ones(1, TOKENS, 16)).sample
        output.float().square().mean().backward()
    assert all(p.grad is not None for p in loop.bare.parameters())


def fits_only_when_checkpointed(unet):
    """A look, unlike training, runs out of memory unless activations are recomputed."""

    def check(module, args):
        if torch.is_grad_enabled() and not module.training and not module.down_blocks[1].gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    unet.register_forward_pre_hook(check)
    return unet


@pytest.mark.parametrize("lora", [False, True])
def test_a_look_that_does_not_fit_recomputes_its_activations(lora, pretrained, pipeline, tmp_path):
    bare = states(Loop(pretrained, lora=lora), None, 2)
    loop = Loop(pretrained, tmp_path / "short", lora=lora, adapt=fits_only_when_checkpointed)
    watch = loop.watch(pipeline, CAT, config=SMALL)
    assert_same(bare, states(loop, watch, 2))
    assert watch.observer.batches.with_gradients.spares
    plain = Loop(pretrained, tmp_path / "plain", lora=lora)
    plain.watch(pipeline, CAT, config=SMALL, curvature={"batch_size": 1}).begin()
    assert_same(maps(tmp_path / "plain", 0), maps(tmp_path / "short", 0))


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
        unet.up_blocks[1].compile(backend=self)
        return unet


@pytest.mark.filterwarnings("ignore")  # dynamo warns of what it traces
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_compiled_model_is_looked_at_eagerly_and_not_compiled_again(how, pretrained, pipeline, tmp_path):
    torch._dynamo.reset()
    alone, beside = Counting(), Counting()
    bare = Loop(pretrained, adapt=getattr(alone, how), lora=True)
    bare.run(None, 2)
    assert alone.graphs > 0

    torch._dynamo.reset()
    loop = Loop(pretrained, tmp_path / how, adapt=getattr(beside, how), lora=True)
    watch = loop.watch(pipeline, config=SMALL, every_steps=1)
    assert [report.step for report in loop.run(watch, 2)] == [1, 2]  # training goes on after an event
    assert beside.graphs == alone.graphs
    assert_same(bare.state(), loop.state())

    torch._dynamo.reset()
    Loop(pretrained, tmp_path / "eager", lora=True).watch(pipeline, config=SMALL).begin()
    assert_same(maps(tmp_path / "eager", 0), maps(tmp_path / how, 0))


def test_a_prepared_text_encoder_with_adapters_is_given_back(pretrained, pipeline, tmp_path):
    """It is asked afresh at every event, in float32, whatever accelerate has wrapped around it."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import CLIPTextModel

    text_encoder = CLIPTextModel.from_pretrained(pretrained, subfolder="text_encoder").requires_grad_(False).train()
    inject_adapter_in_model(LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]), text_encoder)
    loop = Loop(pretrained, tmp_path, precision="bf16", lr=0.0)  # the UNet stands still
    text_encoder = loop.accelerator.prepare(text_encoder)
    trained = [p for p in text_encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=10.0)

    def output():
        return text_encoder(torch.ones(1, TOKENS, dtype=torch.long))[0]

    forward, wrapped = text_encoder.forward, output().dtype
    watch = loop.watch(pipeline, text_encoder=text_encoder, config=SMALL)
    watch.begin()
    still = watch.on_step_end(2)
    for _ in range(2):
        output().float().square().sum().backward()
        optimizer.step()
    moved = watch.on_step_end(4)
    assert not still.findings[0].signals.snapshot.collapse.samples.any()
    assert moved.findings[0].signals.snapshot.collapse.samples.any()
    assert (text_encoder.forward, output().dtype) == (forward, wrapped)
    assert all(module.training for module in text_encoder.modules())
    assert all(p.grad is not None for p in trained)
