"""kohya's model: the UNet, network, text encoders and noise schedule of sd-scripts, as memwatch takes them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from memwatch.integrations.runner import pipeline_of
from memwatch.integrations.text_encoder import PatchedEncoder
from memwatch.integrations.wrapped import Patched

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of every model that they know
SIZE_WIDTH = 256  # of the embedding of each of SDXL's six sizes
SDXL_SIZE = 128  # side of the latents; their UNet names none


class PatchedUNet(Patched):
    """Their UNet and network as one module, with the config of a diffusers model.

    Args:
        network: the UNet. patch: what they call the network.
        encoders: its text encoders.
    """

    config: Any

    def __init__(self, network: Any, patch: nn.Module, encoders: Sequence[Any]) -> None:
        super().__init__(network, patch)
        self.config = SimpleNamespace(
            in_channels=network.in_channels,
            out_channels=network.out_channels,
            cross_attention_dim=sum(encoder.config.hidden_size for encoder in encoders),
            sample_size=getattr(getattr(network, "config", None), "sample_size", None),
        )


class PatchedSDXL(PatchedUNet):
    """Their SDXL UNet, called as diffusers' is. It takes the size conditioning embedded, in one vector."""

    def __init__(self, network: Any, patch: nn.Module, encoders: Sequence[Any]) -> None:
        super().__init__(network, patch, encoders)
        self.config.addition_embed_type, self.config.sample_size = "text_time", SDXL_SIZE

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The prediction, as the only item of a tuple."""
        from diffusers.models.embeddings import get_timestep_embedding

        sizes, pooled = added_cond_kwargs["time_ids"], added_cond_kwargs["text_embeds"]
        options = {"flip_sin_to_cos": True, "downscale_freq_shift": 0}
        embedded: Tensor = get_timestep_embedding(sizes.flatten(), SIZE_WIDTH, **options)
        vector = torch.cat([pooled, embedded.reshape(len(sizes), -1).to(pooled)], dim=1)
        return (super().forward(noisy_latents, timesteps, encoder_hidden_states, vector.to(noisy_latents.dtype)),)


def encoders_of(
    encoders: Sequence[Any], network: Any, accelerator: Any, args: Any, *, is_sdxl: bool
) -> list[PatchedEncoder]:
    """Their text encoders; the first holds the adapters of all, so that memwatch sees whether any is trained.

    SDXL ignores ``--clip_skip``.
    """
    adapters = list(getattr(network, "text_encoder_loras", ()))
    skip = 0 if is_sdxl else (args.clip_skip or 1) - 1
    return [
        PatchedEncoder(encoder, () if i else adapters, precision=accelerator.autocast, skip=skip)
        for i, encoder in enumerate(encoders)
    ]


def pipeline_of_run(vae: Any, args: Any, device: torch.device, scaling: float) -> SimpleNamespace:
    """What else memwatch needs. The schedule is made from their options, since they do not read it from the model.

    Args:
        scaling: of latents. The config of their SDXL VAE has that of Stable Diffusion 1.x.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if args.v_parameterization else "epsilon",
        rescale_betas_zero_snr=bool(args.zero_terminal_snr),
    )
    parts = pipeline_of(vae, scheduler, device, scaling_factor=scaling)
    parts.config = SimpleNamespace(force_zeros_for_empty_prompt=False)  # a dropped caption is an empty one here
    return parts
