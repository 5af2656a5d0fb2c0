"""Adapt: find the family of a foreign model, load what the caller did not pass, and settle sizes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from memwatch.config import MemWatchConfig, require
from memwatch.denoiser import Components, Denoiser, dtype_of, family_of, load_components
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.lora_off import why_not_base
from memwatch.ranks import Ranks


@dataclass(frozen=True)
class Adapted:
    """A model behind one signature.

    Attributes:
        parts: of its pipeline, those of the caller first.
        resolution: side of the images, pixels. side: of the latents.
    """

    denoiser: Denoiser
    parts: Components
    resolution: int
    side: int


def adapt(
    model: nn.Module,
    forward_module: nn.Module,
    pretrained: Any,
    given: Components,
    config: MemWatchConfig,
    ranks: Ranks,
    has_prompts: bool,
) -> Adapted:
    """Put ``model`` behind one signature.

    Args:
        model: the bare network. forward_module: what is called.
        pretrained: where parts that are not given are loaded from.

    Raises:
        ConfigError: a setting does not fit this model or the way it lies on the ranks.
        ValueError: unknown family, or a part is missing.
    """
    allowed = "variance or both with prompt probes and sampling.look: last_step, where the true noise is unknown"
    ok = config.signals.terms != "loss" or config.sampling.look == "generation" or not has_prompts
    require(ok, "signals.terms", config.signals.terms, allowed)
    ranks.require(config, has_prompts)
    family = family_of(model)
    with ranks.unpartitioned():
        parts = load_components(
            pretrained,
            given,
            needs_vae=not family.in_pixels,
            text_encoders=family.text_encoders,
            optional=family.optional,
            device=ranks.accelerator.device,
            dtype=dtype_of(model),
        )
    denoiser = family(model, NoiseSchedule.from_scheduler(parts.scheduler))
    denoiser.model, denoiser.reuse_graph = forward_module, ranks.reuse_graph
    denoiser.precision = ranks.mixed_precision if config.precision == "loop" else nullcontext
    last, timesteps = denoiser.schedule.num_train_timesteps - 1, config.levels.timesteps
    require(max(timesteps) <= last, "levels.timesteps", timesteps, f"timesteps up to {last}")
    scale = 2 ** (len(parts.vae.config.block_out_channels) - 1) if parts.vae is not None else 1
    resolution, unit = config.resolution or (denoiser.sample_size or 0) * scale, scale * denoiser.patch
    ok = resolution > 0 and resolution % unit == 0
    require(ok, "resolution", config.resolution, f"a multiple of {unit} (the model names no size)")
    return Adapted(denoiser, parts, resolution, resolution // scale)


def require_of_model(config: MemWatchConfig, model: nn.Module, text_encoders: Sequence[Any], ema: Any) -> None:
    """What the configuration asks of this very model.

    Raises:
        ConfigError: its base cannot be had by switching LoRA off, or there is no average of its weights, and that is
            asked for.
    """
    weights, baseline = config.weights, config.signals.baseline
    why = why_not_base((model, *text_encoders)) if baseline == "base" else None
    require(why is None, "signals.baseline", baseline, f"first or another one, since {why}")
    require(ema is not None or weights == "live", "weights", weights, "live, since no ema was passed")
    averaged = len(ema.shadow_params) if weights == "ema" else 0
    sizes = {len(list(model.parameters())), sum(p.requires_grad for p in model.parameters())}
    has = f"the EMA averages {averaged} tensors and the model has {' or '.join(map(str, sizes))}"
    require(weights == "live" or averaged in sizes, "weights", weights, f"live, since {has}")
