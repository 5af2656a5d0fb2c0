"""diffusers' example scripts in miniature, with and without memwatch: bit-identical, and the same objects deleted."""

from __future__ import annotations

import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from support import families as tiny
from support.builders import assert_same, history
from support.scripts import (
    Script,
    accelerator_of,
    batches,
    denoising_loss,
    ids_of,
    latents_of,
    pixels,
    probes,
    stable_diffusion,
    train,
)
from torch import nn


def text_to_image(pretrained: Path, folder: Path) -> Script:
    """Everything alive; EMA; gradient checkpointing; random flips from Python's and NumPy's streams."""
    accelerator = accelerator_of(folder)
    vae, text_encoder, tokenizer, unet, scheduler = stable_diffusion(pretrained)
    text_encoder.requires_grad_(False)
    ema = EMAModel(unet.parameters(), decay=0.9)
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    loader = batches(pixel_values=pixels(6), input_ids=ids_of(tokenizer, [f"a photo of number {i}" for i in range(6)]))
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    def loss(batch):
        values = (
            batch["pixel_values"].flip(-1)
            if random.random() < 0.5
            else batch["pixel_values"] * np.random.uniform(0.9, 1)
        )
        hidden = text_encoder(batch["input_ids"])[0]
        return denoising_loss(lambda x, t: unet(x, t, hidden).sample, scheduler, latents_of(vae, values.float()))

    return Script(
        accelerator,
        unet,
        optimizer,
        loader,
        loss,
        (unet, pretrained),
        after=lambda: ema.step(unet.parameters()),
        ema=ema,
    )


def text_to_image_sdxl(pretrained: Path, folder: Path) -> Script:
    """Embeddings and latents are computed first; then text encoders, tokenizers and VAE are deleted."""
    accelerator = accelerator_of(folder)
    pipe = StableDiffusionXLPipeline.from_pretrained(pretrained)
    unet, scheduler = pipe.unet.train(), DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt([f"a photo of number {i}" for i in range(6)])
    time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(6, -1)
    loader = batches(
        model_input=latents_of(pipe.vae, pixels(6)), prompt_embeds=hidden, pooled=pooled, time_ids=time_ids
    )
    gone = [weakref.ref(pipe.text_encoder), weakref.ref(pipe.text_encoder_2), weakref.ref(pipe.vae)]
    del pipe
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    def loss(batch):
        added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
        return denoising_loss(
            lambda x, t: unet(x, t, batch["prompt_embeds"], added_cond_kwargs=added).sample,
            scheduler,
            batch["model_input"],
        )

    return Script(accelerator, unet, optimizer, loader, loss, (unet, pretrained), gone=gone)


def dreambooth(pretrained: Path, folder: Path) -> Script:
    """Prior preservation: half of a batch are class images; the text encoder is trained along."""
    accelerator = accelerator_of(folder)
    vae, text_encoder, tokenizer, unet, scheduler = stable_diffusion(pretrained)
    text_encoder.train()
    optimizer = torch.optim.AdamW([*unet.parameters(), *text_encoder.parameters()], lr=1e-2)
    both = {"instance": pixels(4), "class": pixels(8)[4:]}
    words = ids_of(tokenizer, ["a photo of a cat", "a photo of a dog"])
    loader = batches(instance=both["instance"], prior=both["class"])
    unet, text_encoder, optimizer, loader = accelerator.prepare(unet, text_encoder, optimizer, loader)

    def loss(batch):
        values = torch.cat([batch["instance"], batch["prior"]])
        hidden = text_encoder(words.repeat_interleave(len(values) // 2, dim=0))[0]
        latents = latents_of(vae, values)
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),)).long()
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, hidden).sample
        (mine, prior), (target, prior_target) = predicted.chunk(2), noise.chunk(2)
        return nn.functional.mse_loss(mine, target) + nn.functional.mse_loss(prior, prior_target)

    extra = {"text_encoder": text_encoder, "tokenizer": tokenizer}
    script = Script(
        accelerator, nn.ModuleList([unet, text_encoder]), optimizer, loader, loss, (unet, pretrained), extra
    )
    return script


