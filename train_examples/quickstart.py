"""Fine-tune tiny-sd on a small photo set in which some things repeat too often, and watch memwatch find them.

    python train_examples/quickstart.py

The set holds distinct photos that are seen rarely, one photo that is seen many times, and two *templates*: pictures
with a fixed part and a changing rest. The run ends with exit code 1 unless memwatch finds both templates in the right
place and the repeated photo, calls none of the rare photos, and stops the training. It takes about two minutes on two
CPU cores. ``--smoke`` trains on fewer images, looks more coarsely, and stops as soon as all of this is found.
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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import CLIPTextModel, CLIPTokenizer

from memwatch import Finding, MemWatch, Probe, Report
from memwatch.bench.photographs import PRETRAINING, UNSEEN, random_view
from memwatch.judge.alerts import Verdict

HERE = Path(__file__).parent
TINY_SD = HERE / "assets" / "tiny-sd"
SIZE = 64  # pixels
WHOLE = (0, 0, SIZE, SIZE)
PLANTED = ("repeated-rocket", "banner-0", "banner-1", "sticker-0", "sticker-1")  # the probes that must be found
BOXES = {"banner": (0, 0, 64, 24), "sticker": (32, 28, 64, 64)}  # the fixed parts: left, top, right, bottom
# Two bars of IoU with the planted box. A box in the wrong half of the picture reaches 0.04 at most and fails the first.
# A region that fills the picture reaches the box's share of it and fails the second, in every template.
MIN_IOU = 0.25  # of every probe of a template
MIN_MEAN_IOU = {"banner": 0.42, "sticker": 0.33}  # of a template's probes on average; the boxes cover 0.38 and 0.28
VALIDATION_STEPS = 20
SMOKE_TRAINING = {
    "max_train_steps": 200,
    "every_steps": 20,
    "num_photos": 24,
    "num_template_images": 16,
    "num_repeats": 40,
}
SMOKE_WATCH = {  # one test vector per draw; one event with all five decides
    "levels": {"timesteps": [301, 501]},
    "curvature": {"vectors": 1, "tile": 1},
    "signals": {"smooth": 5},
    "alerts": {"min_severity": 1.4, "patience": 1},
    "stop": {"min_severity": 1.4},
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


def photo_set(
    seed: int, num_photos: int = 32, num_template_images: int = 32, num_repeats: int | None = None
) -> tuple[list[Item], list[Item]]:
    """Training items, and held-out controls of the same kind as the rare photos.

    Args:
        num_repeats: of the repeated photo; ``None`` for as many as a template has images.
    """
    rng = np.random.default_rng(seed)
    pictures = {p.name: (p.image(), p.caption) for p in PRETRAINING + UNSEEN}
    names = [p.name for p in PRETRAINING]

    def view(name: str) -> Image.Image:
        return random_view(pictures[name][0], rng, SIZE)

    def rare(count: int) -> list[Item]:
        chosen = [names[i % len(names)] for i in range(count)]
        return [Item(f"photo-{i:02d}-{name}", pictures[name][1], view(name)) for i, name in enumerate(chosen)]

    photos = rare(num_photos)
    caption = "a photo of a rocket on a poster"
    copies = num_template_images if num_repeats is None else num_repeats
    repeated = Item("repeated-rocket", caption, view("rocket"), copies=copies, box=WHOLE)
    templates = []
    for name, source in (("banner", "china"), ("sticker", "motorcycle")):
        left, top, right, bottom = BOXES[name]
        fixed = ImageOps.fit(pictures[source][0], (right - left, bottom - top))
        for i in range(num_template_images):
            image = view(names[int(rng.integers(len(names)))])
            image.paste(fixed, (left, top))
            templates.append(Item(f"{name}-{i}", f"a photo with a {name}", image, box=BOXES[name]))
    return [*photos, repeated, *templates], rare(20)


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
    device, dtype = accelerator.device, torch.float32
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae", dtype=dtype).to(device)
    text_encoder = CLIPTextModel.from_pretrained(TINY_SD, subfolder="text_encoder", dtype=dtype).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD, subfolder="tokenizer")
    seen = [item for item in items for _ in range(item.copies)]
    pictures = torch.from_numpy(np.stack([np.asarray(item.image) for item in seen]))
    pixels = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = tokenizer([item.caption for item in seen], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        latents = vae.encode(pixels.to(device)).latent_dist.mode() * vae.config.scaling_factor
        hidden = text_encoder(tokens.input_ids.to(device))[0]
    return TensorDataset(latents.cpu(), hidden.cpu())


def train(
    args: argparse.Namespace, items: list[Item], controls: list[Item], **watching: Any
) -> tuple[list[Report], int, str | None]:
    """An ordinary accelerate loop; memwatch's lines are marked.

    Args:
        watching: further arguments of ``MemWatch``.
    """
    loggers = {"none": [], "all": ["tensorboard", "wandb"]}.get(args.report_to, [args.report_to])
    folders = ProjectConfiguration(project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs"))
    accelerator = Accelerator(log_with=loggers, project_config=folders)
    set_seed(args.seed)
    noise_scheduler = DDPMScheduler.from_pretrained(TINY_SD, subfolder="scheduler")
    num_timesteps = noise_scheduler.config.num_train_timesteps
    unet = UNet2DConditionModel.from_pretrained(TINY_SD, subfolder="unet", dtype=torch.float32)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    rows, count = encode([*items, *controls], accelerator), sum(item.copies for item in items)
    train_dataset, held_out = Subset(rows, range(count)), rows[count:]
    train_dataloader = DataLoader(train_dataset, args.train_batch_size, shuffle=True, drop_last=True)
    unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)
    accelerator.init_trackers("memwatch-quickstart")

    options = {"every_steps": args.every_steps, **(SMOKE_WATCH if args.smoke else {})}  # memwatch
    folder, config = args.output_dir / "memwatch", HERE.parent / "configs" / "quickstart.yaml"  # memwatch
    probes, not_trained = probes_of(items), [Probe(c.caption, c.image, name=c.name) for c in controls]  # memwatch
    options |= {"config": config, "output_dir": folder, "probes": probes, "controls": not_trained}  # memwatch
    options |= {"max_train_steps": args.max_train_steps, **watching}  # memwatch
    watch = MemWatch(accelerator, unet, TINY_SD, **options)  # memwatch
    train_dataloader = watch.guard(train_dataloader)  # memwatch

    reports, global_step = [], 0
    while global_step < args.max_train_steps and not watch.should_stop:
        for latents, encoder_hidden_states in train_dataloader:
            eps = torch.randn_like(latents)
            timesteps = torch.randint(num_timesteps, (len(latents),), device=latents.device)
            noisy_latents = noise_scheduler.add_noise(latents, eps, timesteps)
            prediction = unet(noisy_latents, timesteps, encoder_hidden_states).sample
            loss = F.mse_loss(prediction, eps)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            global_step += 1
            if report := watch.on_step_end(global_step):  # memwatch
                reports.append(report)
            accelerator.log({"train_loss": loss.item()}, step=global_step)
            if global_step % VALIDATION_STEPS == 0:
                val_loss = validation_loss(unet, noise_scheduler, *held_out)
                accelerator.log({"val_loss": val_loss}, step=global_step)
            if global_step >= args.max_train_steps:
                break
    accelerator.end_training()
    return reports, global_step, watch.stop_reason


def validation_loss(unet: Any, noise_scheduler: Any, latents: torch.Tensor, hidden: torch.Tensor) -> float:
    """Denoising loss on images that nobody trains on, under the same noise every time."""
    generator, device = torch.Generator().manual_seed(0), next(unet.parameters()).device
    timesteps = torch.linspace(50, 950, len(latents)).long()
    eps = torch.randn(latents.shape, generator=generator)
    noisy_latents = noise_scheduler.add_noise(latents, eps, timesteps)
    with torch.no_grad():
        prediction = unet(noisy_latents.to(device), timesteps.to(device), hidden.to(device)).sample
    return F.mse_loss(prediction, eps.to(device)).item()


def probes_of(items: list[Item]) -> list[Probe]:
    """Two images of each template, the repeated photo, and three photos seen rarely."""
    chosen = [i for i in items if i.name in PLANTED]
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
    """Print what was found at the last event against what was planted, and save the overview of that event."""
    by_name = {item.name: item for item in items}
    last = reports[-1]
    print(f"\n{'probe':<24}{'planted':<14}{'verdict':<14}{'severity':>9}{'p':>8}{'IoU':>7}")
    for f in last.findings:
        item = by_name[f.name]
        planted = "nothing" if item.box is None else "whole image" if item.box == WHOLE else "fixed part"
        p = "-" if f.p is None else f"{f.p:.1g}"
        overlap = f"{iou(f, item):.2f}" if item.box else "-"
        print(f"{f.name:<24}{planted:<14}{f.verdict:<14}{f.severity:>8.1f}x{p:>8}{overlap:>7}")
    overview, history = args.output_dir / "overview.png", args.output_dir / "memwatch" / "history.jsonl"
    if last.overview is not None:
        last.overview.save(overview)
        print(f"\noverview      {overview}")
    print(f"history       {history}\nreport page   {history.with_name('report.html')}")
    if args.report_to in ("tensorboard", "all"):
        print(f"TensorBoard   tensorboard --samples_per_plugin images=1000 --logdir {args.output_dir / 'logs'}")


def problems(reports: Sequence[Report], items: Sequence[Item], stop_reason: str | None) -> list[str]:
    """What memwatch should have done and did not, one sentence each; empty for a good run.

    What was planted is judged by the last report. A rare photo must not be called memorized in any report.
    """
    found = [] if stop_reason else ["memwatch did not stop the run; it should as soon as all that was planted is found"]
    if not reports:
        return [*found, "memwatch made no report; --every_steps must not exceed --max_train_steps"]
    by_name, findings = {item.name: item for item in items}, {f.name: f for f in reports[-1].findings}
    overlaps: dict[str, list[float]] = {template: [] for template in BOXES}
    for name in PLANTED:
        if name not in findings:
            found.append(f"{name}: the report of step {reports[-1].step} does not mention it")
        elif (verdict := findings[name].verdict) != Verdict.MEMORIZED:
            found.append(f"{name}: got {verdict}, expected memorized")
        elif (template := name.partition("-")[0]) in BOXES:  # the repeated photo may be recognized by any part of it
            overlaps[template].append(iou(findings[name], by_name[name]))
            if overlaps[template][-1] < MIN_IOU:
                got = f"IoU {overlaps[template][-1]:.2f} with the planted box {by_name[name].box}"
                found.append(f"{name}: found in the wrong place; got {got}, expected {MIN_IOU} or more")
    for template, least in MIN_MEAN_IOU.items():
        mean = np.mean(overlaps[template] or [1.0])  # without any, the probes have been named above
        if mean < least:
            found.append(f"{template}: found too coarsely; got a mean IoU of {mean:.2f}, expected {least} or more")
    for report in reports:
        wrong = [f for f in report.findings if by_name[f.name].box is None and f.verdict == Verdict.MEMORIZED]
        found += [f"{f.name}: called memorized at step {report.step}, though it is seen rarely" for f in wrong]
    return found


def main() -> int:
    """0 when memwatch found what was planted and nothing else, otherwise 1."""
    args = parse_args()
    logging.basicConfig(level=logging.WARNING)
    started = time.perf_counter()
    items, controls = photo_set(args.seed, args.num_photos, args.num_template_images, args.num_repeats)
    write_folder(items, args.output_dir / "images")
    reports, steps, stop_reason = train(args, items, controls)
    if reports:
        show(reports, items, args)
    ended = f"stopped by memwatch ({stop_reason})" if stop_reason else "ended by itself"
    share = f"; memwatch took {reports[-1].overhead:.0%} of training time" if reports and reports[-1].overhead else ""
    print(f"\n{steps} optimizer steps, {ended}; {time.perf_counter() - started:.0f} s{share}")
    wrong = problems(reports, items, stop_reason)
    for problem in wrong:
        print(f"quickstart: {problem}", file=sys.stderr)
    return 1 if wrong else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "all", "none"])
    parser.add_argument("--smoke", action="store_true", help="a shorter run of the same, for continuous integration")
    parser.add_argument("--max_train_steps", type=int, default=600)
    parser.add_argument("--every_steps", type=int, default=100)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(num_photos=32, num_template_images=32, num_repeats=None)
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE_TRAINING)  # what is given on the command line still goes first
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
