"""Random pipelines of every family, 16 px pictures and 8x8 latents (pixels: 8x8), as small as their classes allow."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from memwatch.denoiser import Components, family_of, load_components
from memwatch.denoiser.schedule import NoiseSchedule

PROMPT = "a photo of a cat"
SIZE = 16  # pixels; latents are 8x8
TOKENS, WIDTH = 32, 16
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


UNET = {"sample_size": SIZE // 2, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def clip_tokenizer(folder: Path):
    from evidence.pretrain_tiny_sd import tiny_tokenizer

    return tiny_tokenizer(folder / "words")


def t5_tokenizer() -> T5TokenizerFast:
    """The words that tests use, and single letters."""
    words = [("\u2581" + word, -3.0) for word in "a photo of the cat red poster number dog".split()]
    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    model = Tokenizer(models.Unigram(special + words + letters, unk_id=2, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    model.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    model.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=model, extra_ids=0, model_max_length=512)


def clip(tokenizer, *, projection: bool, layers: int = 2):
    config = CLIPTextConfig(
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        attention_dropout=0.1,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_encoder(width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def vae(shift: float | None = None, scale: float = 0.5) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = UNET | blocks | {"sample_size": SIZE, "latent_channels": 4}
    return AutoencoderKL(**small, shift_factor=shift, scaling_factor=scale)


def save_pipeline(folder: Path) -> Path:
    """Stable Diffusion 1."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder)
    unet = UNet2DConditionModel(**UNET, **BLOCKS, cross_attention_dim=WIDTH, attention_head_dim=4, dropout=0.1)
    parts = vae(scale=0.18215), clip(tokenizer, projection=False, layers=1), tokenizer, unet
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(*parts, scheduler, None, None, requires_safety_checker=False).save_pretrained(
        folder / "pipeline"
    )
    return folder / "pipeline"


def sdxl(folder: Path) -> Path:
    torch.manual_seed(1)
    tokenizer = clip_tokenizer(folder)
    unet = UNet2DConditionModel(
        **UNET,
        **BLOCKS,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=1,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    first, second = clip(tokenizer, projection=False), clip(tokenizer, projection=True)
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    StableDiffusionXLPipeline(
        vae(), first, second, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    ).save_pretrained(folder / "sdxl")
    return folder / "sdxl"


def sd3(folder: Path, *, t5: bool = True) -> Path:
    torch.manual_seed(2)
    tokenizer = clip_tokenizer(folder)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    encoders = clip(tokenizer, projection=True), clip(tokenizer, projection=True)
    long = (t5_encoder(2 * WIDTH), t5_tokenizer()) if t5 else (None, None)
    path = folder / ("sd3" if t5 else "sd3-without-t5")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    StableDiffusion3Pipeline(
        transformer, scheduler, vae(0.1), encoders[0], tokenizer, encoders[1], tokenizer, *long
    ).save_pretrained(path)
    return path


def flux(folder: Path, *, guidance: bool = True) -> Path:
    torch.manual_seed(3)
    tokenizer = clip_tokenizer(folder)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    for parameter in transformer.proj_out.parameters():  # starts at zero
        torch.nn.init.normal_(parameter, std=0.3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    path = folder / ("flux" if guidance else "flux-schnell")
    FluxPipeline(
        scheduler,
        vae(0.1),
        clip(tokenizer, projection=False),
        tokenizer,
        t5_encoder(WIDTH),
        t5_tokenizer(),
        transformer,
    ).save_pretrained(path)
    return path


def unconditional(folder: Path) -> Path:
    torch.manual_seed(4)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(**UNET, **blocks, attention_head_dim=8)
    DDPMPipeline(unet, DDPMScheduler(prediction_type="epsilon")).save_pretrained(folder / "unconditional")
    return folder / "unconditional"


BUILDERS = {"sdxl": sdxl, "sd3": sd3, "flux": flux, "unconditional": unconditional}


def network(pipe: DiffusionPipeline) -> nn.Module:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def adapted(pipe, pretrained=None):
    """The denoiser of a pipeline's network, and its components read from the folder."""
    model = network(pipe)
    family = family_of(model)
    wants = {"needs_vae": not family.in_pixels, "text_encoders": family.text_encoders, "optional": family.optional}
    parts = load_components(pretrained or pipe, Components(None), **wants, device=torch.device("cpu"))
    return family(model, NoiseSchedule.from_scheduler(parts.scheduler)), parts


def size_of(name: str) -> int:
    return 8 if name == "unconditional" else SIZE
