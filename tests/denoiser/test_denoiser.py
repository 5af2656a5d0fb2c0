"""Every family: epsilon and samples are its own pipeline's, products and diagonals are right, one law gives one map."""

from __future__ import annotations

import copy
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from support import families as tiny
from support.builders import assert_same
from support.families import PROMPT, adapted, size_of
from support.oracles import ALPHAS

from memwatch import Probe
from memwatch.config import CurvatureConfig, SamplingConfig
from memwatch.denoiser.flow import unpack
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.measure import measure
from memwatch.measure.prepare import PreparedProbe
from memwatch.measure.views import View, prompt_view

NAMES = ["sdxl", "sd3", "sd3-without-t5", "flux", "flux-schnell", "unconditional"]


def inputs(channels: int, t: int, b: int = 2, side: int = 8):
    return torch.randn(b, channels, side, side, generator=torch.Generator().manual_seed(5)), torch.full((b,), t)


@torch.no_grad()
def own_epsilon(name: str, pipe, x, t):
    """By the pipeline's own methods; nothing of memwatch."""
    b = len(x)
    if name == "unconditional":
        return pipe.unet(x, t).sample
    if name == "sdxl":
        hidden, _, pooled, _ = pipe.encode_prompt(PROMPT)
        ids = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, tiny.WIDTH)
        added = {"text_embeds": pooled.expand(b, -1), "time_ids": ids.expand(b, -1)}
        return pipe.unet(x, t, hidden.expand(b, -1, -1), added_cond_kwargs=added).sample
    sigma = t[0].item() / 1000
    if name.startswith("sd3"):
        hidden, _, pooled, _ = pipe.encode_prompt(PROMPT, PROMPT, PROMPT, max_sequence_length=77)
        v = pipe.transformer(x, hidden.expand(b, -1, -1), pooled.expand(b, -1), t).sample
    else:
        hidden, pooled, txt_ids = pipe.encode_prompt(PROMPT, max_sequence_length=512)
        packed = pipe._pack_latents(x, b, 4, 8, 8)
        guidance = torch.full((b,), 3.5) if name == "flux" else None
        img_ids = pipe._prepare_latent_image_ids(b, 4, 4, "cpu", torch.float32)
        v = pipe.transformer(
            packed, hidden.expand(b, -1, -1), pooled.expand(b, -1), t / 1000, img_ids, txt_ids, guidance
        ).sample
        v = pipe._unpack_latents(v, 16, 16, 2)
    z_0 = x - sigma * v  # x = (1 - sigma) z_0 + sigma eps, v = eps - z_0
    return z_0 + v


@pytest.mark.parametrize("name", NAMES)
def test_epsilon_is_the_familys_own(name, family_folders, families):
    denoiser, parts = adapted(families[name], family_folders[name])
    x, t = inputs(denoiser.latent_channels, 141)
    conditioning = denoiser.stack([denoiser.encode(PROMPT, parts, tiny.SIZE)] * 2)
    with torch.no_grad():
        found = denoiser(x, t, conditioning)
    torch.testing.assert_close(found, own_epsilon(name, families[name], x, t), rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


def test_the_unconditional_branch_is_the_familys_own(family_folders, families):
    denoiser, parts = adapted(families["sdxl"], family_folders["sdxl"])
    zeros = denoiser.encode_unconditional(parts, tiny.SIZE)
    _, hidden, _, pooled = families["sdxl"].encode_prompt(PROMPT)
    expected = {"encoder_hidden_states": hidden[0], "text_embeds": pooled[0], "time_ids": zeros["time_ids"]}
    assert_same(dict(zeros), expected)
    assert zeros["time_ids"].tolist() == [16, 16, 0, 0, 16, 16]
    empty = denoiser.encode_unconditional(replace(parts, zero_unconditional=False), tiny.SIZE)
    assert_same(dict(empty), dict(denoiser.encode("", parts, tiny.SIZE)))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "unconditional"])
