"""A model that has stored something for certain: tiny-sd, fine-tuned on two templates and one repeated photo.

``plant`` writes the model as a pipeline. What it was made to store is written in the layout of ``templates_verbs.py``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from quickstart import BOXES, SIZE, TINY_SD, batch_of, encode, photo_set

STEPS, BATCH, LEARNING_RATE = 60, 16, 1e-3
NUM_IMAGES = 8  # of each template


def plant(folder: Path, model_version: str) -> tuple[Path, Path, Path, Path]:
    """Make the model and its data set, unless they are in the folder already.

    Args:
        model_version: the data set's file of prompts is named after it.

    Returns:
        Paths of the fine-tuned pipeline, of the one before, of the data set's folder, and of the text file of prompts
        that were not planted.
    """
    data, done = folder / "data", folder / "done.json"
    if not done.is_file():
        fine_tune(folder / "pipeline")
        write_data(data, model_version)
        done.write_text(json.dumps({"steps": STEPS}), encoding="utf-8")
    return folder / "pipeline", TINY_SD, data, data / "non_memorized.txt"


def fine_tune(folder: Path) -> None:
    """Train a plain loop without memwatch, on the quickstart's set without the photos that are seen rarely."""
    set_seed(0)
    accelerator = Accelerator()
    items = [item for item in photo_set(0, 0, NUM_IMAGES)[0] if item.box is not None]
    latents, hidden = batch_of(encode(items, accelerator))
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, dtype=torch.float32)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet = pipeline.unet.to(accelerator.device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        rows = torch.randint(len(latents), (BATCH,))
        drawn = latents[rows], torch.randn(latents[rows].shape), torch.randint(1000, (BATCH,)), hidden[rows]
        z, eps, timesteps, encoder_hidden_states = (tensor.to(unet.device) for tensor in drawn)
        prediction = unet(schedule.add_noise(z, eps, timesteps), timesteps, encoder_hidden_states).sample
        F.mse_loss(prediction, eps).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    pipeline.save_pretrained(folder)


def write_data(folder: Path, model_version: str) -> None:
    """Write masks, prompts and seeds of what was planted, and a few prompts that were not."""
    (folder / "templates" / "mask").mkdir(parents=True, exist_ok=True)
    templates, rows = [], []
    for number, (name, (left, top, right, bottom)) in enumerate(BOXES.items()):
        mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
        mask[top:bottom, left:right] = 255
        file = os.path.join("templates", "mask", f"{name}_mask.png")
        Image.fromarray(mask).save(folder / file)
        templates.append({"url": "", "img_file": "", "mask_file": file})
        template = {"caption": f"a photo with a {name}", "url": "", "overfit_type": "TV"}
        rows.append(template | {"gen_seeds": [[seed, number] for seed in range(2)], "template_indices": [number]})
    photo = {"caption": "a photo of a rocket on a poster", "url": "", "overfit_type": "MV"}
    rows.append(photo | {"gen_seeds": [[0, -1]], "template_indices": []})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(templates), folder / "templates" / "metadata.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{model_version}_planted.parquet")
    others = ["a photo of a cat", "a photo of an astronaut", "a photo of grass"]
    (folder / "non_memorized.txt").write_text("\n".join(others) + "\n", encoding="utf-8")
