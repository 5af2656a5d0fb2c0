"""Fine-tune tiny-sd on a small photo set in which some things repeat too often, and watch memwatch find them.

    python train_examples/quickstart.py

The set holds distinct photos that are seen rarely, one photo that is seen many times, and two *templates*: pictures
with a fixed part and a changing rest. memwatch is given the set and nothing else: it picks what to watch, and holds out
controls. The run ends with exit code 1 unless it finds both templates in the right place and the repeated photo, calls
none of the rare photos, and stops the training. It takes about two minutes on two CPU cores. ``--smoke`` trains on
fewer images, looks more coarsely, and stops as soon as all of this is found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from photographs import PRETRAINING, UNSEEN, random_view
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTokenizer

import memwatch
from memwatch import Finding, MemWatch, Report
from memwatch.judge.verdict import Verdict

HERE = Path(__file__).parent
TINY_SD = HERE / "assets" / "tiny-sd"
SIZE = 64  # pixels
WHOLE = (0, 0, SIZE, SIZE)
PLANTED = ("rocket", "banner", "sticker")  # what must be found
BOXES = {"banner": (0, 0, 64, 24), "sticker": (32, 28, 64, 64)}  # the fixed parts: left, top, right, bottom
# Share of the regions inside the planted box, of every probe of a template that is called. The run stops early, when a
# part of the box is found. Regions that fill the picture reach the box's share of it, 0.38 and 0.28, and those in the
# wrong half of it nothing.
MIN_INSIDE = 0.6
VALIDATION_STEPS = 20
SMOKE_TRAINING = {
    "max_train_steps": 200,
    "every_steps": 20,
    "num_photos": 44,
    "num_template_images": 16,
    "num_repeats": 40,
}
SMOKE_WATCH = {"stop": {"num_probes": 3}}


@dataclass(frozen=True)
class Item:
    """One training image.

    Attributes:
        planted: what it is planted as, one of ``PLANTED``; empty for a photo that is seen rarely.
        box: the part that its whole group shares, ``(left, top, right, bottom)`` in pixels; ``None`` for nothing.
    """

    name: str
    caption: str
    image: Image.Image
    planted: str = ""
    box: tuple[int, int, int, int] | None = None


def photo_set(
    seed: int, num_photos: int = 52, num_template_images: int = 32, num_repeats: int | None = None
) -> tuple[list[Item], list[Item]]:
    """The training set, and photos for the validation loss, of the same kind as the rare ones.

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
    rocket = view("rocket")
    repeated = [Item(f"rocket-{i}", caption, rocket, "rocket", WHOLE) for i in range(copies)]
    templates = []
    for name, source in (("banner", "china"), ("sticker", "motorcycle")):
        left, top, right, bottom = BOXES[name]
        fixed = ImageOps.fit(pictures[source][0], (right - left, bottom - top))
        for i in range(num_template_images):
            image = view(names[int(rng.integers(len(names)))])
            image.paste(fixed, (left, top))
            templates.append(Item(f"{name}-{i}", f"a photo with a {name}", image, name, BOXES[name]))
    return [*photos, *repeated, *templates], rare(20)


def write_folder(items: list[Item], folder: Path) -> Path:
    """An image folder as diffusers' scripts read it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for item in items:
        item.image.save(folder / f"{item.name}.png")
        rows.append(json.dumps({"file_name": f"{item.name}.png", "text": item.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def encode(items: list[Item], accelerator: Accelerator) -> list[dict[str, Any]]:
    """Rows of a training set: image, caption, and what the loop trains on, its latents and text embeddings."""
    device, dtype = accelerator.device, torch.float32
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae", dtype=dtype).to(device)
    text_encoder = CLIPTextModel.from_pretrained(TINY_SD, subfolder="text_encoder", dtype=dtype).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD, subfolder="tokenizer")
    pictures = torch.from_numpy(np.stack([np.asarray(item.image) for item in items]))
    pixels = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = tokenizer([item.caption for item in items], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        latents = vae.encode(pixels.to(device)).latent_dist.mode() * vae.config.scaling_factor
        hidden = text_encoder(tokens.input_ids.to(device))[0]
    encoded = zip(items, latents.cpu(), hidden.cpu(), strict=True)
    return [{"image": item.image, "text": item.caption, "latents": z, "hidden": h} for item, z, h in encoded]


def batch_of(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and text embeddings of some rows."""
    return torch.stack([row["latents"] for row in rows]), torch.stack([row["hidden"] for row in rows])


@dataclass(frozen=True)
class Run:
    """What a run leaves behind.

    Attributes:
        reports: of every event. steps: optimizer steps. unet: as it is at the end. watch: closed by now.
    """

    reports: list[Report]
    steps: int
    unet: torch.nn.Module
    watch: MemWatch


def train(args: argparse.Namespace, items: list[Item], validation: list[Item], **watching: Any) -> Run:
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
    picked = memwatch.pick(encode(items, accelerator))  # memwatch: before the DataLoader
    train_dataset, held_out = picked.train, batch_of(encode(validation, accelerator))
    options = {"shuffle": True, "drop_last": True, "collate_fn": batch_of}
    train_dataloader = DataLoader(train_dataset, args.train_batch_size, **options)
    unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)
    accelerator.init_trackers("memwatch-quickstart")

    options = {"every_steps": args.every_steps, **(SMOKE_WATCH if args.smoke else {})}  # memwatch
    folder, config = args.output_dir / "memwatch", HERE.parent / "configs" / "quickstart.yaml"  # memwatch
    options |= {"config": config, "output_dir": folder, "max_train_steps": args.max_train_steps, **watching}  # memwatch
    watch = MemWatch(accelerator, unet, TINY_SD, picked, scheduler=noise_scheduler, **options)  # memwatch
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
    return Run(reports, global_step, accelerator.unwrap_model(unet), watch)


