"""Unconditional models that work on pixels."""

from __future__ import annotations

from torch import Tensor, nn

from memwatch.denoiser.base import Conditioning, Denoiser, config_of, is_a
from memwatch.denoiser.components import Components


class Unconditional(Denoiser):
    """``UNet2DModel`` on pixels in [-1, 1], without VAE and text. There is no other branch to compare with."""

    name = "unconditional UNet2DModel"
    pipeline = "DDPMPipeline"
    in_pixels = True
    guided = False

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        classes = config_of(model, "class_embed_type") or config_of(model, "num_class_embeds")
        same = config_of(model, "in_channels") == config_of(model, "out_channels") == 3
        return is_a(model, "UNet2DModel") and same and not classes

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.model(noisy_latents, timesteps, return_dict=False)[0]
        return output

    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        return {}

    def encode_unconditional(self, components: Components, resolution: int) -> None:
        return None
