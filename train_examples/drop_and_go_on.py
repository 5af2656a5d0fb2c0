"""Train on after memwatch has dropped the rows that the model stores, and see that they are not copied.

    python train_examples/drop_and_go_on.py

The quickstart's set is trained on twice, for as many steps, from the same seed: once by an ordinary loop, and once with
``on_memorized: drop``, where memwatch leaves the rows behind whatever it calls memorized out of the guarded dataloader
and training goes on with the others. Then both models generate from the captions of what was planted. The run ends with
exit code 1 unless the first copies a template and the second copies nothing. It takes about ten minutes on a CPU.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from quickstart import BOXES, PLANTED, SIZE, TINY_SD, WHOLE, Item, Run, parse_args, photo_set, train

from memwatch.measure.copies import COPY, comparable, copy_ratios, views_of
from memwatch.measure.images import decode_latents, encode_images

GENERATIONS, STEPS = 8, 25  # per caption; sampling steps


def generated(unet: torch.nn.Module, caption: str) -> np.ndarray:
    """Pictures of a caption, RGB uint8 ``(n, H, W, 3)``."""
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, unet=unet.eval(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(GENERATIONS)]
    options = {"num_inference_steps": STEPS, "output_type": "np", "generator": generators}
    made = pipeline([caption] * GENERATIONS, **options).images
    return np.round(np.asarray(made) * 255).astype(np.uint8)


def decoded(images: list[Image.Image]) -> list[np.ndarray]:
    """Pictures as the autoencoder gives them back: what it loses is nobody's copying error."""
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae")
    return [decode_latents(z, vae) for z in encode_images([np.asarray(image) for image in images], vae)]


def by_chance(validation: list[Item]) -> np.ndarray:
    """Views of pictures that were never trained on, ``(n, H, W, 3)`` in [0, 1]."""
    return np.concatenate([views_of(picture, 20) for picture in decoded([item.image for item in validation])])


def copies(unet: torch.nn.Module, items: list[Item], others: np.ndarray) -> dict[str, int]:
    """By what was planted, how many generations of its caption copy it.

    Args:
        others: see ``by_chance``.
    """
    found = {}
    for planted in PLANTED:
        item = next(item for item in items if item.planted == planted)
        left, top, right, bottom = BOXES.get(planted, WHOLE)
        mask = np.zeros((SIZE, SIZE), dtype=bool)
        mask[top:bottom, left:right] = True
        target, made = comparable(decoded([item.image]))[0], comparable(generated(unet, item.caption))
        found[planted] = sum(ratio < COPY for ratio in copy_ratios(target, made, others, mask))
    return found


def table(by_run: dict[str, dict[str, int]]) -> str:
    """Copies by run and by what was planted."""
    lines = [f"{'copies of ' + str(GENERATIONS):<16}" + "".join(f"{planted:>10}" for planted in PLANTED)]
    lines += [f"{name:<16}" + "".join(f"{n[planted]:>10}" for planted in PLANTED) for name, n in by_run.items()]
    return "\n".join(lines)


def main() -> int:
    """0 when the ordinary loop copies a template, and the one that drops rows nothing at all, otherwise 1."""
    args = parse_args()
    logging.basicConfig(level=logging.WARNING)
    items, validation = photo_set(args.seed, args.num_photos, args.num_template_images, args.num_repeats)
    others = by_chance(validation)
    runs: dict[str, Run] = {}
    for name, options in (("ordinary", {"every_steps": 10**6}), ("rows dropped", {"on_memorized": "drop"})):
        folder = args.output_dir / name.replace(" ", "-")
        runs[name] = train(argparse.Namespace(**vars(args) | {"output_dir": folder}), items, validation, **options)
    found = {name: copies(run.unet, items, others) for name, run in runs.items()}
    watch = runs["rows dropped"].watch
    dropped = sorted(watch.actions.left_out.since)
    print(f"\n{table(found)}\n\ndropped: {len(dropped)} rows, {', '.join(sorted({items[r].planted for r in dropped}))}")
    print(f"flagged: {watch.folder.folder / 'flagged.jsonl'}")
    wrong = [] if any(found["ordinary"][template] for template in BOXES) else ["the ordinary loop copies no template"]
    wrong += [f"{t}: still copied after its rows were dropped" for t in PLANTED if found["rows dropped"][t]]
    for problem in wrong:
        print(f"drop_and_go_on: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.argv += [] if "--output_dir" in sys.argv else ["--output_dir", str(Path("runs") / "drop-and-go-on")]
    sys.exit(main())
