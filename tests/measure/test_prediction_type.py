"""Whether an output is read as it is meant: told by reference probes, said once, and nothing is judged before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from photographs import UNSEEN
from support.builders import CONFIG, Loop, picture

from memwatch import Probe
from memwatch.config import LevelsConfig
from memwatch.denoiser import Components, Conditioning, StableDiffusion, load_components
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.images import encode_images
from memwatch.measure.measure import Batches, run_forward
from memwatch.measure.measurement import Observation
from memwatch.measure.prediction_type import PredictionTypeCheck, unexplained
from memwatch.measure.prepare import PreparedProbe
from memwatch.measure.views import reference_view

TINY_SD = Path(__file__).resolve().parents[2] / "train_examples" / "assets" / "tiny-sd"
TYPES = ("epsilon", "v_prediction")
SHIPPED = LevelsConfig().timesteps


class AsV(torch.nn.Module):
    """What a network says as epsilon, said as v."""

    def __init__(self, network: torch.nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.network, self.schedule, self.config = network, schedule, network.config

    def forward(self, x, timesteps, **options):
        alpha, sigma = self.schedule.alpha_sigma(timesteps, x)
        return ((self.network(x, timesteps, **options)[0] - sigma * x) / alpha,)


@dataclass
class Tiny:
    """tiny-sd, a network of its shape that was never trained, and its pictures."""

    parts: Components
    network: torch.nn.Module
    untrained: torch.nn.Module

    def prepared(self, kind: str) -> list[PreparedProbe]:
        pictures = {
            "new": [np.asarray(p.image().resize((64, 64))) for p in UNSEEN[:4]],
            "flat": [np.full((64, 64, 3), grey, np.uint8) for grey in (0, 128, 255)],
            "noise": [np.asarray(picture(seed, 64)) for seed in range(3)],
        }[kind]
        denoiser = StableDiffusion(self.network, self.schedule("epsilon"))
        said: Conditioning = denoiser.encode("a photo", self.parts, 64)
        latents = encode_images(pictures, self.parts.vae)
        return [PreparedProbe(Probe("", "x", name=f"{i}"), said, None, z) for i, z in enumerate(latents)]

    def schedule(self, reading: str) -> NoiseSchedule:
        return NoiseSchedule.from_scheduler(self.parts.scheduler, reading)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    pytest.importorskip("transformers", "5")  # tiny-sd has a tokenizer of today; the examples need newer versions, too
    names, device = StableDiffusion.text_encoders, torch.device("cpu")
    parts = load_components(TINY_SD, Components(None), needs_vae=True, text_encoders=names, device=device)
    network = UNet2DConditionModel.from_pretrained(TINY_SD, subfolder="unet").float().eval()
    torch.manual_seed(0)
    return Tiny(parts, network, UNet2DConditionModel.from_config(network.config).eval())


Looked = tuple[NoiseSchedule, list[Observation], dict[str, torch.Tensor]]


def looked(network, schedule: NoiseSchedule, prepared: list[PreparedProbe], levels=SHIPPED) -> Looked:
    """What an event sees of these pictures, forward only."""
    denoiser, observations = StableDiffusion(network, schedule), []
    for p in prepared:
        view = reference_view(p, denoiser, LevelsConfig(timesteps=levels, draws=2), 0)
        now, _ = run_forward(denoiser, view, None, Batches(8))
        observations.append(Observation(p.probe, view.timesteps, now, eps=view.eps))
    return schedule, observations, {p.name: p.latents for p in prepared}


@pytest.mark.parametrize("kind", ["new", "flat", "noise"])
@pytest.mark.parametrize("meant", TYPES)
def test_a_trained_network_is_told(meant, kind, tiny):
    other = next(reading for reading in TYPES if reading != meant)
    network = tiny.network if meant == "epsilon" else AsV(tiny.network, tiny.schedule("epsilon"))
    for declared in TYPES:
        seen = looked(network, tiny.schedule(declared), tiny.prepared(kind))
        left = unexplained(*seen)
        assert left[meant] < 0.5
        assert left[other] > 2 * left[meant]
        reading = PredictionTypeCheck(seen[0], "sd")
        why = reading.contradiction(*seen[1:])
        assert reading.settled is (declared == meant)
        assert (why is None) is (declared == meant)
        assert why is None or f"read as {other}, by the scheduler of sd, but it denoises as {meant}" in why


@pytest.mark.parametrize("kind", ["new", "flat"])
def test_an_untrained_network_contradicts_nothing(kind, tiny):
    for declared in TYPES:
        seen = looked(tiny.untrained, tiny.schedule(declared), tiny.prepared(kind))
        reading = PredictionTypeCheck(seen[0], None)
        assert reading.contradiction(*seen[1:]) is None
        assert not reading.settled  # it is asked again at the next event
        assert min(unexplained(*seen).values()) > 0.99


def test_where_it_cannot_be_told(tiny):
    network, prepared = AsV(tiny.network, tiny.schedule("epsilon")), tiny.prepared("new")
    schedule, observations, latents = looked(network, tiny.schedule("epsilon"), prepared)
    assert unexplained(schedule, observations, {}) is None  # prompts alone
    assert unexplained(tiny.schedule("sample"), observations, latents) is None


class Knowing(UNet2DConditionModel):
    """Knows the one picture, and says its noise as ``means`` has it."""

    def forward(self, x, timesteps, *args, **options):
        alpha, sigma = self.schedule.alpha_sigma(timesteps, x)
        eps = (x - alpha * self.z_0) / sigma
        said = eps if self.means == "epsilon" else alpha * eps - sigma * self.z_0
        found = super().forward(x, timesteps, *args, **options)
        if isinstance(found, tuple):
            return (said + 0.1 * found[0],)
        found.sample = said + 0.1 * found.sample
        return found


def knowing_loop(pretrained, pipeline, folder: Path, means: str) -> Loop:
    def adapt(unet):
        unet.__class__ = Knowing
        unet.z_0 = encode_images([np.asarray(picture(0))], pipeline.vae)[0]
        unet.schedule, unet.means = NoiseSchedule.from_scheduler(pipeline.scheduler), means
        return unet

    return Loop(pretrained, folder, adapt=adapt)


SETTINGS = CONFIG | {"levels": {"timesteps": [301, 501], "draws": 2}}


def test_nothing_is_judged_before_it_is_settled(pretrained, pipeline, tmp_path, capsys):
    loop = knowing_loop(pretrained, pipeline, tmp_path, "v_prediction")
    watch = loop.watch(pipeline, config=SETTINGS)
    for report in (watch.begin(), *loop.run(watch, 2)):
        assert "read as epsilon, by the scheduler of the pipeline, but it denoises as v_prediction" in report.failure
        assert "Pass the scheduler that it trains with (scheduler=noise_scheduler)" in report.failure
        assert not report.findings
        assert not report.judgement.states
        assert report.errors == 0
    assert watch.baselines.ledger.steps == []
    assert watch.baselines.weights.steps == []
    loop.bare.means = "epsilon"
    third, fourth = loop.run(watch, 6)
    assert third.failure is None
    assert watch.baselines.ledger.steps == [4]
    assert {f.observation.baseline_step for f in third.findings} == {None}
    assert {f.observation.baseline_step for f in fourth.findings} == {4}
    assert "prediction_type" in capsys.readouterr().out


def test_the_loops_scheduler_settles_it(pretrained, pipeline, tmp_path):
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    loop = knowing_loop(pretrained, pipeline, tmp_path, "v_prediction")
    report = loop.watch(pipeline, config=SETTINGS, scheduler=scheduler).begin()
    assert report.failure is None
    assert report.findings
    loop.bare.means = "epsilon"  # a base that is to learn v
    said = loop.watch(pipeline, config=SETTINGS, scheduler=scheduler, output_dir=str(tmp_path / "other")).begin()
    assert "the scheduler that was passed says v_prediction, but the model still denoises as epsilon" in said.failure
    assert "--prediction_type" in said.failure