def validation_loss(unet: Any, noise_scheduler: Any, latents: torch.Tensor, hidden: torch.Tensor) -> float:
    """Denoising loss on images that nobody trains on, under the same noise every time."""
    generator, device = torch.Generator().manual_seed(0), next(unet.parameters()).device
    timesteps = torch.linspace(50, 950, len(latents)).long()
    eps = torch.randn(latents.shape, generator=generator)
    noisy_latents = noise_scheduler.add_noise(latents, eps, timesteps)
    with torch.no_grad():
        prediction = unet(noisy_latents.to(device), timesteps.to(device), hidden.to(device)).sample
    return F.mse_loss(prediction, eps.to(device)).item()


def overlap(finding: Finding, item: Item) -> tuple[float, float]:
    """IoU of the found regions with the fixed part, and the share of them that lies inside it; each in [0, 1]."""
    left, top, right, bottom = item.box or (0, 0, 0, 0)
    truth = np.zeros((SIZE, SIZE), dtype=bool)
    truth[top:bottom, left:right] = True
    labels = finding.labels if finding.labels is not None else np.zeros((1, 1))
    found = np.kron(labels > 0, np.ones((SIZE // len(labels),) * 2, dtype=bool))
    both = (truth & found).sum()
    return float(both / max(1, (truth | found).sum())), float(both / max(1, found.sum()))


def shown(report: Report, items: list[Item]) -> Iterator[tuple[Finding, Item]]:
    """The findings of a report, each with the item that its probe was picked from."""
    for finding in report.findings:
        row = finding.observation.probe.row
        assert row is not None
        yield finding, items[row]


def show(run: Run, items: list[Item], args: argparse.Namespace) -> None:
    """Print what was found at the last event against what was planted, and save the overview of that event."""
    last = run.reports[-1]
    print(f"\n{'probe':<24}{'planted':<14}{'verdict':<14}{'severity':>9}{'p':>8}{'IoU':>7}")
    for f, item in shown(last, items):
        planted = "nothing" if item.box is None else "whole image" if item.box == WHOLE else "fixed part"
        p = "-" if f.p is None else f"{f.p:.1g}"
        iou = f"{overlap(f, item)[0]:.2f}" if item.box else "-"
        print(f"{item.name:<24}{planted:<14}{f.verdict:<14}{f.severity:>8.1f}x{p:>8}{iou:>7}")
    overview, history = args.output_dir / "overview.png", args.output_dir / "memwatch" / "history.jsonl"
    if last.overview is not None:
        last.overview.save(overview)
        print(f"\noverview      {overview}")
    print(f"history       {history}\nreport page   {history.with_name('report.html')}")
    for name in ("flagged.jsonl", "last_clean"):
        if (there := history.with_name(name)).exists():
            print(f"{name:<14}{there}")
    if args.report_to in ("tensorboard", "all"):
        print(f"TensorBoard   tensorboard --samples_per_plugin images=1000 --logdir {args.output_dir / 'logs'}")


def problems(reports: Sequence[Report], items: Sequence[Item], stop_reason: str | None) -> list[str]:
    """What memwatch should have done and did not, one sentence each; empty for a good run.

    What was planted is judged by the last report. A rare photo must not be called memorized in any report.
    """
    found = [] if stop_reason else ["memwatch did not stop the run; it should as soon as all that was planted is found"]
    if not reports:
        return [*found, "memwatch made no report; --every_steps must not exceed --max_train_steps"]
    for planted in PLANTED:
        of_it = [(f, item) for f, item in shown(reports[-1], items) if item.planted == planted]
        called = [(f, item) for f, item in of_it if f.verdict is Verdict.MEMORIZED]
        if not of_it:
            found.append(f"{planted}: no probe was picked of it")
        elif not called:
            found.append(f"{planted}: got {', '.join(f.verdict for f, _ in of_it)}, expected memorized")
        elif planted in BOXES:  # the repeated photo may be recognized by any part of it
            for f, item in called:
                inside = overlap(f, item)[1]
                if inside < MIN_INSIDE:
                    got = f"{inside:.2f} of its regions lie in the planted box {BOXES[planted]}"
                    found.append(f"{item.name}: found in the wrong place; {got}, expected {MIN_INSIDE} or more")
    for report in reports:
        wrong = [item for f, item in shown(report, items) if not item.planted and f.verdict is Verdict.MEMORIZED]
        found += [f"{item.name}: called memorized at step {report.step}, though it is seen rarely" for item in wrong]
    return found


def main() -> int:
    """0 when memwatch found what was planted and nothing else, otherwise 1."""
    args = parse_args()
    started = time.perf_counter()
    items, validation = photo_set(args.seed, args.num_photos, args.num_template_images, args.num_repeats)
    write_folder(items, args.output_dir / "images")
    run = train(args, items, validation)
    reports, stop_reason = run.reports, run.watch.stop_reason
    if reports:
        show(run, items, args)
    ended = f"stopped by memwatch ({stop_reason})" if stop_reason else "ended by itself"
    share = f"; memwatch took {reports[-1].overhead:.0%} of training time" if reports and reports[-1].overhead else ""
    print(f"\n{run.steps} optimizer steps, {ended}; {time.perf_counter() - started:.0f} s{share}")
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
    parser.add_argument("--every_steps", type=int, default=50)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(num_photos=52, num_template_images=32, num_repeats=None)
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE_TRAINING)  # what is given on the command line still goes first
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
