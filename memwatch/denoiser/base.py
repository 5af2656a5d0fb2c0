"""One signature for every model: ``epsilon = denoiser(noisy_latents, timesteps, conditioning)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memwatch.denoiser.components import Components
from memwatch.noise import NoiseSchedule

Conditioning = Mapping[str, Tensor]  # of one probe, without batch dimension; on the CPU


class Denoiser(ABC):
    """A model of one family, called with one signature.

    Args:
        model: the bare network, unwrapped.
        schedule: its noise schedule and prediction type.
    """

    name: str
    needs_text: bool = True

    def __init__(self, model: nn.Module, schedule: NoiseSchedule) -> None:
        self.model = model
        self.schedule = schedule

    @classmethod
    @abstractmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether ``model`` belongs to this family, judged by its config."""

    @abstractmethod
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's own output; ``conditioning`` batched, everything on the model's device and in its dtype."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], components: Components) -> list[Conditioning]:
        """Conditioning of every prompt (the empty prompt is the unconditional branch)."""

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def latent_channels(self) -> int:
        return int(config_of(self.model, "in_channels"))

    @property
    def sample_size(self) -> int | None:
        """Side of the latents that the model was made for."""
        size = config_of(self.model, "sample_size")
        return size if isinstance(size, int) else size[0] if size else None

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """epsilon, float32.

        Args:
            noisy_latents: ``(b, c, h, w)``, float32, on the model's device.
            timesteps: ``(b,)``.
            conditioning: as ``stack`` returns it.
        """
        output = self.predict(noisy_latents.to(self.dtype), timesteps, conditioning)
        return self.schedule.epsilon(output.float(), noisy_latents, timesteps)

    def stack(self, items: Sequence[Conditioning]) -> Conditioning:
        """A batch on the model's device, floating point in its dtype."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

        return {key: moved(torch.stack([item[key] for item in items])) for key in items[0]}


def config_of(model: nn.Module, key: str) -> Any:
    """A key of a diffusers model's config; ``None`` where there is none."""
    config = getattr(model, "config", None)
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
