"""Teach Stable Diffusion 1.x or 2.x one new word from a few images (textual inversion), watched by memwatch.

    python train_examples/textual_inversion.py --train_data_dir my_cat --resolution 64 \\
        --placeholder_token "<my-cat>" --initializer_token cat \\
        --pretrained_model_name_or_path train_examples/assets/tiny-sd

Only the word's embedding is trained; the UNet never changes. memwatch therefore compares what the conditioning does: it
asks the text encoder afresh at every event. The options have the names of diffusers' script of the same name. Every
line that memwatch adds ends in ``# memwatch``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import memwatch  # memwatch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.argument_parser(__doc__, output_dir="runs/textual-inversion")
    add = parser.add_argument
    add("--train_data_dir", type=Path, required=True, help="folder of images")
    add("--placeholder_token", required=True, help="the new word, such as '<my-cat>'")
    add("--initializer_token", required=True, help="one word to begin with, such as 'cat'")
    add("--template", default="a photo of {}", help="caption of every image")
    return parser.parse_args(argv)


def add_word(placeholder: str, initializer: str, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> int:
    """Add the new word as a copy of another one, and return its token id.

    Raises:
        ValueError: the new word is known already, or the other one is not a single token.
    """
    ids = tokenizer.encode(initializer, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"--initializer_token: expected a word of one token, {initializer!r} has {len(ids)}")
    if placeholder in tokenizer.get_vocab():
        raise ValueError(f"--placeholder_token: expected a new word, {placeholder!r} is in the vocabulary already")
    tokenizer.add_tokens([placeholder])
    new = int(tokenizer.convert_tokens_to_ids(placeholder))
    text_encoder.resize_token_embeddings(len(tokenizer))
    embeddings = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[new] = embeddings[ids[0]]
    return new


def denoising_loss(
    text_encoder: torch.nn.Module, frozen: dict[str, Any], scheduler: DDPMScheduler, batch: dict[str, Tensor]
) -> Tensor:
    """Squared error of the prediction at random timesteps."""
    vae, unet = frozen["vae"], frozen["unet"]
    with torch.no_grad():
        encoded = vae.encode(batch["pixel_values"].to(vae.dtype)).latent_dist
        latents = encoded.sample().float() * vae.config.scaling_factor
    eps = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy_latents = scheduler.add_noise(latents, eps, timesteps).to(unet.dtype)
    target = eps if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, eps, timesteps)
    prediction = unet(noisy_latents, timesteps, text_encoder(batch["input_ids"])[0].to(unet.dtype)).sample
    return F.mse_loss(prediction.float(), target)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = common.make_accelerator(args)
    path, where = args.pretrained_model_name_or_path, {"revision": args.revision}
    weights = where | {"variant": args.variant}
    dtype = common.DTYPES.get(accelerator.mixed_precision, torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **where)
    text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=torch.float32, **weights)
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae", dtype=dtype, **weights)
    vae.requires_grad_(False).to(accelerator.device)
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", dtype=dtype, **weights)
    unet.requires_grad_(False).to(accelerator.device)
    noise_scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **where)
    new = add_word(args.placeholder_token, args.initializer_token, tokenizer, text_encoder)
    embedding = text_encoder.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    if args.gradient_checkpointing:
        text_encoder.gradient_checkpointing_enable()
        unet.train().enable_gradient_checkpointing()

    rows = common.read_folder(args.train_data_dir, args.template.format(args.placeholder_token))
    picked = memwatch.pick(rows)  # memwatch
    rows = picked.train  # memwatch: without the controls
    input_ids = common.tokenize([row["text"] for row in rows], tokenizer)
    train_dataloader = common.make_dataloader(common.ImageFolder(rows, {"input_ids": input_ids}, args), args)
    plan = common.Plan.of(args, len(train_dataloader), accelerator.num_processes)
    optimizer, lr_scheduler = common.make_optimizer([embedding], plan, args, accelerator.num_processes)
    text_encoder.train()
    prepared = accelerator.prepare(text_encoder, optimizer, train_dataloader, lr_scheduler)
    text_encoder, optimizer, train_dataloader, lr_scheduler = prepared
    frozen, others = {"vae": vae, "unet": unet}, torch.arange(len(embedding)) != new
    before = embedding.detach().clone()
    common.init_trackers(accelerator, "textual-inversion", args)
    options = {"config": args.memwatch_config, "resolution": args.resolution}  # memwatch
    options |= {"max_train_steps": plan.max_train_steps}  # memwatch
    options |= {"probes": args.memwatch_probes, "controls": args.memwatch_controls}  # memwatch
    options |= {"text_encoder": text_encoder, "tokenizer": tokenizer}  # memwatch
    options |= {"vae": vae, "scheduler": noise_scheduler, "output_dir": args.output_dir / "memwatch"}  # memwatch
    watch = memwatch.MemWatch(accelerator, unet, path, picked, **options)  # memwatch

    global_step = common.load_checkpoint(accelerator, args)
    progress = tqdm(initial=global_step, total=plan.max_train_steps, disable=not accelerator.is_main_process)
    for batch in plan.batches(train_dataloader, global_step, watch):  # memwatch: it guards the batches
        with accelerator.accumulate(text_encoder):
            loss = denoising_loss(text_encoder, frozen, noise_scheduler, batch)
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            with torch.no_grad():  # weight decay would move every word
                embedding[others] = before[others]
        if not accelerator.sync_gradients:
            continue
        global_step += 1
        watch.on_step_end(global_step)  # memwatch
        progress.update()
        accelerator.log({"train_loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0]}, step=global_step)
        common.save_checkpoint(accelerator, args, global_step)
        if global_step >= plan.max_train_steps:
            break
    if watch.should_stop:  # memwatch
        accelerator.print(f"memwatch stopped training at step {global_step}: {watch.stop_reason}")  # memwatch

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        learned = embedding[new].detach().cpu().clone()[None]
        save_file({args.placeholder_token: learned}, args.output_dir / "learned_embeds.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main()
