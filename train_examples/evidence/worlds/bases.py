"""Bases: the models that runs fine-tune. tiny-sd comes with the clone; three others are trained here, from nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from evidence.runs.trainer import Trainer
from evidence.worlds.sources import SIZE, Source, caption_of, fashion, photographs
from memwatch.denoiser import (
    Components,
    Conditioning,
    Denoiser,
    StableDiffusion,
    StableDiffusion3,
    Unconditional,
    load_components,
)
from memwatch.denoiser.components import kept, tokenize
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.weights import read_safetensors, write_safetensors

TEXT_WIDTH = 64  # of tiny-sd's text encoder, which all bases take over or train anew
EVERY = 250  # steps between two checkpoints of a base in training


@dataclass(frozen=True)
class Base:
    """One model to start from.

    Attributes:
        says: what it is, for the results page.
        source: what it was trained on.
        family: how it is called.
        network: makes it untrained; ``None`` is tiny-sd itself.
        prediction_type: as diffusers names it.
        steps, batch_size, learning_rate: of its own training.
        new_words: whether its text encoder is one of random weights, which tells all words apart, known or not.
    """

    says: str
    source: Callable[[], Source]
    family: type[Denoiser]
    network: Callable[[], Any] | None = None
    prediction_type: str = "epsilon"
    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 1e-3

    new_words: bool = False


class OneEncoder(StableDiffusion3):
    """A transformer of Stable Diffusion 3 that reads one CLIP text encoder, not three."""

    text_encoders: tuple[str, ...] = StableDiffusion.text_encoders
    optional: tuple[str, ...] = ()

    @torch.no_grad()
    def encode(self, prompt: str, components: Components, resolution: int) -> Conditioning:
        (tokenizer,), (text_encoder,) = components.tokenizers, components.text_encoders
        found = text_encoder(tokenize(prompt, tokenizer).input_ids)
        return {"encoder_hidden_states": kept(found.last_hidden_state), "pooled_projections": kept(found.pooler_output)}


def smaller_unet() -> Any:
    """Other widths, and one level less."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        layers_per_block=1,
        block_out_channels=(40, 80),
        norm_num_groups=20,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=SIZE // 8,
    )


def pixel_unet() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIZE,
        layers_per_block=1,
        block_out_channels=(8, 24, 48, 96),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


TINY_SD = "tiny-sd"
BASES: Mapping[str, Base] = {
    TINY_SD: Base("tiny-sd (5.0 M parameters, epsilon, photographs)", photographs, StableDiffusion),
    "velocity": Base(
        "a smaller UNet, v-prediction, clothes",
        fashion,
        StableDiffusion,
        smaller_unet,
        "v_prediction",
        steps=1500,
        new_words=True,
    ),
    "flow": Base(
        "a transformer as of Stable Diffusion 3, flow matching, photographs",
        photographs,
        OneEncoder,
        transformer,
        "flow",
        steps=2000,
    ),
    "pixels": Base(
        "an unconditional UNet on pixels, clothes", fashion, Unconditional, pixel_unet, steps=1500, batch_size=16
    ),
}


def read_parts(base: Base, tiny_sd: Path) -> Components:
    """tiny-sd's autoencoder, scheduler and text encoder, with the scheduler that the base's prediction type takes."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    names = StableDiffusion.text_encoders
    parts = load_components(
        tiny_sd, Components(None), needs_vae=not base.family.in_pixels, text_encoders=names, device=torch.device("cpu")
    )
    if base.new_words:
        from transformers import CLIPTextModel

        torch.manual_seed(1)
        parts = replace(
            parts, text_encoders=(CLIPTextModel(parts.text_encoders[0].config).eval().requires_grad_(False),)
        )
    if base.prediction_type == "flow":
        return replace(parts, scheduler=FlowMatchEulerDiscreteScheduler())
    return replace(
        parts, scheduler=DDIMScheduler.from_config(parts.scheduler.config, prediction_type=base.prediction_type)
    )


def read_base(name: str, tiny_sd: Path, folder: Path) -> tuple[Denoiser, Components]:
    """A base, ready to be fine-tuned, float32; from ``folder/bases``, where it is trained if it is not there.

    Args:
        tiny_sd: the pipeline of that name.
    """
    base, file = BASES[name], folder / "bases" / f"{name}.safetensors"
    parts = read_parts(base, tiny_sd)
    if base.network is None:
        from diffusers import UNet2DConditionModel

        unet: Any = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
        return base.family(channels_last(unet), NoiseSchedule.from_scheduler(parts.scheduler)), parts
    torch.manual_seed(0)
    denoiser = base.family(channels_last(base.network()), NoiseSchedule.from_scheduler(parts.scheduler))
    if not file.is_file():
        train_base(name, denoiser, parts, file)
    denoiser.model.load_state_dict(read_safetensors(file))
    return denoiser, parts


def channels_last(model: Any) -> Any:
    """A tenth faster on a CPU."""
    return model.to(memory_format=torch.channels_last)


def train_base(name: str, denoiser: Denoiser, parts: Components, file: Path) -> None:
    """The network, on endless views under captions of single subjects; the text encoder stays as it is. Resumable."""
    base, source = BASES[name], BASES[name].source()
    file.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(denoiser, parts, base.steps, base.learning_rate, seed=97)
    denoiser.model.train()
    checkpoint = file.with_suffix(".pt")
    if checkpoint.is_file():
        trainer.load(checkpoint)
    with tqdm(total=base.steps, initial=trainer.step, desc=f"base {name}") as bar:
        while trainer.step < base.steps:
            loss = trainer.train_on(*base_batch(source, trainer.step, base.batch_size))
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if trainer.step % EVERY == 0:
                trainer.save(checkpoint)
    write_safetensors(file, denoiser.model.state_dict())
    checkpoint.unlink(missing_ok=True)


def base_batch(source: Source, step: int, size: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures and captions of step ``step``."""
    rng = np.random.default_rng([97, step])
    subjects = [source.known[int(i)] for i in rng.integers(len(source.known), size=size)]
    return [subject.draw(rng) for subject in subjects], [caption_of([subject.phrase]) for subject in subjects]
