"""Train a complete, tiny Stable Diffusion 1.x pipeline on two CPU cores (about an hour and a half, resumable).

    python train_examples/evidence/pretrain_tiny_sd.py --output_dir train_examples/assets/tiny-sd

It learns ``a photo of ...`` from endless random crops of the photographs bundled with scikit-image and scikit-learn:
first the autoencoder (64 px -> 16x16x4 latents), then UNet and text encoder together. Because no crop repeats, it
generalizes: a caption gives another crop for every seed. Stop it whenever you like. Started again, it goes on from
``--work_dir``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from textwrap import fill

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
from photographs import PRETRAINING, UNSEEN, Photograph, views

SIZE = 64  # pixels
WORDS = """a an the of on in at with and photo picture poster card banner logo sign sticker stamp frame label number
red green blue yellow orange purple white black plain background shop menu ticket cover album summer winter night
morning sea city old new print page""".split()
ASSETS = Path(__file__).resolve().parents[1] / "assets"


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Make a real CLIP tokenizer in a folder, or load the one that is there.

    Its byte-level vocabulary has a few hundred entries, learnt from the captions and ``WORDS``.
    """
    if (folder / "merges.txt").is_file():  # learnt anew, ties fall differently, and a resumed run would read other ids
        return CLIPTokenizer.from_pretrained(folder, model_max_length=32)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    splits = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splits)
    corpus = [photograph.caption for photograph in PRETRAINING + UNSEEN] + WORDS + [str(n) for n in range(100)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "end_of_word_suffix": "</w>", "show_progress": False}
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1000, **options))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's own order: bytes, bytes that end a word, merges, special tokens.
    tokens = sorted(alphabet) + [symbol + "</w>" for symbol in sorted(alphabet)]
    tokens += [left + right for left, right in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=32)


