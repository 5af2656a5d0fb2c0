"""Denoisers that are known in closed form, in the clothes of ``UNet2DConditionModel``.

Data z_0 with a known law, ``x_t = alpha z_0 + sigma eps``: every oracle returns ``E[eps | x_t]``, expressed in any
prediction type, and knows its true retained variance
``rho_i = 1 - sigma d eps_i / d x_i = (alpha^2 / sigma^2) Var[z_0,i | x_t]``. float64 inside.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from memwatch.config import CurvatureConfig
from memwatch.denoiser import StableDiffusion
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.measure import measure
from memwatch.measure.measurement import Measurement
from memwatch.measure.views import View

T = 1000
FLOW_SIGMA = torch.arange(T, dtype=torch.float64) / T
FLOW_NORM = (FLOW_SIGMA**2 + (1 - FLOW_SIGMA) ** 2).sqrt()
# A variance-preserving schedule with the signal-to-noise ratio of rectified flow at every timestep:
# x_t(flow) = FLOW_NORM[t] * x_t(VP).
ALPHAS = (1 - FLOW_SIGMA) / FLOW_NORM


class Oracle(nn.Module):
    """A denoiser as Stable Diffusion's UNet is called; ``prediction_type``: epsilon, v_prediction, sample or flow."""

    def __init__(
        self, prediction_type: str = "epsilon", shape: tuple[int, int, int] = (4, 8, 8), text_width: int = 8
    ) -> None:
        super().__init__()
        self.prediction_type = prediction_type
        self.config = SimpleNamespace(
            in_channels=shape[0], out_channels=shape[0], sample_size=shape[1], cross_attention_dim=text_width
        )

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction_type == "flow":
            sigma = timestep.double() / T
            alpha = 1 - sigma
        else:
            alpha = ALPHAS[timestep.long()]
            sigma = (1 - alpha**2).sqrt()
        return alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)

    def eps(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        assert not return_dict
        assert encoder_hidden_states.shape[0] == sample.shape[0]
        alpha, sigma = self.alpha_sigma(timestep)
        eps = self.eps(sample, alpha, sigma)
        z_0 = (sample - sigma * eps) / alpha
        outputs = {"epsilon": eps, "sample": z_0, "v_prediction": alpha * eps - sigma * z_0, "flow": eps - z_0}
        return (outputs[self.prediction_type],)


class DiagonalGaussian(Oracle):
    """z_0 ~ N(mean, diag(variance)); both of shape ``(c, h, w)``.

    Its Jacobian is diagonal, so one Rademacher vector is exact.
    """

    def __init__(self, variance: Tensor, mean: Tensor | None = None, prediction_type: str = "epsilon") -> None:
        super().__init__(prediction_type, tuple(variance.shape))
        self.variance = nn.Parameter(variance.double())
        self.mean = nn.Parameter(torch.zeros_like(variance).double() if mean is None else mean.double())

    def eps(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma * (x - alpha * self.mean) / (alpha**2 * self.variance + sigma**2)

    def rho(self, timestep: int) -> Tensor:
        """From the posterior variance of a product of two Gaussians, not from the Jacobian."""
        alpha, sigma = (value[0] for value in self.alpha_sigma(torch.tensor([timestep])))
        posterior = torch.where(self.variance > 0, 1 / (1 / self.variance + alpha**2 / sigma**2), 0.0)
        return (posterior * alpha**2 / sigma**2).detach()


class FullGaussian(Oracle):
    """z_0 ~ N(0, covariance), covariance ``(c h w, c h w)``."""

    def __init__(self, covariance: Tensor, shape: tuple[int, int, int], prediction_type: str = "epsilon") -> None:
        super().__init__(prediction_type, shape)
        self.covariance = nn.Parameter(covariance.double())

    def eps(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        identity = torch.eye(len(self.covariance), dtype=torch.float64)
        total = alpha[:, :, 0] ** 2 * self.covariance + sigma[:, :, 0] ** 2 * identity
        return sigma * torch.linalg.solve(total, x.flatten(1)[..., None])[..., 0].reshape(x.shape)

    def rho(self, timestep: int) -> Tensor:
        """Posterior covariance by conditioning z_0 on x_t (Schur complement)."""
        alpha, sigma = (value.item() for value in self.alpha_sigma(torch.tensor([timestep])))
        c = self.covariance.detach()
        total = alpha**2 * c + sigma**2 * torch.eye(len(c), dtype=torch.float64)
        posterior = c - alpha**2 * c @ torch.linalg.inv(total) @ c
        shape = (self.config.in_channels, self.config.sample_size, -1)
        return (posterior.diagonal() * alpha**2 / sigma**2).reshape(shape)


class GaussianMixture(Oracle):
    """z_0 ~ sum_k w_k N(mean_k, diag(variance_k)); means and variances ``(k, c, h, w)``, zero variances allowed."""

    def __init__(self, means: Tensor, variances: Tensor, weights: Tensor, prediction_type: str = "epsilon") -> None:
        super().__init__(prediction_type, tuple(means.shape[1:]))
        self.means, self.variances = nn.Parameter(means.double()), nn.Parameter(variances.double())
        self.log_weights = nn.Parameter(weights.double().log())

    def responsibilities(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        total = alpha[:, None] ** 2 * self.variances + sigma[:, None] ** 2
        away = x[:, None] - alpha[:, None] * self.means
        log_likelihood = -0.5 * (total.log() + away**2 / total).flatten(2).sum(2)
        return (self.log_weights + log_likelihood).softmax(1)[..., None, None, None]

    def eps(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        total = alpha[:, None] ** 2 * self.variances + sigma[:, None] ** 2
        away = x[:, None] - alpha[:, None] * self.means
        return (self.responsibilities(x, alpha, sigma) * sigma[:, None] * away / total).sum(1)

    def rho(self, timestep: int, x: Tensor) -> Tensor:
        """Law of total variance over components, at one x_t of shape ``(c, h, w)``."""
        alpha, sigma = self.alpha_sigma(torch.tensor([timestep]))
        r = self.responsibilities(x[None].double(), alpha, sigma)[0]
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        mean = self.means + gain * (x - alpha * self.means)
        within = self.variances * (1 - alpha * gain)
        average = (r * mean).sum(0)
        return (((r * (within + (mean - average) ** 2)).sum(0)) * alpha[0] ** 2 / sigma[0] ** 2).detach()


def denoiser_of(oracle: Oracle) -> StableDiffusion:
    alphas = None if oracle.prediction_type == "flow" else ALPHAS
    return StableDiffusion(oracle, NoiseSchedule(alphas, T, oracle.prediction_type))


def view_of(
    timesteps: tuple[int, ...],
    draws: int = 1,
    shape: tuple[int, int, int] = (4, 8, 8),
    seed: int = 0,
    key: str = "a",
    flow: bool = False,
) -> View:
    """Noisy latents of a standard normal z_0; ``flow`` gives the same ones as rectified flow scales them."""
    generator = torch.Generator().manual_seed(seed)
    z_0 = torch.randn(shape, generator=generator)
    eps = torch.randn(len(timesteps), draws, *shape, generator=generator)
    alpha = ALPHAS[list(timesteps)].float().reshape(-1, 1, 1, 1, 1)
    noisy = alpha * z_0 + (1 - alpha**2).sqrt() * eps
    if flow:
        noisy = noisy * FLOW_NORM[list(timesteps)].float().reshape(-1, 1, 1, 1, 1)
    return View(key, noisy, timesteps, eps, {"encoder_hidden_states": torch.zeros(2, 8)})


def look_at(
    oracle: Oracle, view: View, *, vectors: int = 8, tile: int = 8, batch_size: int = 8, seed: int = 0
) -> Measurement:
    config = CurvatureConfig(vectors=vectors, tile=tile, batch_size=batch_size)
    return measure(denoiser_of(oracle), view, config, seed)


# --- the laws that several tests use ----------------------------------------------------------------------------------

LEVELS = (61, 141, 301)
BLOCK = (slice(None), slice(2, 6), slice(3, 8))  # rows 2..5, columns 3..7
BOX = (24, 16, 64, 48)  # the same in pixels, 8 per latent pixel


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(shape: tuple[int, int, int] = (4, 8, 8), seed: int = 0) -> Tensor:
    """Variances between 0.2 and 1.2."""
    return 0.2 + torch.rand(shape, generator=generator(seed))


def pinned(variance: Tensor) -> Tensor:
    """The same variances, but none inside ``BLOCK``."""
    variance = variance.clone()
    variance[..., *BLOCK] = 0
    return variance


def full_gaussian(seed: int = 0, spread: float = 0.6) -> FullGaussian:
    """A Gaussian whose axes are turned at random."""
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator(seed), dtype=torch.float64))[0]
    eigenvalues = spread * torch.rand(64, generator=generator(seed + 1), dtype=torch.float64)
    return FullGaussian(basis @ eigenvalues.diag() @ basis.T, (4, 4, 4))


def mixture(variance: Tensor, seed: int = 0) -> GaussianMixture:
    """Two equally likely kinds of data that differ outside ``BLOCK``."""
    means = 0.3 * torch.randn(2, *variance.shape, generator=generator(seed))
    means[..., *BLOCK] = 0.7
    return GaussianMixture(means, torch.stack([variance, variance]), torch.tensor([0.5, 0.5]))
