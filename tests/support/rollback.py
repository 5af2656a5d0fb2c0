"""Pipelines that are trained in many ways, and what they say, to compare a rolled-back one with the kept one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from support.builders import CONFIG
from support.families import PROMPT, adapted, network, size_of
from support.processes import new_process
from torch import Tensor, nn

from memwatch.act.last_clean import LastClean
from memwatch.config_file import load_config
from memwatch.denoiser import Components, as_tuple
from memwatch.faults import Faults
from memwatch.measure.observer import Observer
from memwatch.ranks import Ranks


def frozen(folder: Path) -> DiffusionPipeline:
    """The pipeline as training scripts hold it before they choose what to train."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipe


def keeper_of(pipe: DiffusionPipeline, folder: Path, *, encoders: Any = None, tokenizers: Any = None, **more: Any):
    """A ``LastClean`` of a pipeline whose networks are trained; failures are errors unless ``strict`` is False."""
    new_process()
    strict, ema = more.pop("strict", True), more.pop("ema", None)
    size = size_of("unconditional") if "vae" not in pipe.components else None
    config = load_config(CONFIG, output_dir=str(folder), **({"resolution": size} if size else {}))
    given = Components(pipe.scheduler, getattr(pipe, "vae", None), as_tuple(encoders), as_tuple(tokenizers))
    ranks = Ranks.of(Accelerator(cpu=True))
    observer = Observer(ranks, network(pipe), pipe, given, config=config, probes=[PROMPT], ema=ema)
    return LastClean(observer, folder, Faults(strict=strict))


def train(pipe: DiffusionPipeline, seed: int) -> None:
    """Move everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    with torch.no_grad():
        for p in (p for part in parts for p in part.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))


@torch.no_grad()
def said(pipe: DiffusionPipeline, prompt: str = PROMPT) -> Tensor:
    """The network's output at a fixed input, with the prompt as the pipeline's text encoders understand it."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    denoiser, parts = adapted(pipe)
    channels = 3 if denoiser.in_pixels else denoiser.latent_channels
    noisy = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(9))
    conditioning = denoiser.stack([denoiser.encode(prompt, parts, size_of("sd1"))])
    return denoiser.output(noisy, torch.tensor([301]), conditioning)


def loaded(folder: Path, pretrained: Path) -> DiffusionPipeline:
    """A fresh pipeline after the line that ``memwatch.json`` holds."""
    line = json.loads((folder / "memwatch.json").read_text(encoding="utf-8"))["load"]
    pipe = DiffusionPipeline.from_pretrained(pretrained)
    names: dict[str, Any] = {"pipe": pipe, "safetensors": safetensors} | vars(diffusers) | vars(transformers)
    exec(line, names)
    for part in pipe.components:
        if isinstance(names.get(part), nn.Module):
            setattr(pipe, part, names[part])
    return pipe


def add_lora(
    part: nn.Module, *, name: str = "default", modules=("to_q", "to_v"), rank: int = 2, **options: Any
) -> None:
    from peft import LoraConfig

    torch.manual_seed(5)
    options |= {"r": rank, "lora_alpha": 3 * rank, "lora_dropout": 0.2, "target_modules": list(modules)}
    part.add_adapter(LoraConfig(**options), adapter_name=name)


def snapshot(pipe: DiffusionPipeline) -> dict[str, Any]:
    """All of the live networks that writing could disturb."""
    found: dict[str, Any] = {"random": torch.get_rng_state()}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            parameters, modules = list(part.parameters()), list(part.modules())
            found[name] = [
                {key: p.detach().clone() for key, p in part.state_dict().items()},
                len(part._state_dict_hooks),
            ]
            found[name] += [[(p.data_ptr(), p.requires_grad) for p in parameters], [m.training for m in modules]]
            found[name] += [{key: str(value) for key, value in vars(part.config).items()}]
    return found
