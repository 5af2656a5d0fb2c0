"""Training is untouched: with and without memwatch it is bit-identical, however the model is trained."""

from __future__ import annotations

import logging

import pytest
import torch
from support.builders import CONFIG, EAGER, SMALL, Loop, assert_same, history, maps, picture
from support.families import TOKENS

from memwatch import Probe

KINDS = {
    "full-ema": {"ema": True},
    "full-checkpointing-bf16": {"ema": True, "checkpointing": True, "precision": "bf16"},
    "lora-checkpointing-bf16-accumulation": {
        "lora": True,
        "checkpointing": True,
        "precision": "bf16",
        "accumulation": 2,
    },
}


def states(loop: Loop, watch, steps: int = 3) -> list:
    """Everything a monitor could disturb, after every step."""
    seen = []
    loop.run(watch, steps, each=lambda running: seen.append(running.state()))
    return seen


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_training_is_bit_identical_with_and_without(kind, pretrained, images, tmp_path):
    """With everything that an event can hold: peers, alerts, and the generations of their proof."""
    without = states(Loop(pretrained, **kind), None)
    loop = Loop(pretrained, tmp_path, **kind)
    before = loop.identities()
    peers = [Probe("a tree", picture(40), name="tree")]
    watch = loop.watch(pretrained, controls=images, peers=peers, **EAGER, stop={"enabled": False})
    with_watch = states(loop, watch)
    first, second = history(tmp_path)
    assert (first["step"], second["step"]) == (0, 2)
    assert [f["copied"]["generations"] for f in second["findings"]] == [4, 2]
    gradients = with_watch[1]["grad"].values()  # they lay there during the event
    assert any(grad is not None and grad.abs().sum() > 0 for grad in gradients)
    assert_same(without, with_watch)
    after = loop.identities()
    assert after["forward"] == before["forward"]
    assert after["processors"] == before["processors"]
    assert after["hooks"] == before["hooks"]
    assert after["parameters"] == before["parameters"]


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
            live = loop.optimizer.param_groups[0]["params"][0]
            swapped_in.append(live.data_ptr() != pointer)
            raise RuntimeError("partial use")
        return result

    monkeypatch.setattr(watch.observer, "measure", failing)
    before = loop.identities()
    with caplog.at_level(logging.WARNING, "memwatch"):
        with_watch = states(loop, watch)
    assert len(calls) == call  # raised, and was not tried again before the next event
    assert swapped_in == [call == 9]
    assert sum("partial use" in message for message in caplog.messages) == 1
    assert_same(without, with_watch)
    assert loop.identities()["forward"] == before["forward"]


def test_works_under_no_grad_and_inside_an_autocast(pretrained, pipeline, tmp_path):
    """The values are the same wherever it is called from, and so is the surrounding mode afterwards."""
    found = []
    for name, context in {
        "plain": torch.enable_grad(),
        "none": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }.items():
        loop = Loop(pretrained, tmp_path / name)
        watch = loop.watch(pipeline, [Probe("a cat", picture(0), name="cat")], config=CONFIG)
        with context:
            mode = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            watch.begin()
            assert mode == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        found.append(maps(tmp_path / name, 0))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def sliced(unet):
    unet.set_attention_slice(1)
    return unet


@pytest.mark.parametrize(
    "kind",
    [
        {"adapt": lambda unet: unet.to(memory_format=torch.channels_last)},
        {"adapt": sliced},
        {"lora": True, "dtype": torch.bfloat16, "precision": "bf16"},
        {"lora": True, "dtype": torch.float16},
    ],
    ids=["channels-last", "sliced-attention", "float32-adapters-on-bfloat16", "float32-adapters-on-float16"],
)
def test_formats_stay_as_they_are(kind, pretrained, pipeline, tmp_path):
    bare = Loop(pretrained, **kind)
    bare.run(None, 3)
    state = bare.state()
    loop = Loop(pretrained, tmp_path, **kind)
    before = loop.identities()
    loop.run(loop.watch(pipeline, config=SMALL), 3)
    assert_same(state, loop.state())
    after = loop.identities()
    assert [after[name] for name in ("processors", "forward")] == [before[name] for name in ("processors", "forward")]
    for (name, p), q in zip(loop.bare.named_parameters(), bare.bare.parameters(), strict=True):
        assert (p.dtype, p.stride()) == (q.dtype, q.stride()), name


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
    alone = Counting()
    bare = Loop(pretrained, adapt=getattr(alone, how), lora=True)
    bare.run(None, 2)
    assert alone.graphs > 0

    torch._dynamo.reset()
    beside = Counting()
    loop = Loop(pretrained, tmp_path / how, adapt=getattr(beside, how), lora=True)
    watch = loop.watch(pipeline, config=SMALL, every_steps=1)
    assert [report.step for report in loop.run(watch, 2)] == [1, 2]  # training goes on after an event
    assert beside.graphs == alone.graphs
    assert_same(bare.state(), loop.state())

    torch._dynamo.reset()
    eager = Loop(pretrained, tmp_path / "eager", lora=True)
    eager.watch(pipeline, config=SMALL).begin()
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
    forward, wrapped = text_encoder.forward, text_encoder(torch.ones(1, TOKENS, dtype=torch.long))[0].dtype
    watch = loop.watch(pipeline, text_encoder=text_encoder, config=SMALL)
    watch.begin()
    still = watch.on_step_end(2)
    for _ in range(2):
        text_encoder(torch.ones(1, TOKENS, dtype=torch.long))[0].float().square().sum().backward()
        optimizer.step()
    moved = watch.on_step_end(4)
    assert not still.findings[0].signals.snapshot.collapse.samples.any()
    assert moved.findings[0].signals.snapshot.collapse.samples.any()
    assert text_encoder.forward == forward
    assert text_encoder(torch.ones(1, TOKENS, dtype=torch.long))[0].dtype is wrapped
    assert all(module.training for module in text_encoder.modules())
    assert all(p.grad is not None for p in trained)
