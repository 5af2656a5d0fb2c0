"""A miniature of sd-scripts' ``sdxl_train_network.py``: a UNet that takes its size conditioning as one vector."""

from __future__ import annotations

import train_network
from diffusers import AutoencoderKL
from diffusers import UNet2DConditionModel as DiffusersUNet
from train_network import load_part, train_util
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["SdxlNetworkTrainer", "SdxlUNet2DConditionModel", "setup_parser", "train_util"]


class SdxlUNet2DConditionModel(train_network.UNet2DConditionModel):
    """``forward(x, timesteps, context, y)``; it has no config, and its output is a tensor."""

    def __init__(self, inner: DiffusersUNet) -> None:
        super().__init__(inner)
        del self.config
        self.vector = None
        inner.get_aug_embed = lambda **_: inner.add_embedding(self.vector)

    def forward(self, x, timesteps=None, context=None, y=None, **kwargs):
        assert x.dtype == y.dtype, f"dtype mismatch: {x.dtype} != {y.dtype}"
        self.vector = y
        return self.inner(x, timesteps, context).sample


class SdxlNetworkTrainer(train_network.NetworkTrainer):
    def __init__(self):
        super().__init__()
        self.vae_scale_factor = 0.13025
        self.is_sdxl = True

    def load_target_model(self, args, weight_dtype, accelerator):
        unet = SdxlUNet2DConditionModel(load_part(DiffusersUNet, args, "unet"))
        encoders = [
            load_part(CLIPTextModel, args, "text_encoder"),
            load_part(CLIPTextModelWithProjection, args, "text_encoder_2"),
        ]
        return "sdxl", encoders, load_part(AutoencoderKL, args, "vae"), unet

    def get_tokenizers(self, args):
        return [load_part(CLIPTokenizer, args, name) for name in ("tokenizer", "tokenizer_2")]

    def encode(self, tokenizers, text_encoders, captions):
        return text_encoders[0], captions

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype):
        import torch

        size = unet.inner.config.projection_class_embeddings_input_dim
        context = torch.ones(len(noisy_latents), 3, unet.inner.config.cross_attention_dim, dtype=weight_dtype)
        vector = torch.ones(len(noisy_latents), size, dtype=weight_dtype)
        return unet(noisy_latents.to(weight_dtype), timesteps, context, vector)


def setup_parser():
    return train_network.setup_parser()