def test_prompt_probes_are_sampled_as_the_pipeline_samples(name, family_folders, families):
    pipe = copy.copy(families[name])
    denoiser, parts = adapted(families[name], family_folders[name])
    generator = torch.Generator().manual_seed(3)
    if denoiser.schedule.prediction_type != "flow":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    size = size_of(name)
    steps = {"num_inference_steps": 3, "generator": generator}
    if name == "unconditional":
        expected = DDIMPipeline(pipe.unet, pipe.scheduler)(**steps, output_type="np").images[0]
    else:
        arguments = {"prompt": PROMPT, "height": size, "width": size, "guidance_scale": 3.0, "output_type": "latent"}
        arguments |= {"sd3": {"max_sequence_length": 77}, "flux": {"guidance_scale": 3.5}}.get(name, {})
        expected = pipe(**arguments, **steps).images
        expected = unpack(expected, 8, 8)[0] if name == "flux" else expected[0]
    prepared = PreparedProbe(Probe(PROMPT, seed=3, name="a"), denoiser.encode(PROMPT, parts, size), None, None)
    sampling = SamplingConfig(num_inference_steps=3, guidance_scale=3.0)
    null = denoiser.encode_unconditional(parts, size)
    view, latents = prompt_view(prepared, null, denoiser, parts.scheduler, sampling, draws=2, side=8)
    if name == "unconditional":
        latents, expected = (latents.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1), torch.from_numpy(expected)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)
    assert view.noisy_latents.shape == (1, 2, denoiser.latent_channels, 8, 8)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "unconditional"])
def test_retained_variance_agrees_with_the_exact_jacobian(name, families):
    """64 vectors tiled over all 4x4 latents are orthogonal: Hutchinson's estimate is then exact."""
    denoiser, parts = adapted(families[name])
    c, t = denoiser.latent_channels, 141
    x, _ = inputs(c, t, b=1, side=4)
    conditioning = denoiser.encode(PROMPT, parts, 8)
    view = View("a", x[None], (t,), None, conditioning)
    found = measure(denoiser, view, CurvatureConfig(vectors=64, tile=64), seed=0).rho.mean[0]
    batch = denoiser.stack([conditioning])
    jacobian = torch.autograd.functional.jacobian(lambda x: denoiser(x, torch.tensor([t]), batch), x)
    diagonal = jacobian.reshape(c * 16, c * 16).diagonal().reshape(c, 4, 4)
    sigma = t / 1000 if denoiser.schedule.alphas is None else (1 - denoiser.schedule.alphas[t] ** 2).sqrt().item()
    expected = 1 - sigma * diagonal.mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-4


def test_add_noise_by_hand():
    """Variance preserving; and rectified flow, a straight line."""
    z_0, eps = torch.full((2, 1, 1, 1), 10.0), torch.full((2, 1, 1, 1), 5.0)
    curved = NoiseSchedule(torch.tensor([0.8, 0.6], dtype=torch.float64), 2, "epsilon")
    noisy = curved.add_noise(z_0, eps, torch.tensor([0, 1]))
    torch.testing.assert_close(noisy.flatten(), torch.tensor([0.8 * 10 + 0.6 * 5, 0.6 * 10 + 0.8 * 5]))
    noisy = NoiseSchedule(None, 1000, "flow").add_noise(z_0, eps, torch.tensor([250.0, 0.5]))
    torch.testing.assert_close(noisy.flatten(), torch.tensor([0.75 * 10 + 0.25 * 5, 0.9995 * 10 + 0.0005 * 5]))


@pytest.mark.parametrize("declared", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_schedulers_of_diffusers_are_read(name, declared):
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    made = getattr(diffusers, f"{name}Scheduler")(**options, prediction_type=declared)
    schedule = NoiseSchedule.from_scheduler(made)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(schedule.alphas**2, (1 - betas).cumprod(0), atol=1e-6, rtol=1e-4)
    assert (schedule.num_train_timesteps, schedule.prediction_type) == (1000, declared)


def test_flow_matching_is_known_by_its_class_and_errors_say_what_is_wrong():
    found = NoiseSchedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    assert found == NoiseSchedule(None, 1000, "flow")
    with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod and is not a flow-matching"):
        NoiseSchedule.from_scheduler(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match=r"prediction_type: got 'noise', allowed epsilon, v_prediction, sample, flow"):
        NoiseSchedule(ALPHAS, 1000, "noise")
    with pytest.raises(ValueError, match=r"'flow' does not fit"):
        NoiseSchedule(ALPHAS, 1000, "flow")
    with pytest.raises(ValueError, match=r"'epsilon' does not fit"):
        NoiseSchedule(None, 1000, "epsilon")
