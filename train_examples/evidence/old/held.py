"""Held: what memwatch keeps in memory between events."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from evidence.old.events import caption, quiet, smooth_noise
from torch import nn

from memwatch.callback import MemWatch
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config

NUM_PROBES = 64
RESOLUTION, SIDE = 512, 64  # pixels of Stable Diffusion 1.5, and of its latents
WIDTH, TOKENS = 768, 77  # of what its text encoder says
PASSED_OVER = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, types.FrameType)


def mapped_files() -> list[tuple[int, int]]:
    """Where files are mapped into this process, ``(start, end)``; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.is_file() else []
    of_files = (line.split()[0].split("-") for line in lines if ".safetensors" in line)
    return [(int(start, 16), int(end, 16)) for start, end in of_files]


def bytes_held(root: Any, apart_from: Iterable[Any] = ()) -> dict[str, int]:
    """Bytes of all tensors and arrays that can be reached from an object: ``cpu``, ``gpu``; each storage once.

    ``mapped`` are those that lie in a file, and take memory only while they are read.

    Args:
        apart_from: what belongs to others, and is not looked into.
    """
    files = mapped_files()

    def place(address: int) -> str:
        return "mapped" if any(start <= address < end for start, end in files) else "cpu"

    seen, sizes = {id(thing) for thing in apart_from}, {"cpu": 0, "gpu": 0, "mapped": 0}
    storages: set[int] = set()
    stack = [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, PASSED_OVER):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                sizes["gpu" if thing.is_cuda else place(storage.data_ptr())] += storage.nbytes()
        elif isinstance(thing, np.ndarray):
            whole = thing
            while isinstance(whole.base, np.ndarray):
                whole = whole.base
            if whole.ctypes.data not in storages:
                storages.add(whole.ctypes.data)
                sizes[place(whole.ctypes.data)] += whole.nbytes
        elif isinstance(thing, bytes):
            sizes["cpu"] += len(thing)
        else:
            stack += gc.get_referents(thing)
            stack += list(getattr(thing, "__dict__", {}).values())
    return sizes


def stand_in(base: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A network and parts of Stable Diffusion 1.5's sizes outside, and as narrow as can be inside.

    What memwatch keeps depends on the sizes of images, latents and conditioning, not on the network's width.

    Args:
        base: a pipeline whose words are used.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    tokenizer.model_max_length = TOKENS
    small: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        **small,
        sample_size=SIDE,
        block_out_channels=(4, 8),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
    )
    vae = AutoencoderKL(
        **small,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
    )
    words = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    encoder = CLIPTextModel(words).eval().requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler")
    return unet, {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}


def held_after_first_event(accelerator: Any, base: Path, config: MemWatchConfig | None = None) -> dict[str, int]:
    """What one ``MemWatch`` of ``NUM_PROBES`` reference probes holds: see ``bytes_held``, and ``disk`` in its folder.

    The network, the autoencoder and the text encoder are the loop's own, and do not count.
    """
    unet, parts = stand_in(base)
    with quiet(), TemporaryDirectory(prefix="memwatch-cost-") as name:
        folder, images = Path(name), Path(name) / "images"
        images.mkdir()
        for i in range(NUM_PROBES):
            smooth_noise(i, RESOLUTION).save(images / f"{i:02d}.png")
            (images / f"{i:02d}.txt").write_text(caption(i), encoding="utf-8")
        settings = load_config(config, output_dir=str(folder / "memwatch"), probes=None, controls=None, peers=None)
        watch = MemWatch(accelerator, unet.to(accelerator.device), None, config=settings, probes=str(images), **parts)
        watch.begin()
        gc.collect()
        others = [accelerator, accelerator.state, unet, *parts.values()]
        held = bytes_held(watch, others)
        disk = sum(file.stat().st_size for file in (folder / "memwatch").rglob("*") if file.is_file())
        watch.close()
    return held | {"disk": disk}
