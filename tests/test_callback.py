"""Training is untouched, a model compared with itself reads zero, stops stop, resume equals never stopped, baselines are the right ones."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from support.builders import CONFIG, SNAPSHOT_MAPS, Loop, assert_same, history, maps, picture, probes_of_both_kinds
from torch.utils.data import DataLoader

import memwatch.callback
from memwatch import Probe
from memwatch.config import ConfigError
from memwatch.judge.alerts import StopState, Verdict
from memwatch.measure.snapshots import trainable

KINDS = [
    pytest.param({"ema": True}, id="full-ema"),
    pytest.param({"lora": True}, id="lora"),
    pytest.param({"ema": True, "checkpointing": True, "precision": "bf16"}, id="full-checkpointing-bf16"),
    pytest.param(
        {"lora": True, "checkpointing": True, "precision": "bf16", "accumulation": 2},
        id="lora-checkpointing-bf16-accumulation",
    ),
]


def states(loop: Loop, watch, steps: int = 3) -> list:
    """Everything a monitor could disturb, after every step."""
    seen = []
    loop.run(watch, steps, each=lambda running: seen.append(running.state()))
    return seen


# --- 1. training is untouched ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_with_and_without(kind, pretrained, images, tmp_path):
    without = states(Loop(pretrained, **kind), None)
    loop = Loop(pretrained, tmp_path, **kind)
    before = loop.identities()
    watch = loop.watch(pretrained, controls=images)
    with_watch = states(loop, watch)
    assert [row["step"] for row in history(tmp_path)] == [0, 2]
    assert any(
        grad is not None and grad.abs().sum() > 0 for grad in with_watch[1]["grad"].values()
    )  # gradients lay there during the event
    assert_same(without, with_watch)
    after = loop.identities()
    assert after["forward"] == before["forward"]
    assert after["processors"] == before["processors"]
    assert after["hooks"] == before["hooks"]
    assert [(i, pointer) for i, pointer, _ in after["parameters"]] == [
        (i, pointer) for i, pointer, _ in before["parameters"]
    ]


@pytest.mark.parametrize(
    ("kind", "call"), [(KINDS[0].values[0], 6), (KINDS[1].values[0], 9), (KINDS[2].values[0], 9)]
)  # 1 to 4: first event
def test_training_is_bit_identical_after_an_event_that_raised(
    kind, call, pretrained, pipeline, tmp_path, monkeypatch, caplog
):
    without = states(Loop(pretrained, **kind), None)
    real, calls, swapped_in = memwatch.callback.measure, [], []
    loop = Loop(pretrained, tmp_path, **kind)

    def failing(denoiser, views, *rest):
        calls.append(len(views))
        result = real(denoiser, views, *rest)
        if len(calls) == call:
            torch.rand(7)
            torch.set_grad_enabled(False)
            live = loop.optimizer.param_groups[0]["params"][0]
            swapped_in.append(live.data_ptr() != pointer)
            raise RuntimeError("partial use")
        return result

    monkeypatch.setattr(memwatch.callback, "measure", failing)
    watch = loop.watch(pipeline)
    pointer = loop.optimizer.param_groups[0]["params"][0].data_ptr()
    before = loop.identities()
    with caplog.at_level(logging.WARNING, "memwatch"):
        with_watch = states(loop, watch)
    assert len(calls) == call  # raised, and was not tried again
    assert swapped_in == [call == 9]
    assert sum("partial use" in message for message in caplog.messages) == 1
    assert_same(without, with_watch)
    assert loop.identities()["forward"] == before["forward"]


def test_strict_raises_what_would_only_switch_off(pretrained, pipeline, tmp_path, monkeypatch):
    def failing(*args):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(memwatch.callback, "measure", failing)
    loop = Loop(pretrained, tmp_path)
    with pytest.raises(RuntimeError, match=r"looking at the model failed.*broken on purpose"):
        loop.run(loop.watch(pipeline, strict=True), 2)


def test_works_under_no_grad_and_inside_an_autocast(pretrained, pipeline, tmp_path):
    """The values are the same wherever it is called from, and so is the surrounding mode afterwards."""
    found = []
    for name, context in {
        "plain": torch.enable_grad(),
        "none": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }.items():
        loop = Loop(pretrained, tmp_path / name)
        watch = loop.watch(pipeline, [Probe("a cat", picture(0), name="cat")])
        with context:
            mode = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            watch.begin()
            assert mode == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        found.append(maps(tmp_path / name, 0))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_a_trained_text_encoder_is_asked_afresh_and_given_back(pretrained, pipeline, tmp_path):
    from transformers import CLIPTextModel

    text_encoder = CLIPTextModel.from_pretrained(pretrained, subfolder="text_encoder").train()
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, text_encoder=text_encoder)
    first = watch.begin()
    with torch.no_grad():
        for parameter in text_encoder.parameters():
            parameter.mul_(1.5)
    second = watch.on_step_end(2)  # the UNet has not moved: only the conditioning has
    assert float(second.findings[0].signals.collapse.mean.abs().max()) > 0
    assert torch.isfinite(first.findings[0].signals.raw.mean).all()
    assert all(module.training for module in text_encoder.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in text_encoder.parameters())


# --- 2. a model compared with itself reads zero -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "baseline"),
    [({"ema": True}, "first"), ({"lora": True, "checkpointing": True, "precision": "bf16"}, "previous")],
)
def test_unchanged_weights_read_exactly_zero(kind, baseline, pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path, **kind, lr=0.0)
    reports = loop.run(loop.watch(pipeline, controls=images, signals={"baseline": baseline}), 4)
    assert [report.step for report in reports] == [2, 4]
    for report in reports:
        for finding in report.findings:
            found = {name: value for name, value in finding.signals.maps().items() if name in SNAPSHOT_MAPS}
            assert found.keys() == set(SNAPSHOT_MAPS[: 4 if finding.is_reference else 3])
            for name, value in found.items():
                assert not value.samples.any(), (finding.name, name)
                assert not value.sem.any(), (finding.name, name)
            assert finding.verdict is Verdict.NO_EVIDENCE
            assert finding.severity == 1.0
            assert not finding.regions
            assert float(finding.signals.raw.mean.abs().max()) > 0
        assert set(report.controls.values()) == {0.0}
        assert not report.alerts


def test_changed_weights_do_not_read_zero(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    report = loop.run(loop.watch(pipeline), 2)[-1]
    for finding in report.findings:
        assert float(finding.signals.collapse.mean.abs().max()) > 0, finding.name


# --- 3. stopping ------------------------------------------------------------------------------------------------------------------------

EAGER = {
    "regions": {"min_factor": 1.0001, "min_area": 0.0},
    "alerts": {"max_p": 1.0, "min_severity": 1.0001, "uncalibrated_severity": 1.0001, "patience": 1},
    "stop": {"max_p": 1.0, "min_severity": 1.0001},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("decided", ["by-config", "by-patch"])
def test_a_stop_ends_training_without_another_optimizer_step(
    decided, accumulation, pretrained, pipeline, images, tmp_path, monkeypatch
):
    loop = Loop(pretrained, tmp_path, accumulation=accumulation, lr=3e-2)
    overrides = EAGER
    if decided == "by-patch":
        overrides = {}
        monkeypatch.setattr(
            memwatch.callback,
            "decide_stop",
            lambda state, verdicts, step, rule: StopState(1, "enough") if step >= 2 else state,
        )
    watch = loop.watch(pipeline, controls=images, **overrides)
    optimizer_steps, at_event = [], []
    real_step = loop.optimizer.optimizer.step
    loop.optimizer.optimizer.step = lambda *args, **kwargs: (
        optimizer_steps.append(loop.step),
        real_step(*args, **kwargs),
    )[1]
    reports = loop.run(watch, 20, each=lambda running: at_event.append(trainable(running.bare)))
    assert watch.should_stop
    assert reports[-1].stop_reason == watch.stop_reason
    assert reports[-1].stop_reason is not None
    assert [r.stop_reason for r in reports[:-1]] == [None] * (len(reports) - 1)
    assert loop.step == reports[-1].step == len(optimizer_steps) < 20
    if decided == "by-patch":
        assert loop.step == 2
        assert watch.stop_reason == "enough"
    assert_same(at_event[-1], trainable(loop.bare))
    assert list(watch.guard(loop.loader)) == []  # another epoch would have no batches
    assert history(tmp_path)[-1]["stop_reason"] == watch.stop_reason
    assert history(tmp_path)[-1]["scalars"]["memwatch/stop"] == 1


def test_a_stop_is_never_taken_back(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path, lr=0.0)
    watch = loop.watch(pipeline)
    watch.begin()
    assert (watch.should_stop, watch.stop_reason) == (False, None)
    with monkeypatch.context() as patch:
        patch.setattr(memwatch.callback, "decide_stop", lambda *args: StopState(1, "enough"))
        watch.on_step_end(2)
    report = watch.on_step_end(4)  # the real rule again, and nothing to see
    assert report.findings[0].verdict is Verdict.NO_EVIDENCE
    assert (watch.should_stop, watch.stop_reason, report.stop_reason) == (True, "enough", "enough")


def test_a_disabled_stop_never_stops(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    watch = loop.watch(pipeline, controls=images, **EAGER | {"stop": {"enabled": False}})
    reports = loop.run(watch, 4)
    assert any(f.verdict is Verdict.MEMORIZED for r in reports for f in r.findings)
    assert not watch.should_stop


def test_the_guard_is_the_dataloader_in_every_other_respect(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    guarded = watch.guard(loop.loader)
    assert len(guarded) == len(loop.loader) == 4
    assert isinstance(guarded, DataLoader)
    assert guarded.dataset is loop.loader.dataset
    assert guarded.batch_sampler is loop.loader.batch_sampler
    assert guarded.total_batch_size == loop.loader.total_batch_size
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = guarded.no_such_thing
    assert not (tmp_path / "memwatch" / "history.jsonl").exists()  # the baseline waits for the first batch
    assert len(list(guarded)) == 4
    assert [row["step"] for row in history(tmp_path)] == [0]
    assert len(list(guarded)) == 4
    assert len(history(tmp_path)) == 1


def test_begin_happens_once_and_events_are_due_every_so_many_steps(pretrained, pipeline, tmp_path, caplog):
    loop = Loop(pretrained, tmp_path, lr=0.0)
    watch = loop.watch(pipeline, every_steps=3)
    assert watch.begin().step == 0
    assert watch.begin() is None
    assert [watch.on_step_end(step) is not None for step in (1, 2, 3, 3, 4, 6)] == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    late = Loop(pretrained, tmp_path / "late").watch(pipeline)
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert late.on_step_end(1).step == 1
    assert any("first baseline only now" in message for message in caplog.messages)


def test_end_training_closes_and_closing_twice_is_fine(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    loop.run(watch, 2)
    closed = []
    watch._sinks[0].close = lambda: closed.append(True)
    loop.accelerator.end_training()
    watch.close()
    watch.close()
    assert closed == [True]
    assert watch.on_step_end(4) is None
    assert [row["step"] for row in history(tmp_path)] == [0, 2]


def test_end_training_closes_when_trackers_are_initialized_later(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    loop.accelerator.init_trackers("late")  # makes a new list of trackers
    loop.run(watch, 2)
    loop.accelerator.end_training()
    assert watch._closed


# --- 4. resume --------------------------------------------------------------------------------------------------------------------------


def comparable(rows: list[dict]) -> list[dict]:
    """History without what time it took."""
    rows = json.loads(json.dumps(rows))
    for row in rows:
        del row["seconds"], row["scalars"]["memwatch/seconds"]
    return rows


@pytest.mark.parametrize(
    ("kind", "baseline"),
    [
        ({"ema": True}, "previous"),
        ({"lora": True, "checkpointing": True, "precision": "bf16"}, "lag:2"),
        ({"lora": True}, "last_clean"),
    ],
)
def test_resume_equals_never_stopped(kind, baseline, pretrained, pipeline, tmp_path):
    overrides = {
        "controls": [Probe("a dog", picture(5))],
        "signals": {"baseline": baseline, "decide": "both"},
        **EAGER,
        "stop": {"enabled": False},
    }
    whole = Loop(pretrained, tmp_path / "whole", **kind)
    whole.run(whole.watch(pipeline, **overrides), 6)

    killed = Loop(pretrained, tmp_path / "broken", **kind)
    watch = killed.watch(pipeline, **overrides)
    killed.run(watch, 4, epochs=2)
    killed.accelerator.save_state(str(tmp_path / "checkpoint"))
    killed.run(watch, 6)
    assert [row["step"] for row in history(tmp_path / "broken")] == [0, 2, 4, 6]

    resumed = Loop(pretrained, tmp_path / "broken", **kind)
    watch = resumed.watch(pipeline, **overrides)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    resumed.step = 4
    assert [row["step"] for row in history(tmp_path / "broken")] == [0, 2, 4]  # the later event is rewound
    assert watch._ledger.steps == watch._weights.steps == [0, 2, 4]
    resumed.run(watch, 6)

    assert_same(whole.state(), resumed.state())
    assert_same(comparable(history(tmp_path / "whole")), comparable(history(tmp_path / "broken")))
    for step in (0, 2, 4, 6):
        assert_same(maps(tmp_path / "whole", step), maps(tmp_path / "broken", step))
    assert any(
        finding["since"] is not None for row in history(tmp_path / "whole") for finding in row["findings"]
    )  # state to be lost


def test_resume_keeps_the_stop(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline)
    monkeypatch.setattr(memwatch.callback, "decide_stop", lambda *args: StopState(1, "enough"))
    loop.run(watch, 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    monkeypatch.undo()
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline)
    again.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert watch.stop_reason == "enough"
    assert list(watch.guard(again.loader)) == []


def test_resume_says_which_baselines_are_gone(pretrained, pipeline, tmp_path, caplog):
    loop = Loop(pretrained, tmp_path)
    loop.run(loop.watch(pipeline), 2)
    loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    (tmp_path / "memwatch" / "snapshots" / "step_0000000.safetensors").unlink()
    again = Loop(pretrained, tmp_path)
    watch = again.watch(pipeline)
    with caplog.at_level(logging.WARNING, "memwatch"):
        again.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert any("baselines are missing" in message for message in caplog.messages)
    again.step = 2
    report = again.run(watch, 4)[-1]
    assert {f.name: f.baseline_step for f in report.findings} == {"cat": 0, "poster": 2}


# --- 5. baselines -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("first", [None, 0, 0, 0, 0]),
        ("previous", [None, 0, 2, 4, 6]),
        ("lag:2", [None, 0, 0, 2, 4]),
        ("last_clean", [None, 0, 2, 4, 6]),
    ],
)
def test_baseline_steps(baseline, expected, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    loop.run(loop.watch(pipeline, signals={"baseline": baseline}, alerts={"min_severity": 1e6}), 8)
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    for index, name in enumerate(("cat", "poster")):
        assert [row["findings"][index]["name"] for row in rows] == [name] * 5
        assert [row["findings"][index]["baseline_step"] for row in rows] == expected
        for row in rows[1:]:
            value = maps(tmp_path, row["step"])[f"{name}/log_ratio"]
            assert value.isfinite().all()
            assert value.any()


def test_last_clean_stays_where_suspicion_began(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    watch = loop.watch(pipeline, signals={"baseline": "last_clean"}, alerts={"min_severity": 1e6})
    loop.run(watch, 4)
    for name, state in watch._states.items():  # as if suspicion had begun at step 4
        watch._states[name] = type(state)(streak=1, since=4, last_clean=2, verdict=Verdict.SUSPICIOUS)
    assert {f.baseline_step for f in loop.run(watch, 6)[-1].findings} == {2}


@pytest.mark.parametrize("kind", [{"lora": True}, {"lora": True, "checkpointing": True, "precision": "bf16"}])
def test_lora_off_is_the_model_before_training(kind, pretrained, pipeline, tmp_path):
    found = {}
    for baseline in ("first", "base"):
        loop = Loop(pretrained, tmp_path / baseline, **kind, lr=5e-2)
        reports = loop.run(loop.watch(pipeline, signals={"baseline": baseline}), 4)
        found[baseline] = maps(tmp_path / baseline, 4)
        expected = 0 if baseline == "first" else None
        assert [f.baseline_step for f in reports[-1].findings] == [expected] * 2
    assert found["first"].keys() == found["base"].keys()
    assert found["first"]["cat/collapse"].any()
    for name, value in found["first"].items():
        torch.testing.assert_close(value, found["base"][name], rtol=1e-4, atol=1e-5, msg=name)


def test_base_without_lora_is_refused_clearly(pretrained, pipeline, tmp_path):
    with pytest.raises(ConfigError, match=r"signals.baseline.*'base'.*no LoRA layers"):
        Loop(pretrained, tmp_path).watch(pipeline, signals={"baseline": "base"})


def test_a_path_that_is_not_there_is_refused_clearly(pretrained, pipeline, tmp_path):
    with pytest.raises(ConfigError, match=r"signals.baseline.*nowhere.safetensors.*existing"):
        Loop(pretrained, tmp_path).watch(pipeline, signals={"baseline": "path:nowhere.safetensors"})


def test_an_average_of_another_model_is_refused_clearly(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    loop.ema = EMAModel([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ConfigError, match=r"'weights'.*'ema'.*averages 1 tensors"):
        loop.watch(pipeline, weights="ema")


@pytest.mark.parametrize("kind", [{}, {"lora": True}])
def test_weights_from_a_file_are_the_model_they_came_from(kind, pretrained, pipeline, tmp_path):
    path = tmp_path / "before.safetensors"
    save_file(trainable(Loop(pretrained, **kind).bare), path)
    found = {}
    for name, baseline in {"first": "first", "path": f"path:{path}"}.items():
        loop = Loop(pretrained, tmp_path / name, **kind)
        reports = loop.run(loop.watch(pipeline, signals={"baseline": baseline}), 4)
        found[name] = maps(tmp_path / name, 4)
    assert {f.baseline_step for f in reports[-1].findings} == {None}
    assert found["first"]["poster/collapse"].any()
    for name, value in found["first"].items():
        torch.testing.assert_close(value, found["path"][name], rtol=1e-4, atol=1e-5, msg=name)


def test_ema_weights_are_watched_instead_of_the_live_ones(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, ema=True, lr=3e-2)
    watch = loop.watch(pipeline, weights="ema")
    watch.begin()
    average = loop.ema
    loop.ema = None  # live weights move on, the average stays
    report = loop.run(watch, 2)[-1]
    assert not any(
        value.samples.any() for f in report.findings for key, value in f.signals.maps().items() if key in SNAPSHOT_MAPS
    )
    loop.ema = average
    loop.ema.step(loop.bare.parameters())
    report = loop.run(watch, 4)[-1]
    assert all(f.signals.collapse.samples.any() for f in report.findings)


def test_ema_needs_an_ema(pretrained, pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"weights.*ema"):
        Loop(pretrained, tmp_path).watch(pipeline, weights="ema")


def test_several_probes_of_both_kinds_keep_their_order(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path)
    probes = [probes_of_both_kinds()[1], "a blue sign", *probes_of_both_kinds()[:1]]
    report = loop.watch(pipeline, probes, controls=images, config=CONFIG).begin()
    assert [(f.name, f.is_reference) for f in report.findings] == [
        ("poster", False),
        ("a-blue-sign", False),
        ("cat", True),
    ]
    assert all(f.image.shape == (16, 16, 3) for f in report.findings)
    assert all(f.verdict is Verdict.INCONCLUSIVE for f in report.findings)
