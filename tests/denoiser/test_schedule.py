"""The noise schedule of any scheduler, and one epsilon from every prediction type."""

from __future__ import annotations

import diffusers
import pytest
import torch
from support.oracles import ALPHAS

from memwatch.denoiser.schedule import NoiseSchedule


def test_add_noise_by_hand():
    """Variance preserving; and rectified flow, a straight line."""
    z_0, eps = torch.full((2, 1, 1, 1), 10.0), torch.full((2, 1, 1, 1), 5.0)
    curved = NoiseSchedule(torch.tensor([0.8, 0.6], dtype=torch.float64), 2, "epsilon")
    noisy = curved.add_noise(z_0, eps, torch.tensor([0, 1]))
    torch.testing.assert_close(noisy.flatten(), torch.tensor([0.8 * 10 + 0.6 * 5, 0.6 * 10 + 0.8 * 5]))
    noisy = NoiseSchedule(None, 1000, "flow").add_noise(z_0, eps, torch.tensor([250.0, 0.5]))
    torch.testing.assert_close(noisy.flatten(), torch.tensor([0.75 * 10 + 0.25 * 5, 0.9995 * 10 + 0.0005 * 5]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_every_prediction_type_gives_back_the_noise(prediction_type):
    """What a perfect model would output for known (z_0, eps) is turned into that eps."""
    generator = torch.Generator().manual_seed(0)
    z_0, eps = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([61, 301, 800])
    schedule = NoiseSchedule(None if prediction_type == "flow" else ALPHAS, 1000, prediction_type)
    alpha, sigma = schedule.alpha_sigma(timesteps, z_0)
    outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * z_0, "sample": z_0, "flow": eps - z_0}
    found = schedule.epsilon(outputs[prediction_type], schedule.add_noise(z_0, eps, timesteps), timesteps)
    torch.testing.assert_close(found, eps, atol=2e-5, rtol=1e-5)


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
