"""Where probes are looked at: known latents under fixed noise, and latents sampled by an obvious loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from support.builders import assert_same, picture
from support.families import PROMPT, adapted
from support.oracles import ALPHAS, DiagonalGaussian, denoiser_of, generator, spread

from memwatch import Probe
from memwatch.config import LevelsConfig, SamplingConfig
from memwatch.measure.measure import Batches, generate
from memwatch.measure.prepare import PreparedProbe, prepare
from memwatch.measure.views import fixed_noise, initial_noise, noised, prompt_view, reference_view, sample, seeded

SAMPLING = SamplingConfig(num_inference_steps=4, guidance_scale=3.0)
PROMPTS = ["a photo of a cat", "a red poster", "a photo of the dog"]


def test_randomness_depends_on_names_and_seeds_alone():
    first, *others = (seeded(*p).initial_seed() for p in ((0, "a", 61), (1, "a", 61), (0, "b", 61), (0, "a", 6)))
    assert first == seeded(0, "a", 61).initial_seed()
    assert first not in others
    noise = fixed_noise("cat", (2, 3, 4, 8, 8), 0)
    assert torch.equal(fixed_noise("cat", (2, 3, 4, 8, 8), 0), noise)
    assert not any(torch.equal(fixed_noise(name, noise.shape, seed), noise) for name, seed in (("dog", 0), ("cat", 1)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_a_reference_view_is_the_known_latents_under_fixed_noise(prediction_type):
    denoiser = denoiser_of(DiagonalGaussian(spread(), prediction_type=prediction_type))
    z_0 = torch.randn(4, 8, 8, generator=generator())
    conditioning = {"encoder_hidden_states": torch.zeros(2, 8)}
    prepared = PreparedProbe(Probe("a cat", picture(0), name="cat"), conditioning, None, z_0)
    levels = LevelsConfig(timesteps=(61, 301), draws=3)
    view = reference_view(prepared, denoiser, levels, seed=7)
    assert view.conditioning is conditioning
    assert torch.equal(view.eps, fixed_noise("cat", (2, 3, 4, 8, 8), 7))
    for level, t in enumerate(levels.timesteps):
        alpha = 1 - t / 1000 if prediction_type == "flow" else float(ALPHAS[t])
        sigma = t / 1000 if prediction_type == "flow" else (1 - alpha**2) ** 0.5
        torch.testing.assert_close(view.noisy_latents[level], alpha * z_0 + sigma * view.eps[level])


def test_each_noise_draw_looks_at_one_of_the_generations_in_turn():
    denoiser = denoiser_of(DiagonalGaussian(spread()))
    z_0 = torch.randn(2, 4, 8, 8, generator=generator())
    prepared = PreparedProbe(Probe("a cat", name="p"), {}, None, None)
    levels = LevelsConfig(timesteps=(61, 301), draws=4)
    view = noised(prepared, z_0, denoiser, levels, seed=7)
    assert torch.equal(view.eps, fixed_noise("p", (2, 4, 4, 8, 8), 7))
    for i in range(2):  # as if each were the image of a reference probe with this name
        alone = reference_view(replace(prepared, latents=z_0[i]), denoiser, levels, seed=7)
        assert torch.equal(view.noisy_latents[:, i::2], alone.noisy_latents[:, i::2])
        assert torch.equal(view.eps, alone.eps)


def setting(pipe, folder=None):
    """The denoiser, conditioning of three prompts and of none, and three initial noises."""
    denoiser, parts = adapted(pipe, folder)
    conditioning = [denoiser.encode(prompt, parts, 16) for prompt in PROMPTS]
    x = torch.randn(3, denoiser.latent_channels, 8, 8, generator=generator(4))
    return denoiser, parts, conditioning, denoiser.encode_unconditional(parts, 16), x


@torch.no_grad()
def obvious_loop(pipe, x, hidden, empty):
    """One row, two separate calls per step: the finished latents, those before the last step, and the guidance norm."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(SAMPLING.num_inference_steps)
    norms = []
    for t in scheduler.timesteps:
        before = x
        with_prompt, without = (pipe.unet(x, t, c[None]).sample for c in (hidden, empty))
        norms.append((with_prompt - without).square().sum().sqrt().item())
        x = scheduler.step(without + SAMPLING.guidance_scale * (with_prompt - without), t, x).prev_sample
    return x, before, t.item(), sum(norms) / len(norms)


def test_sampling_is_an_obvious_loop_per_row(pipeline):
    denoiser, parts, conditioning, empty, x = setting(pipeline)
    found = sample(denoiser, parts.scheduler, SAMPLING, x, conditioning, empty)
    for row in range(3):
        hidden, without = (c["encoder_hidden_states"] for c in (conditioning[row], empty))
        latents, before, t, norm = obvious_loop(pipeline, x[row : row + 1], hidden, without)
        torch.testing.assert_close(found.latents[row], latents[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.x_last[row], before[0], rtol=1e-4, atol=1e-4)
        assert found.timestep == t
        assert found.guidance_norm[row].item() == pytest.approx(norm, rel=1e-4)
    assert not sample(denoiser, parts.scheduler, SAMPLING, x, conditioning, None).guidance_norm.any()  # no branch


def test_generations_are_sampled_from_their_own_seeds(pipeline):
    denoiser, parts, conditioning, empty, _ = setting(pipeline)
    what = denoiser, parts.scheduler, SAMPLING, [5, 6, 7], conditioning[0], empty, 8
    latents = generate(*what, Batches(3))
    assert torch.equal(initial_noise(denoiser, [6], 8), torch.randn(1, 4, 8, 8, generator=generator(6)))
    x, batch = initial_noise(denoiser, [5, 6, 7], 8), conditioning[:1] * 3
    assert_same(latents, sample(denoiser, parts.scheduler, SAMPLING, x, batch, empty).latents)
    torch.testing.assert_close(latents, generate(*what, Batches(2)), rtol=1e-4, atol=1e-4)


def test_a_prompt_view_is_the_sample_before_its_last_step(pipeline):
    denoiser, parts, _, empty, _ = setting(pipeline)
    (prepared,) = prepare([Probe(PROMPT, seed=3, name="drawn")], denoiser, parts, 16)
    view, latents = prompt_view(prepared, empty, denoiser, parts.scheduler, SAMPLING, draws=2, side=8)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    hidden = prepared.conditioning["encoder_hidden_states"]
    finished, before, t, _ = obvious_loop(pipeline, x, hidden, empty["encoder_hidden_states"])
    torch.testing.assert_close(latents, finished[0], rtol=1e-4, atol=1e-4)
    assert (view.key, view.timesteps, view.eps) == ("drawn", (t,), None)
    assert view.noisy_latents.shape == (1, 2, 4, 8, 8)
    for draw in range(2):  # test vectors differ, the noisy latents do not
        torch.testing.assert_close(view.noisy_latents[0, draw], before[0], rtol=1e-4, atol=1e-4)
