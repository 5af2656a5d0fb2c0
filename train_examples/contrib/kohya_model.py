"""kohya's UNet, LoRA network, text encoders and VAE in the form that memwatch takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # fixed in sd-scripts


class Wrapped(nn.Module):
    """A network inside another module; whatever that module does not have itself is the network's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


class UNetWithLoRA(Wrapped):
    """Their UNet and LoRA as one module with the parameters of both and the config of a diffusers UNet.

    Their LoRA replaces the ``forward`` of the UNet's layers and is no part of the UNet, which alone would seem to have
    nothing that is trained. Accelerate's mixed precision, which replaces the UNet's own ``forward``, is left out:
    memwatch enters it by itself.

    Args:
        unet: theirs, without the wrappers of accelerate. lora: what they call the network. encoder: the text encoder.
    """

    config: Any

    def __init__(self, unet: Any, lora: nn.Module, encoder: Any) -> None:
        super().__init__(unet)
        self.lora = lora
        self.config = SimpleNamespace(
            in_channels=unet.in_channels,
            out_channels=unet.out_channels,
            cross_attention_dim=encoder.config.hidden_size,
            sample_size=getattr(getattr(unet, "config", None), "sample_size", None),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        unet: Any = self.network
        original = unet.__dict__.get("_original_forward")
        if original is None:
            return unet(*args, **kwargs)
        mixed, unet.forward = unet.forward, original
        try:
            return unet(*args, **kwargs)
        finally:
            unet.forward = mixed


class Encoded(NamedTuple):
    """The part of a text encoder's output that memwatch reads."""

    first: Tensor
    hidden_states: tuple[Tensor, ...]


class EncoderWithLoRA(Wrapped):
    """Their text encoder and its LoRA as one module.

    Args:
        encoder: transformers' ``CLIPTextModel``.
        loras: of its layers.
        precision: entered at every call, because LoRA is often of another type than the encoder.
        skip: how many of the last layers are left out; ``--clip_skip`` is one more.
    """

    def __init__(
        self,
        encoder: nn.Module,
        loras: Iterable[nn.Module],
        precision: Callable[[], AbstractContextManager[Any]],
        skip: int,
    ) -> None:
        super().__init__(encoder)
        self.loras, self.precision, self.skip = nn.ModuleList(loras), precision, skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        with self.precision():
            if not self.skip:
                return self.network(input_ids, attention_mask=attention_mask, **options)
            output = self.network(input_ids, attention_mask=attention_mask, output_hidden_states=True)
            states = tuple(output.hidden_states[: -self.skip])
            return Encoded(self.network.text_model.final_layer_norm(states[-1]), states)


def pipeline_of(vae: Any, args: Any, device: torch.device) -> SimpleNamespace:
    """What ``MemWatch`` takes for a pipeline: their noise schedule, and a float32 copy of their VAE on ``device``.

    Their own VAE stays on the CPU, or in half precision. The copy takes 0.3 GB.
    """
    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if args.v_parameterization else "epsilon",
        rescale_betas_zero_snr=bool(args.zero_terminal_snr),
    )
    ours = copy.deepcopy(vae).to(device, torch.float32).eval().requires_grad_(False)
    return SimpleNamespace(vae=ours, scheduler=scheduler)
