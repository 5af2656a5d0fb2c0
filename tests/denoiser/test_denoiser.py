"""Every family: epsilon and samples are its own pipeline's, products and diagonals are right, one law gives one map."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from support import families as tiny
from support.builders import assert_same
from support.families import PROMPT, adapted, size_of
from support.oracles import DiagonalGaussian, T, denoiser_of, view_of
from torch import nn

from memwatch import Probe
from memwatch.config import CurvatureConfig, SamplingConfig
from memwatch.denoiser import Flux, StableDiffusion3
from memwatch.denoiser.flow import pack, unpack
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
    denoiser, parts = adapted(families["sd3"], family_folders["sd3"])
    _, hidden, _, pooled = families["sd3"].encode_prompt(PROMPT, PROMPT, PROMPT, max_sequence_length=77)
    null = denoiser.encode_unconditional(parts, tiny.SIZE)
    torch.testing.assert_close(null["encoder_hidden_states"], hidden[0])
    torch.testing.assert_close(null["pooled_projections"], pooled[0])


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


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_half_precision_networks_give_float32_epsilon_close_to_their_own(name, families):
    denoiser, parts = adapted(families[name])
    conditioning = denoiser.encode(PROMPT, parts, tiny.SIZE)
    x, t = inputs(denoiser.latent_channels, 141)
    half = type(denoiser)(copy.deepcopy(denoiser.model).bfloat16(), denoiser.schedule)
    with torch.no_grad():
        full, found = (d(x, t, d.stack([conditioning] * 2)) for d in (denoiser, half))
    assert half.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert (found - full).square().mean().sqrt() < 0.05 * full.std()


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


class Transformer(nn.Module):
    """An oracle called as SD 3's transformer is called (``flux=False``) or, packed, as Flux's."""

    def __init__(self, oracle, *, flux: bool) -> None:
        super().__init__()
        self.oracle, self.flux = oracle, flux
        self.config = SimpleNamespace(in_channels=16 if flux else 4, sample_size=8, patch_size=2, guidance_embeds=False)

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict, **ids):
        assert pooled_projections.shape == (len(hidden_states), 8)
        if not self.flux:
            return self.oracle(hidden_states, timestep, encoder_hidden_states)
        assert ids["img_ids"].shape == (16, 3)
        output = self.oracle(unpack(hidden_states, 8, 8), (timestep * 1000).round(), encoder_hidden_states)[0]
        return (pack(output),)


@pytest.mark.parametrize("family", [StableDiffusion3, Flux])
def test_flow_families_and_stable_diffusion_give_the_same_map_of_the_same_law(family):
    variance = torch.full((4, 8, 8), 0.8)
    variance[:, 2:5, 3:7] = 0.01
    timesteps = (61, 301)
    curvature = CurvatureConfig(vectors=8, tile=8)
    plain = measure(denoiser_of(DiagonalGaussian(variance)), view_of(timesteps), curvature, 0)
    transformer = Transformer(DiagonalGaussian(variance, prediction_type="flow"), flux=family is Flux)
    view = view_of(timesteps, flow=True)
    conditioning = {**view.conditioning, "pooled_projections": torch.zeros(8)}
    view = replace(view, conditioning=conditioning)
    flow = measure(family(transformer, NoiseSchedule(None, T, "flow")), view, curvature, 0)
    torch.testing.assert_close(flow.rho.samples, plain.rho.samples, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flow.epsilon, plain.epsilon, rtol=1e-4, atol=1e-5)
