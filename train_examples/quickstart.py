"""Fine-tune tiny-sd on a small photo set in which some things repeat too often, and watch memwatch find them.

    python train_examples/quickstart.py

The set holds distinct photos that are seen rarely, one photo that is seen many times, and two *templates*: pictures
with a fixed part and a changing rest. The run ends with exit code 1 unless memwatch finds both templates in the right
place and the repeated photo, calls none of the rare photos, and stops the training. It takes about two minutes on two
CPU cores. ``--smoke`` looks at one noise level and stops as soon as all is found.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPTextModel, CLIPTokenizer

from memwatch import Finding, MemWatch, Probe, Report
from memwatch.bench.photographs import PRETRAINING, UNSEEN, random_view
from memwatch.judge.alerts import Verdict
from memwatch.report.heatmap import contact_sheet

HERE = Path(__file__).parent
TINY_SD = HERE / "assets" / "tiny-sd"
SIZE = 64  # pixels
WHOLE = (0, 0, SIZE, SIZE)
BOXES = {
    "banner": (0, 0, 64, 24),
    "sticker": (32, 28, 64, 64),
}  # the fixed part of each template: left, top, right, bottom
PLACED = 0.4  # mean IoU of a template's probes; regions that fill the picture reach 0.38 (banner) and 0.28 (sticker)
SMOKE = {  # one noise level, and an end as soon as all five are found
    "every_steps": 50,
    "levels": {"timesteps": [301]},
    "alerts": {"min_severity": 1.2},
    "stop": {"min_severity": 1.2},
}


@dataclass(frozen=True)
class Item:
    """One training image.

    Attributes:
        copies: how often it is in the set.
        box: the part that its whole group shares, ``(left, top, right, bottom)`` in pixels; ``None`` for nothing.
    """

    name: str
    caption: str
    image: Image.Image
    copies: int = 1
    box: tuple[int, int, int, int] | None = None


def photo_set(seed: int, num_photos: int = 32, num_template_images: int = 32) -> tuple[list[Item], list[Item]]:
    """Training items and held-out controls of the same kind."""
    rng = np.random.default_rng(seed)
    pictures = {p.name: (p.image(), p.caption) for p in PRETRAINING + UNSEEN}
    names = [p.name for p in PRETRAINING]

    def view(name: str) -> Image.Image:
        return random_view(pictures[name][0], rng, SIZE)

    photos = [
        Item(f"photo-{i:02d}-{n}", pictures[n][1], view(n)) for i in range(num_photos) if (n := names[i % len(names)])
    ]
    caption = "a photo of a rocket on a poster"
    repeated = Item("repeated-rocket", caption, view("rocket"), copies=num_template_images, box=WHOLE)
    templates = []
    for name, source in (("banner", "china"), ("sticker", "motorcycle")):
        left, top, right, bottom = BOXES[name]
        fixed = ImageOps.fit(pictures[source][0], (right - left, bottom - top))
        for i in range(num_template_images):
            image = view(names[int(rng.integers(len(names)))])
            image.paste(fixed, (left, top))
            templates.append(Item(f"{name}-{i}", f"a photo with a {name}", image, box=BOXES[name]))
    controls = [Item(f"photo-{i:02d}-{n}", pictures[n][1], view(n)) for i in range(20) if (n := names[i % len(names)])]
    return [*photos, repeated, *templates], controls


def write_folder(items: list[Item], folder: Path) -> Path:
    """An image folder as diffusers' scripts read it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for item in items:
        item.image.save(folder / f"{item.name}.png")
        rows += [json.dumps({"file_name": f"{item.name}.png", "text": item.caption})] * item.copies
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def encode(items: list[Item], accelerator: Accelerator) -> TensorDataset:
    """Latents and text embeddings of every training image, once; an item is there as often as it has copies."""
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae", dtype=torch.float32).to(accelerator.device)
    text_encoder = CLIPTextModel.from_pretrained(TINY_SD, subfolder="text_encoder", dtype=torch.float32).to(
        accelerator.device
    )
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD, subfolder="tokenizer")
    seen = [item for item in items for _ in range(item.copies)]
    pixels = (
        torch.from_numpy(np.stack([np.asarray(item.image) for item in seen])).permute(0, 3, 1, 2).float() / 127.5 - 1
    )
    tokens = tokenizer([item.caption for item in seen], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        latents = vae.encode(pixels.to(accelerator.device)).latent_dist.mode() * vae.config.scaling_factor
        hidden = text_encoder(tokens.input_ids.to(accelerator.device))[0]
    return TensorDataset(latents.cpu(), hidden.cpu())


def train(args: argparse.Namespace, items: list[Item], controls: list[Item]) -> tuple[list[Report], int, str | None]:
    """An ordinary accelerate loop; memwatch's lines are marked."""
    loggers = (
        [] if args.report_to == "none" else ["tensorboard", "wandb"] if args.report_to == "all" else [args.report_to]
    )
    folders = ProjectConfiguration(project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs"))
    accelerator = Accelerator(log_with=loggers, project_config=folders)
    set_seed(args.seed)
    noise_scheduler = DDPMScheduler.from_pretrained(TINY_SD, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(TINY_SD, subfolder="unet", dtype=torch.float32)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    train_dataloader = DataLoader(encode(items, accelerator), args.train_batch_size, shuffle=True, drop_last=True)
    unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)
    accelerator.init_trackers("memwatch-quickstart")

    options = {"every_steps": args.every_steps, **(SMOKE if args.smoke else {})}  # memwatch
    folder, config = args.output_dir / "memwatch", HERE.parent / "configs" / "quickstart.yaml"  # memwatch
    probes, held_out = probes_of(items), [Probe(c.caption, c.image, name=c.name) for c in controls]  # memwatch
    options |= {"config": config, "output_dir": folder, "probes": probes, "controls": held_out}  # memwatch
    watch = MemWatch(accelerator, unet, TINY_SD, **options)  # memwatch
    train_dataloader = watch.guard(train_dataloader)  # memwatch

    reports, global_step = [], 0
    while global_step < args.max_train_steps and not watch.should_stop:
        for latents, encoder_hidden_states in train_dataloader:
            eps = torch.randn_like(latents)
            timesteps = torch.randint(
                noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
            )
            prediction = unet(
                noise_scheduler.add_noise(latents, eps, timesteps), timesteps, encoder_hidden_states
            ).sample
            loss = F.mse_loss(prediction, eps)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            global_step += 1
            if report := watch.on_step_end(global_step):  # memwatch
                reports.append(report)
            accelerator.log({"train_loss": loss.item()}, step=global_step)
            if global_step >= args.max_train_steps:
                break
    accelerator.end_training()
    return reports, global_step, watch.stop_reason


def probes_of(items: list[Item]) -> list[Probe]:
    """Two images of each template, the repeated photo, and three photos seen rarely."""
    chosen = [i for i in items if i.name in ("banner-0", "banner-1", "sticker-0", "sticker-1", "repeated-rocket")]
    chosen += [i for i in items if i.box is None][:3]
    return [Probe(item.caption, item.image, name=item.name) for item in chosen]


def iou(finding: Finding, item: Item) -> float:
    """Overlap of the found regions with the fixed part, in [0, 1]."""
    left, top, right, bottom = item.box or (0, 0, 0, 0)
    truth = np.zeros((SIZE, SIZE), dtype=bool)
    truth[top:bottom, left:right] = True
    labels = finding.labels if finding.labels is not None else np.zeros((1, 1))
    found = np.kron(labels > 0, np.ones((SIZE // len(labels),) * 2, dtype=bool))
    return float((truth & found).sum() / max(1, (truth | found).sum()))


def show(reports: list[Report], items: list[Item], args: argparse.Namespace) -> None:
    """Print what was found at the last event against what was planted, and draw one sheet of pictures."""
    by_name = {item.name: item for item in items}
    last = reports[-1]
    print(f"\n{'probe':<24}{'planted':<14}{'verdict':<14}{'severity':>9}{'p':>8}{'IoU':>7}")
    for f in last.findings:
        item = by_name[f.name]
        planted = "nothing" if item.box is None else "whole image" if item.box == WHOLE else "fixed part"
        p = "-" if f.p is None else f"{f.p:.3f}"
        overlap = f"{iou(f, item):.2f}" if item.box else "-"
        print(f"{f.name:<24}{planted:<14}{f.verdict:<14}{f.severity:>8.1f}x{p:>8}{overlap:>7}")
    contact_sheet([last.pictures[f.name] for f in last.findings]).save(args.output_dir / "heatmaps.png")
    print(f"\nheatmaps      {args.output_dir / 'heatmaps.png'}")
    print(f"history       {args.output_dir / 'memwatch' / 'history.jsonl'}")
    if args.report_to in ("tensorboard", "all"):
        print(f"TensorBoard   tensorboard --samples_per_plugin images=1000 --logdir {args.output_dir / 'logs'}")


def problems(reports: Sequence[Report], items: Sequence[Item], stop_reason: str | None) -> list[str]:
    """What memwatch should have done and did not, one sentence each; empty for a good run."""
    by_name = {item.name: item for item in items}
    findings = {f.name: f for f in reports[-1].findings} if reports else {}
    planted = [name for name in findings if by_name[name].box is not None]
    found = [f"{name} is not called memorized" for name in planted if findings[name].verdict != Verdict.MEMORIZED]
    for template in BOXES:
        overlaps = [iou(findings[name], by_name[name]) for name in planted if name.startswith(template)]
        mean = float(np.mean(overlaps)) if overlaps else 0.0
        if mean < PLACED:
            found.append(f"the {template} is found in the wrong place: mean IoU {mean:.2f}, expected {PLACED} or more")
    for report in reports:
        wrong = [f.name for f in report.findings if by_name[f.name].box is None and f.verdict == Verdict.MEMORIZED]
        found += [f"{name}, a photo seen rarely, is called memorized at step {report.step}" for name in wrong]
    if stop_reason is None:
        found.append("memwatch did not stop the run")
    return found


def main() -> int:
    args = parse_args()
    logging.basicConfig(level=logging.WARNING)
    started = time.perf_counter()
    items, controls = photo_set(args.seed)
    write_folder(items, args.output_dir / "images")
    reports, steps, stop_reason = train(args, items, controls)
    show(reports, items, args)
    ended = f"stopped by memwatch ({stop_reason})" if stop_reason else "ended by itself"
    print(f"\n{steps} optimizer steps, {ended}; {time.perf_counter() - started:.0f} s")
    wrong = problems(reports, items, stop_reason)
    print("".join(f"PROBLEM: {problem}\n" for problem in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "all", "none"])
    parser.add_argument("--smoke", action="store_true", help="look at less, and stop as soon as all is found")
    parser.add_argument("--max_train_steps", type=int, default=600)
    parser.add_argument("--every_steps", type=int, default=100)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
