"""UNets: Stable Diffusion 1.x, 2.x and XL, and unconditional models on pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memwatch.denoiser.base import Conditioning, Denoiser, config_of, is_a
from memwatch.denoiser.components import Components, clip_penultimate, kept, tokenize


def is_plain_unet(model: nn.Module) -> bool:
    """Whether ``model`` is a text-conditioned UNet whose only image input is the noisy latents."""
    channels = config_of(model, "in_channels")
    other = config_of(model, "class_embed_type") or config_of(model, "encoder_hid_dim_type")
    same = channels is not None and channels == config_of(model, "out_channels")
    return same and bool(config_of(model, "cross_attention_dim")) and not other


class StableDiffusion(Denoiser):
    """Stable Diffusion 1.x and 2.x: ``UNet2DConditionModel`` with one CLIP text encoder; epsilon or v_prediction."""

    name = "Stable Diffusion 1.x / 2.x"
    pipeline = "StableDiffusionPipeline"
    text_encoders = ("text_encoder",)

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return is_plain_unet(model) and not config_of(model, "addition_embed_type")

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning["encoder_hidden_states"]
        output: Tensor = self.model(noisy_latents, timesteps, encoder_hidden_states=hidden, return_dict=False)[0]
        return output

    @torch.no_grad()
    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        (text_encoder,), (tokenizer,) = components.text_encoders, components.tokenizers
        tokens = tokenize(prompt, tokenizer).to(text_encoder.device)
        mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
        return {"encoder_hidden_states": kept(text_encoder(tokens.input_ids, attention_mask=mask)[0])}


class StableDiffusionXL(Denoiser):
    """Stable Diffusion XL: ``UNet2DConditionModel``, two CLIP text encoders, pooled embedding and size conditioning.

    Original and target size are the resolution, and nothing is cropped, as in generating.
    """

    name = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return is_plain_unet(model) and config_of(model, "addition_embed_type") == "text_time"

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        added = {key: conditioning[key] for key in ("text_embeds", "time_ids")}
        hidden = conditioning["encoder_hidden_states"]
        output: Tensor = self.model(noisy_latents, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]
        return output

    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        pairs = zip(components.tokenizers, components.text_encoders, strict=True)
        (first, _), (second, pooled) = (clip_penultimate(prompt, *pair) for pair in pairs)
        time_ids = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
        hidden = torch.cat([first, second], dim=-1)
        return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": time_ids}

    def encode_unconditional(self, components: Components, resolution: int) -> Conditioning:
        """Zeros, or the empty prompt where the pipeline's ``force_zeros_for_empty_prompt`` is off."""
        empty = self.encode("", components, resolution)
        if not components.zero_unconditional:
            return empty
        return {key: value if key == "time_ids" else torch.zeros_like(value) for key, value in empty.items()}


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