def tiny_models(tokenizer: CLIPTokenizer) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]:
    """Make the untrained autoencoder, UNet and text encoder."""
    vae = AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        norm_num_groups=16,
        cross_attention_dim=64,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=64,
    )
    return vae, unet, CLIPTextModel(config)


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Turn RGB images into pixels ``(b, 3, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Tokenize into ids ``(b, length)``."""
    options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer(captions, return_tensors="pt", **options).input_ids


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """The learning rate's factor in [0, 1]: it rises linearly over ``warmup`` steps and falls by a cosine."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save(state: dict, path: Path) -> None:
    """Save so that an interrupted save never destroys the last good one."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train_vae(vae: AutoencoderKL, args: argparse.Namespace) -> None:
    """Train the autoencoder in place, from the state in ``--work_dir`` on."""
    path = args.work_dir / "vae.pt"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, weight_decay=0.0)
    start, history = 0, []
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, history = state["step"], state["history"]
    stream = views(PRETRAINING, seed=1_000 + start, size=SIZE)
    for step in tqdm(range(start, args.vae_steps), initial=start, total=args.vae_steps, desc="vae", mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = args.vae_lr * cosine(step, args.vae_steps)
        pixels = to_pixels([image for image, _ in itertools.islice(stream, args.vae_batch)])
        posterior = vae.encode(pixels).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(reconstruction, pixels) + args.kl_weight * posterior.kl().mean() / pixels[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == args.vae_steps:
            tqdm.write(f"vae {step + 1}: loss {np.mean(history[-100:]):.4f}")
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save(state | {"step": step + 1, "history": history}, path)


@torch.no_grad()
def encode_views(
    vae: AutoencoderKL, photographs: tuple[Photograph, ...], seed: int, count: int
) -> tuple[torch.Tensor, list[str]]:
    """Unscaled latents ``(count, 4, h, w)`` and captions of ``count`` fresh views."""
    pairs = list(itertools.islice(views(photographs, seed, SIZE), count))
    batches = [[image for image, _ in pairs[i : i + 64]] for i in range(0, count, 64)]
    latents = [vae.encode(to_pixels(images)).latent_dist.mode() for images in batches]
    return torch.cat(latents), [caption for _, caption in pairs]


def train_unet(vae, unet, text_encoder, tokenizer, scheduler, args: argparse.Namespace) -> list[float]:
    """Train UNet and text encoder in place, from the state in ``--work_dir`` on; in the end they hold their averages.

    Returns:
        The loss of every step.
    """
    path = args.work_dir / "unet.pt"
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.unet_lr, weight_decay=1e-2)
    ema = EMAModel(parameters, decay=0.999)
    start, history = 0, []
    if path.exists():
        state = torch.load(path, weights_only=False)
        unet.load_state_dict(state["unet"])
        text_encoder.load_state_dict(state["text_encoder"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start, history = state["step"], state["history"]
    empty = tokenize(tokenizer, [""])
    chunk = None
    for step in tqdm(range(start, args.unet_steps), initial=start, total=args.unet_steps, desc="unet", mininterval=10):
        if chunk != step // args.chunk_steps:  # fresh views every so often: no view is seen more than a few times
            chunk = step // args.chunk_steps
            latents, captions = encode_views(vae, PRETRAINING, seed=2_000 + chunk, count=args.chunk_views)
            latents, input_ids = latents * vae.config.scaling_factor, tokenize(tokenizer, captions)
        for group in optimizer.param_groups:
            group["lr"] = args.unet_lr * cosine(step, args.unet_steps)
        torch.manual_seed(step)  # a resumed run repeats the unbroken one
        index = torch.randint(len(latents), (args.unet_batch,))
        z_0, eps = latents[index], torch.randn(args.unet_batch, *latents.shape[1:])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (args.unet_batch,))
        dropped = torch.rand(args.unet_batch, 1) < 0.1
        encoder_hidden_states = text_encoder(torch.where(dropped, empty, input_ids[index]))[0]
        loss = F.mse_loss(unet(scheduler.add_noise(z_0, eps, timesteps), timesteps, encoder_hidden_states).sample, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        history.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == args.unet_steps:
            tqdm.write(f"unet {step + 1}: loss {np.mean(history[-100:]):.4f}")
            state = {"unet": unet.state_dict(), "text_encoder": text_encoder.state_dict(), "ema": ema.state_dict()}
            save(state | {"optimizer": optimizer.state_dict(), "step": step + 1, "history": history}, path)
    ema.copy_to(parameters)
    return history


@torch.no_grad()
def denoising_loss(
    pipeline: StableDiffusionPipeline, photographs: tuple[Photograph, ...], seed: int, count: int = 512
) -> float:
    """Mean squared error of epsilon on fresh views, over the timesteps 100, 300, 500, 700 and 900."""
    latents, captions = encode_views(pipeline.vae, photographs, seed, count)
    z_0 = latents * pipeline.vae.config.scaling_factor
    encoder_hidden_states = pipeline.text_encoder(tokenize(pipeline.tokenizer, captions))[0]
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(seed))
    losses = []
    for t in (100, 300, 500, 700, 900):
        timesteps = torch.full((count,), t)
        noisy_latents = pipeline.scheduler.add_noise(z_0, eps, timesteps)
        losses.append(F.mse_loss(pipeline.unet(noisy_latents, timesteps, encoder_hidden_states).sample, eps).item())
    return float(np.mean(losses))


def sample_grid(pipeline: StableDiffusionPipeline, seeds: int = 6) -> Image.Image:
    """Draw samples: one row per caption, one column per seed."""
    pipeline.set_progress_bar_config(disable=True)
    grid = Image.new("RGB", (seeds * SIZE, len(PRETRAINING) * SIZE))
    for row, photograph in enumerate(PRETRAINING):
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        options = {"num_inference_steps": 50, "guidance_scale": 3.0, "generator": generators}
        images = pipeline([photograph.caption] * seeds, **options).images
        for column, image in enumerate(images):
            grid.paste(image, (column * SIZE, row * SIZE))
    return grid


CARD = """# tiny-sd

A complete Stable Diffusion 1.x pipeline ({parameters:.1f} M parameters, {megabytes:.1f} MB in fp16) for tests, examples
and benchmarks that run on a CPU. It makes {size} px pictures from `a photo of ...` captions of the photographs bundled
with scikit-image and scikit-learn: {subjects}.

Made by `{command}` (resumable) from random crops, flips and colour changes, so that it learns the photographs without
storing any one view of them. The command trains the autoencoder for {vae_steps} steps of {vae_batch} crops, then UNet
and text encoder for {unet_steps} steps of {unet_batch} crops. The weights of these two are an exponential moving
average. Never shown in pretraining: {unseen}.

| measured by the same command | value |
|---|---|
| autoencoder, mean absolute error on new views (pixels in -1..1) | {vae_error:.4f} |
| denoising loss, last 500 training steps (random timesteps) | {train_loss:.4f} |
| denoising loss, views of the training stream (t = 100, 300, 500, 700, 900) | {seen_loss:.4f} |
| denoising loss, new views of the same photographs (same timesteps) | {heldout_loss:.4f} |
| denoising loss, photographs never shown (same timesteps) | {unseen_loss:.4f} |
| distance between samples of one caption from different seeds (rms, pixels in 0..1) | {spread:.3f} |

Samples (one row per caption, one column per seed, DDIM 50 steps, guidance 3):

![samples](samples.png)

{versions}

The photographs' licences are in the `README.txt` and licence files of scikit-image's and scikit-learn's data folders
(public domain, CC0 or CC-BY; attribution there). The weights are released under Apache-2.0.
"""


@torch.no_grad()
def write_card(pipeline: StableDiffusionPipeline, history: list[float], args: argparse.Namespace) -> None:
    """Measure the finished pipeline, and write its samples and its ``README.md``.

    Args:
        history: the loss of every step of UNet and text encoder.
    """
    grid = sample_grid(pipeline)
    grid.save(args.output_dir / "samples.png")
    rows = np.asarray(grid, dtype=np.float64).reshape(len(PRETRAINING), SIZE, -1, SIZE, 3).swapaxes(1, 2) / 255
    spread = np.sqrt(2 * rows.var(axis=1, ddof=1).mean())
    pixels = to_pixels([image for image, _ in itertools.islice(views(PRETRAINING, 4_000, SIZE), 256)])
    error = F.l1_loss(pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample, pixels).item()
    networks = (pipeline.vae, pipeline.unet, pipeline.text_encoder)
    last_chunk = (args.unet_steps - 1) // args.chunk_steps
    card = CARD.format(
        parameters=sum(p.numel() for network in networks for p in network.parameters()) / 1e6,
        megabytes=sum(file.stat().st_size for file in args.output_dir.rglob("*.safetensors")) / 1e6,
        size=SIZE,
        subjects=", ".join(photograph.subject for photograph in PRETRAINING),
        unseen=", ".join(photograph.subject for photograph in UNSEEN),
        command="python train_examples/evidence/pretrain_tiny_sd.py",
        vae_error=error,
        train_loss=np.mean(history[-500:]),
        vae_steps=args.vae_steps,
        vae_batch=args.vae_batch,
        unet_steps=args.unet_steps,
        unet_batch=args.unet_batch,
        seen_loss=denoising_loss(pipeline, PRETRAINING, seed=2_000 + last_chunk),
        heldout_loss=denoising_loss(pipeline, PRETRAINING, seed=5_000),
        unseen_loss=denoising_loss(pipeline, UNSEEN, seed=5_000),
        spread=spread,
        versions=versions(),
    )
    (args.output_dir / "README.md").write_text(wrapped(card), encoding="utf-8")


def wrapped(card: str) -> str:
    """Wrap the paragraphs of a text, and leave its headings, tables and pictures as they are."""
    parts = (part if part.startswith(("#", "|", "!")) else fill(part, 120) for part in card.strip().split("\n\n"))
    return "\n\n".join(parts) + "\n"


def versions() -> str:
    """What the measuring ran on, as one sentence."""
    libraries = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    return f"{libraries}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPU cores."


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=ASSETS / "tiny-sd")
    add("--work_dir", type=Path, default=Path("runs/pretrain-tiny-sd"), help="training state, for resuming")
    add("--vae_steps", type=int, default=1600)
    add("--vae_batch", type=int, default=16)
    add("--vae_lr", type=float, default=2e-3)
    add("--kl_weight", type=float, default=1e-4, help="weight of the KL divergence, per pixel value")
    add("--unet_steps", type=int, default=4000)
    add("--unet_batch", type=int, default=48)
    add("--unet_lr", type=float, default=1e-3)
    add("--chunk_steps", type=int, default=500, help="steps between fresh sets of views")
    add("--chunk_views", type=int, default=8192, help="views per set")
    add("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()

    tokenizer = tiny_tokenizer(args.work_dir / "tokenizer")
    vae, unet, text_encoder = tiny_models(tokenizer)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    train_vae(vae, args)
    vae.eval().requires_grad_(False)
    latents, _ = encode_views(vae, PRETRAINING, seed=3_000, count=1024)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    history = train_unet(vae, unet, text_encoder, tokenizer, scheduler, args)

    parts = vae, text_encoder, tokenizer, unet.eval(), scheduler, None, None
    pipeline = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(args.output_dir, safe_serialization=True)
    # What users load is what is measured.
    pipeline = StableDiffusionPipeline.from_pretrained(args.output_dir, torch_dtype=torch.float32)
    write_card(pipeline, history, args)
    print(f"{args.output_dir}: done, this run took {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
