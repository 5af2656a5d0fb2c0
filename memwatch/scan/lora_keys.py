"""Keys of LoRA files: whether a file is a LoRA, of which parts of the pipeline, and what is no plain LoRA.

The same layer, as trainers write it (``A`` is ``lora_down`` in some, ``lora_A`` in others):

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
from collections.abc import Iterable, Sequence
from pathlib import Path

from memwatch.denoiser.log_filter import is_new
from memwatch.scan.reading import CheckpointError

logger = logging.getLogger("memwatch")

DENOISER = "denoiser"

# Prefixes and the part that they mean; T5 is the third encoder of SD 3 and the second one of Flux.
TEXT = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "t5",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "t5",
}
NETWORK = ("lora_unet_", "lora_transformer_", "unet.", "transformer.", "diffusion_model.", "base_model.model.")
EMBEDDINGS = ("bundle_emb.", "emb_params")
OTHERS = {  # what is no plain LoRA, by the end of its names
    r"\.(dora_scale|lora_magnitude_vector(\.weight)?)": "a DoRA",
    r"\.hada_(w|t)\w+": "a LoHa",
    r"\.lokr_(w|t)\w+": "a LoKr",
    r"\.oft_\w+(\.\w+)?": "an OFT",
    r"\.lora_mid\.weight": "a LoRA with a Tucker decomposition",
    r"\.diff(_b)?": "a difference of whole weights",
}


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA, or one of its relatives."""
    return any(re.search(r"lora|\.(hada|lokr|oft)_", name.lower()) for name in names)


def parts_in(names: Iterable[str]) -> set[str]:
    """``DENOISER`` and names of text encoders that a LoRA file has tensors of."""
    names = list(names)
    return {part_of(name, names) for name in names if not name.startswith(EMBEDDINGS)}


def part_of(name: str, names: Sequence[str]) -> str:
    """``DENOISER`` or a text encoder's name; ``names`` are all that the file has."""
    part = next((part for prefix, part in TEXT.items() if name.startswith(prefix)), DENOISER)
    if part != "t5":
        return part
    is_flux = any(re.search("(double|single)_(transformer_)?blocks", other) for other in names)
    return "text_encoder_2" if is_flux else "text_encoder_3"


def without_prefix(name: str) -> str:
    """The rest of a key, which names the layer."""
    return name.removeprefix(next((prefix for prefix in (*TEXT, *NETWORK) if name.startswith(prefix)), ""))


def refuse_others(names: Sequence[str], file: Path) -> None:
    """Whatever is more than ``A`` and ``B`` would be read as another model than it is.

    That holds for a DoRA too, which diffusers can load: with ``B`` at zero it is not the base. Embeddings that were
    trained along are left out, which is said once per file.

    Raises:
        CheckpointError: it is a relative of LoRA, which the message names.
    """
    for ending, kind in OTHERS.items():
        name = next((name for name in names if re.search(ending + "$", name)), None)
        if name is not None:
            instead = "memwatch reads plain LoRA (linear and convolution layers); merge it into a full checkpoint"
            raise CheckpointError(f"{file}: is {kind} ({name}); {instead}")
    left_out = next((name for name in names if name.startswith(EMBEDDINGS)), None)
    if left_out and is_new("memwatch", f"{file} embeddings"):
        logger.warning("memwatch: %s: its embeddings (%s) are left out; their tokens mean nothing here", file, left_out)
