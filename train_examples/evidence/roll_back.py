"""What the weights that memwatch rolls back to are worth: copies and held-out loss, at the stop and in ``last_clean``.

    python train_examples/evidence/roll_back.py

Trains as the quickstart does, looks every 20 steps, and stops at the first probe that is memorized. Then both models
generate from the captions of what was planted. Writes what came out as a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import quickstart
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from drop_and_go_on import GENERATIONS, by_chance, copies

from evidence.pages.markdown import PACKAGES, markdown_table
from memwatch.report.about import machine

RESULTS = Path(__file__).parents[1] / "results" / "roll_back.md"
TEXT = """# What is rolled back to

Written by `python train_examples/evidence/roll_back.py{options}`. {machine}.

The quickstart's set and loop, an event every {every} steps, stopped at the first probe that was memorized. `copies`: of
{generations} generations per caption those that copy what was planted (repeated photo, banner, sticker). `held-out
loss`: denoising loss on photos that nobody trains on, under the same noise.

{table}
"""


def measured(seed: int, every: int, folder: Path) -> dict[str, Any]:
    """One run's line of the table."""
    sys.argv = ["quickstart", "--every_steps", str(every), "--seed", str(seed), "--report_to", "none"]
    args = quickstart.parse_args()
    args.output_dir = folder / f"seed-{seed}"
    items, validation = quickstart.photo_set(seed)
    run = quickstart.train(args, items, validation, stop={"num_probes": 1})
    clean = run.watch.folder.folder / "last_clean"
    if not clean.is_dir():
        return {"seed": seed, "stopped at": run.steps, "last clean": "-"}
    others = by_chance(validation)
    held_out = quickstart.batch_of(quickstart.encode(validation, Accelerator()))
    scheduler = DDPMScheduler.from_pretrained(quickstart.TINY_SD, subfolder="scheduler")
    models = {"stop": run.unet, "last clean": UNet2DConditionModel.from_pretrained(clean / "unet").to(run.unet.device)}
    row: dict[str, Any] = {"seed": seed, "stopped at": run.steps, "last clean": last_clean_step(clean)}
    for name, unet in models.items():
        found = copies(unet, items, others)
        row[f"copies, {name}"] = ", ".join(str(found[planted]) for planted in quickstart.PLANTED)
        row[f"held-out loss, {name}"] = f"{quickstart.validation_loss(unet, scheduler, *held_out):.4f}"
    return row


def last_clean_step(folder: Path) -> int:
    """The step whose weights these are."""
    return int(json.loads((folder / "memwatch.json").read_text(encoding="utf-8"))["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every_steps", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/roll-back"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    given = f"--seeds {' '.join(map(str, args.seeds))} --every_steps {args.every_steps}"
    rows = [measured(seed, args.every_steps, args.output_dir) for seed in args.seeds]
    text = TEXT.format(
        options=f" {given}",
        machine=machine(*PACKAGES),
        every=args.every_steps,
        generations=GENERATIONS,
        table=markdown_table(rows),
    )
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(text, encoding="utf-8")
    print(args.results)


if __name__ == "__main__":
    main()
