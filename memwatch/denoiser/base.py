"""One signature for every model: ``epsilon = denoiser(noisy_latents, timesteps, conditioning)``."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memwatch.denoiser.components import Components
from memwatch.denoiser.schedule import NoiseSchedule

logger = logging.getLogger("memwatch")

Conditioning = Mapping[str, Tensor]  # of one probe: no batch dimension, on the CPU


class Denoiser(ABC):
    """A model of one family, called with one signature.

    Attributes:
        model: the bare network, unwrapped. schedule: its noise schedule and prediction type.
        name: the family's, for people. pipeline: the diffusers class. part: the network's name in it.
        text_encoders: those that the family needs, by their names in the pipeline. optional: those it may lack.
        longest: number of the text encoder that takes the longest prompts, and its tokens; ``None``: its tokenizer's.
        in_pixels: whether the latents are the pixels themselves, in [-1, 1], without a VAE.
        guided: whether prompts are sampled with classifier-free guidance; not where the model is distilled.
        reuse_graph: see ``curvature.value_and_diag_jacobian``.
        precision: entered whenever the model is called; the loop's mixed precision, or nothing.
    """

    name: str
    part: str = "unet"
    pipeline: str
    text_encoders: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    longest: tuple[int, int | None] = (0, None)
    in_pixels: bool = False
    guided: bool = True
    reuse_graph: bool = True
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, model: nn.Module, schedule: NoiseSchedule) -> None:
        self.model, self.schedule = model, schedule

    @classmethod
    @abstractmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether ``model`` belongs to this family."""

    @abstractmethod
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's own output for ``(b, c, h, w)`` in its dtype and on its device, ``(b,)``, and a ``stack``."""

    @abstractmethod
    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        """The conditioning of a prompt for images of ``resolution`` pixels, float32 on the CPU."""

    def encode_unconditional(self, components: Components, resolution: int) -> Conditioning | None:
        """The conditioning of the empty prompt; ``None`` where the model has no unconditional branch."""
        return self.encode("", components, resolution)

    def warn_if_cut(self, prompt: str, components: Components) -> None:
        """Warn about the words of a prompt that do not fit into the text encoder that takes the most."""
        number, limit = self.longest
        if not components.tokenizers:
            return
        tokenizer = components.tokenizers[number]
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        limit = tokenizer.model_max_length if limit is None else limit
        if len(ids) > limit:
            cut = tokenizer.decode(ids[limit - 1 : -1])  # the last place is the end token's
            logger.warning("probe prompt %r is longer than %d tokens; cut: %r", prompt, limit, cut)

    def sampler(self, scheduler: Any, num_inference_steps: int, side: int) -> Any:
        """Ready to sample latents of ``side`` pixels: DDIM, as in the paper."""
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(num_inference_steps)
        return ddim

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.model)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def latent_channels(self) -> int:
        return int(config_of(self.model, "in_channels"))

    @property
    def patch(self) -> int:
        """The sides of latents are multiples of this."""
        return 1

    @property
    def sample_size(self) -> int | None:
        """The side of the latents that the model was made for; ``None`` where it names none."""
        size = config_of(self.model, "sample_size")
        return size if isinstance(size, int) else size[0] if size else None

    def output(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's own output in float32, see ``predict``; noisy latents of any type."""
        with self.precision():
            return self.predict(noisy_latents.to(self.dtype), timesteps, conditioning).float()

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The predicted noise, epsilon: float32, shape of ``noisy_latents``; see ``predict``."""
        return self.schedule.epsilon(self.output(noisy_latents, timesteps, conditioning), noisy_latents, timesteps)

    def stack(self, items: Sequence[Conditioning]) -> Conditioning:
        """One batch of several conditionings, on the model's device; floating-point tensors in its dtype."""

        def moved(tensor: Tensor) -> Tensor:
            there = to_device(tensor, self.device)
            return there.to(self.dtype) if tensor.is_floating_point() else there

        return {key: moved(torch.stack([item[key] for item in items])) for key in items[0]}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; to a GPU by way of pinned memory, so that the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def config_of(model: nn.Module, key: str) -> Any:
    """A key of a diffusers model's config; ``None`` where there is none."""
    config = getattr(model, "config", None)
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type that a model computes in: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def is_a(model: nn.Module, name: str) -> bool:
    """Whether ``model`` is of the diffusers class ``name`` or derived from it. diffusers need not be imported."""
    return any(cls.__name__ == name for cls in type(model).__mro__)
