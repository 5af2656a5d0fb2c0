"""OneTrainer's model: its UNet, LoRA modules, text encoders and noise schedule, as memwatch takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import nn

from memwatch.callback import MemWatch
from memwatch.config import MemWatchConfig
from memwatch.integrations.runner import pipeline_of, shorter_side, watch_or_refuse
from memwatch.integrations.text_encoder import PatchedEncoder
from memwatch.integrations.wrapped import Patched

PRECISIONS = {"FLOAT_16": "fp16", "BFLOAT_16": "bf16"}  # by their train_dtype; everything else is float32


def make_watch(settings: MemWatchConfig, model: Any, config: Any) -> MemWatch:
    """Of a model that has been set up for training.

    Args:
        model: their ``StableDiffusionModel`` or ``StableDiffusionXLModel``. config: their ``TrainConfig``.
    """
    precision = PRECISIONS.get(str(config.train_dtype), "no")
    accelerator = Accelerator(cpu=model.train_device.type == "cpu", mixed_precision=precision)  # it prepares nothing
    encoders, tokenizers = [], []
    for suffix, skip in suffixes(model, config):
        adapters = adapters_of(model, f"text_encoder{suffix}_lora")
        encoder = getattr(model, f"text_encoder{suffix}")
        encoders.append(PatchedEncoder(encoder, adapters, precision=accelerator.autocast, skip=skip))
        tokenizers.append(getattr(model, f"tokenizer{suffix}"))
    lora = adapters_of(model, "unet_lora")
    return watch_or_refuse(
        accelerator,
        Patched(model.unet, nn.ModuleList(lora)) if lora else model.unet,
        pipeline_of(model.vae, scheduler_of(model, config), model.train_device),
        config=replace(settings, resolution=settings.resolution or shorter_side(config.resolution)),
        text_encoder=encoders,
        tokenizer=tokenizers,
    )


def suffixes(model: Any, config: Any) -> list[tuple[str, int]]:
    """What the names of each text encoder and its parts end in, and how many of its last layers are left out."""
    if hasattr(model, "text_encoder_1"):
        return [("_1", config.text_encoder_layer_skip), ("_2", config.text_encoder_2_layer_skip)]
    return [("", config.text_encoder_layer_skip)]


def adapters_of(model: Any, name: str) -> list[Any]:
    """The modules of one of their ``LoRAModuleWrapper``s, which is no module itself; none where there is none."""
    wrapper = getattr(model, name, None)
    return [] if wrapper is None else list(wrapper.lora_modules.values())


def scheduler_of(model: Any, config: Any) -> Any:
    """Their noise schedule. They change attributes of their scheduler, which are not in the config that is copied."""
    from diffusers import DDIMScheduler

    theirs = model.noise_scheduler
    changed = {"prediction_type": theirs.config.prediction_type}
    if config.rescale_noise_scheduler_to_zero_terminal_snr:
        changed["rescale_betas_zero_snr"] = True
    return DDIMScheduler.from_config(theirs.config, **changed)