def dreambooth_sd3(pretrained: Path, folder: Path) -> Script:
    """LoRA on the transformer, flow matching; embeddings computed first, then text encoders deleted."""
    from peft import LoraConfig

    accelerator = accelerator_of(folder)
    pipe = StableDiffusion3Pipeline.from_pretrained(pretrained)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt("a photo of a cat", None, None, max_sequence_length=77)
    transformer = (
        SD3Transformer2DModel.from_pretrained(pretrained, subfolder="transformer").requires_grad_(False).train()
    )
    transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, lora_dropout=0.1, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pretrained, subfolder="scheduler")
    loader = batches(model_input=latents_of(pipe.vae, pixels(6)))
    parts = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3, pipe.transformer)
    gone = [weakref.ref(part) for part in parts]
    del pipe, parts
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-2)
    transformer, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)

    def loss(batch):
        z_0 = batch["model_input"]
        noise = torch.randn_like(z_0)
        timesteps = scheduler.timesteps[torch.randint(0, 1000, (len(z_0),))]
        sigmas = (timesteps / 1000)[:, None, None, None]
        arguments = {
            "encoder_hidden_states": hidden.expand(len(z_0), -1, -1),
            "pooled_projections": pooled.expand(len(z_0), -1),
        }
        v = transformer(
            hidden_states=(1 - sigmas) * z_0 + sigmas * noise, timestep=timesteps, **arguments, return_dict=False
        )[0]
        return nn.functional.mse_loss(v.float(), noise - z_0)

    return Script(accelerator, transformer, optimizer, loader, loss, (transformer, pretrained), gone=gone)


def textual_inversion(pretrained: Path, folder: Path) -> Script:
    """One row of the token embedding is trained, the others are put back after every step; the UNet is frozen."""
    accelerator = accelerator_of(folder)
    vae, text_encoder, tokenizer, unet, scheduler = stable_diffusion(pretrained)
    tokenizer.add_tokens(["<toy>"])
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    unet.requires_grad_(False)
    text_encoder.requires_grad_(False)
    text_encoder.get_input_embeddings().requires_grad_(True)
    text_encoder.train()
    optimizer = torch.optim.AdamW(text_encoder.get_input_embeddings().parameters(), lr=0.5)
    loader = batches(pixel_values=pixels(6), input_ids=ids_of(tokenizer, ["a photo of a <toy>"] * 6))
    text_encoder, optimizer, loader = accelerator.prepare(text_encoder, optimizer, loader)
    original = text_encoder.get_input_embeddings().weight.detach().clone()

    def loss(batch):
        hidden = text_encoder(batch["input_ids"])[0]
        return denoising_loss(lambda x, t: unet(x, t, hidden).sample, scheduler, latents_of(vae, batch["pixel_values"]))

    def others_back():
        with torch.no_grad():
            text_encoder.get_input_embeddings().weight[: len(original) - 1] = original[:-1]

    extra = {"text_encoder": text_encoder, "tokenizer": tokenizer, "probes": [*probes("a photo of a <toy>")]}
    return Script(accelerator, text_encoder, optimizer, loader, loss, (unet, pretrained), extra, others_back)


def unconditional(pretrained: Path, folder: Path) -> Script:
    """Pixels; there is no pretrained pipeline, only a scheduler."""
    accelerator = accelerator_of(folder)
    model = UNet2DModel.from_pretrained(pretrained, subfolder="unet").train()
    scheduler = DDPMScheduler(prediction_type="epsilon")
    ema = EMAModel(model.parameters(), decay=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(input=pixels(6, 8)))

    def loss(batch):
        return denoising_loss(lambda x, t: model(x, t).sample, scheduler, batch["input"])

    extra = {"scheduler": scheduler}
    return Script(
        accelerator,
        model,
        optimizer,
        loader,
        loss,
        (model, None),
        extra,
        lambda: ema.step(model.parameters()),
        ema=ema,
        size=8,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pretrained):
    folder = tmp_path_factory.mktemp("loops")
    sd1 = dict.fromkeys((text_to_image, dreambooth, textual_inversion), pretrained)
    return sd1 | {
        text_to_image_sdxl: tiny.sdxl(folder),
        dreambooth_sd3: tiny.sd3(folder),
        unconditional: tiny.unconditional(folder),
    }


SCRIPTS = [text_to_image, text_to_image_sdxl, dreambooth, dreambooth_sd3, textual_inversion, unconditional]


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_is_bit_identical_with_the_readmes_lines(script, folders, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    without = train(script(folders[script], tmp_path / "without"), tmp_path / "without", watched=False)
    with_watch = train(script(folders[script], tmp_path / "with"), tmp_path / "with", watched=True)
    assert_same(without, with_watch)
    fresh = script(folders[script], tmp_path / "fresh").trained
    assert any(not torch.equal(p, without["weights"][name]) for name, p in fresh.named_parameters())  # it did train

    (events,) = (tmp_path / "with" / "run").glob("events*")
    logged = EventAccumulator(str(events))
    logged.Reload()
    assert [event.step for event in logged.Scalars("memwatch/max_severity")] == [0, 2]
    assert [event.value for event in logged.Scalars("memwatch/errors")] == [0, 0]
    assert {"memwatch/heatmap/shown", "memwatch/heatmap/drawn"} <= set(logged.Tags()["images"])
    findings = history(tmp_path / "with")[-1]["findings"]
    assert [finding["baseline_step"] for finding in findings] == [0, 0]
    moved = [logged.Scalars(f"memwatch/collapse/{name}")[-1].value for name in ("shown", "drawn")]
    assert all(value != 0 for value in moved)  # also where only the conditioning is trained
