"""Tensor names of LoRA files: whether a file is a LoRA, and of which parts of a pipeline.

The same layer as trainers write it (``A`` is ``lora_down`` in some files, ``lora_A`` in others):

| written by | key |
|---|---|
| kohya, SD 1.x and 2.x | ``lora_unet_down_blocks_0_attentions_0_..._to_q.lora_down.weight``, ``.alpha`` |
| kohya, SDXL | ``lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight`` |
| kohya, SD 3 and Flux | ``lora_unet_joint_blocks_0_x_block_attn_qkv``..., ``lora_unet_double_blocks_0_``... |
| ComfyUI | ``diffusion_model.double_blocks.0....lora_A.weight`` |
| OneTrainer | ``lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight``; kohya's; diffusers' |
| diffusers, ai-toolkit, SimpleTuner | ``unet.`` or ``transformer.`` and the model's own name |
| PEFT | ``base_model.model.`` and the model's own name; alpha is in ``adapter_config.json`` |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from memwatch.denoiser.log_filter import is_new

logger = logging.getLogger("memwatch")

DENOISER, T5 = "denoiser", "t5"
PREFIXES = {  # of tensor names, and the part of the pipeline they mean
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": T5,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": T5,
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "diffusion_model.": DENOISER,
    "base_model.model.": DENOISER,
}
FLUX_BLOCKS = re.compile("(double|single)_(transformer_)?blocks")
EMBEDDINGS = ("bundle_emb.", "emb_params")


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA, or one of its relatives."""
    return any(re.search(r"lora|\.(hada|lokr|oft)_", name.lower()) for name in names)


def names_by_part(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The file's tensor names by part of the pipeline and by what follows the prefix; embeddings are left out."""
    names = [name for name in names if not name.startswith(EMBEDDINGS)]
    t5 = "text_encoder_2" if any(map(FLUX_BLOCKS.search, names)) else "text_encoder_3"  # the third encoder of SD 3
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        part = PREFIXES.get(prefix, DENOISER)
        parts.setdefault(t5 if part == T5 else part, {})[name.removeprefix(prefix)] = name
    return parts


def warn_of_embeddings(names: Iterable[str], file: Path) -> None:
    """Say once per file that memwatch ignores embeddings that were trained along."""
    embedding = next((name for name in names if name.startswith(EMBEDDINGS)), None)
    if embedding and is_new("memwatch", f"{file} embeddings"):
        how = "memwatch ignores the trained embeddings in this file, so their tokens have no meaning"
        logger.warning("%s: %s (%s)", file, how, embedding)
