"""diffusers' example scripts in miniature, with and without memwatch: bit-identical, and the same objects deleted."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DModel
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
    made = {text_to_image_sdxl: tiny.sdxl(folder), unconditional: tiny.unconditional(folder)}
    return made | {textual_inversion: pretrained}


SCRIPTS = [text_to_image_sdxl, textual_inversion, unconditional]


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
