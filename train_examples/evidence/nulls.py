"""Runs in which nothing is planted, watched by memwatch as it is shipped: how many of them call anything.

Whatever is called has a twin: the same run with another photo in its place, which tells whether it is stored.

python train_examples/evidence/nulls.py --runs 40 --threads 1     # resumes; writes results/nulls.md when all are done
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.report.about import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
import quickstart

from evidence.pages.markdown import PACKAGES, markdown_table
from evidence.runs.train import commit
from evidence.verdicts import intervals
from evidence.verdicts.truth import Gap

RESULTS = Path(__file__).parents[1] / "results" / "nulls.md"
NUM_PHOTOS, STEPS, EVERY, BATCH = 80, 200, 10, 8
FIRST_SEED = 2000
WATCHING = {"config": None, "stop": {"enabled": False}, "rollback": False}
TIMESTEPS, DRAWS, NOISE_SEED = (100, 300, 500, 700, 900), 4, 7  # noise that memwatch never uses
PAGE = """# Nothing planted

Written by `python train_examples/evidence/nulls.py {options}` at commit {commits}. {machine}.

{runs} runs of the quickstart's loop on {photos} ordinary photos, {steps} steps of {batch}, an event every {every}
steps, with memwatch's defaults. Nothing repeats, but each photo is shown about {showings:.0f} times, which is enough to
store an unusual one. So whatever was called has a twin: the same run with another photo of its subject in its place;
memwatch picks its controls anew there, so that a few other photos may differ.
*Confirmed*: on noise that memwatch never uses the twin's loss on the photo is larger by more than the draws' error and
by more than on any photo that neither has seen; the call was right. *Not confirmed* is a false alarm.

`called`: runs in which anything was called memorized at any event. `suspicious`: runs in which anything was suspicious,
which p <= 0.01 allows. Seeds below 2000 chose constants.

{table}

{calls}
"""


def one(seed: int, folder: Path) -> dict[str, Any]:
    """One run's numbers, from its file where there is one."""
    file = folder / f"null-{seed}.json"
    if not file.is_file():
        words = ["--max_train_steps", STEPS, "--every_steps", EVERY, "--train_batch_size", BATCH, "--seed", seed]
        sys.argv = ["quickstart", "--report_to", "none", *map(str, words)]
        options = quickstart.parse_args()
        options.output_dir = folder / f"null-{seed}"
        items, validation = quickstart.photo_set(options.seed, num_photos=NUM_PHOTOS)
        items = [item for item in items if not item.planted]
        run = quickstart.train(options, items, validation, **WATCHING)
        found = {
            verdict: {f.name for r in run.reports for f in r.findings if f.verdict is verdict} for verdict in Verdict
        }
        called = {f.name: row_of(f) for r in run.reports for f in r.findings}
        called = {name: called[name] for name in found[Verdict.MEMORIZED]}
        scores = [f.evidence.z_score for r in run.reports for f in r.findings if f.evidence.z_score is not None]
        said: dict[str, Any] = {
            "seed": seed,
            "commit": commit(),
            "events": len(run.reports),
            "probes": len(run.reports[-1].findings),
            "called": confirmed(run, options, items, validation, called) if called else {},
            "suspicious": sorted(found[Verdict.SUSPICIOUS]),
            "largest T": max(scores, default=0.0),
        }
        file.write_text(json.dumps(said), encoding="utf-8")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def row_of(finding: Finding) -> int:
    """The photo that a probe was picked from."""
    row = finding.observation.probe.row
    assert row is not None
    return row


def confirmed(
    run: quickstart.Run,
    options: argparse.Namespace,
    items: list[quickstart.Item],
    validation: list[quickstart.Item],
    called: Mapping[str, int],
) -> dict[str, Any]:
    """By name of what was called, its gap to the twin, the largest of what neither has seen, and whether it is stored.

    Args:
        called: by name, the index of the photo among ``items``.
    """
    instead = {row: next(v for v in validation if v.caption == items[row].caption) for row in called.values()}
    unseen = [photo for photo in validation if photo not in instead.values()]
    options.every_steps, options.output_dir = STEPS + 1, options.output_dir / "twin"
    twin = quickstart.train(options, [instead.get(i, item) for i, item in enumerate(items)], validation, **WATCHING)
    pictures = [*map(items.__getitem__, called.values()), *unseen]
    gaps = [Gap.between(there, here) for there, here in zip(losses(twin, pictures), losses(run, pictures), strict=True)]
    chance = max(abs(gap.mean) for gap in gaps[len(called) :])
    return {
        name: {"gap": gap.mean, "chance": chance, "stored": gap.low > 0 and gap.mean > chance}
        for name, gap in zip(called, gaps, strict=False)
    }


@torch.no_grad()
def losses(run: quickstart.Run, pictures: list[quickstart.Item]) -> np.ndarray:
    """Denoising loss of every picture on fixed noise, ``(pictures, levels, draws)``."""
    latents, hidden = quickstart.batch_of(quickstart.encode(pictures, Accelerator()))
    scheduler = DDPMScheduler.from_pretrained(quickstart.TINY_SD, subfolder="scheduler")
    noise = torch.randn(DRAWS, *latents.shape[1:], generator=torch.Generator().manual_seed(NOISE_SEED))

    def loss(timestep: int, eps: torch.Tensor) -> torch.Tensor:
        t, eps = torch.full((len(latents),), timestep), eps.expand_as(latents)
        made = run.unet(scheduler.add_noise(latents, eps, t), t, hidden).sample
        return (made - eps).square().mean((1, 2, 3))

    found = torch.stack([torch.stack([loss(t, eps) for eps in noise]) for t in TIMESTEPS])  # levels, draws, pictures
    losses: np.ndarray = found.permute(2, 0, 1).double().numpy()
    return losses


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"runs": len(runs), "events": runs[0]["events"], "probes": runs[0]["probes"]}
    wrong = [any(not call["stored"] for call in run["called"].values()) for run in runs]
    groups = {"called": [bool(run["called"]) for run in runs], "called, not confirmed": wrong}
    groups["suspicious"] = [bool(run["suspicious"]) for run in runs]
    for what, values in groups.items():
        row[what], row[f"{what}, share"] = sum(values), intervals.share([[value] for value in values])
    return [row | {"largest T": max(run["largest T"] for run in runs)}]


def call_table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every photo that was called, and what its twin says."""
    return [{"seed": run["seed"], "photo": name} | call for run in runs for name, call in run["called"].items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=int, default=40, help="how many, with consecutive seeds (default: %(default)s)")
    add("--seed", type=int, default=FIRST_SEED, help="of the first one (default: %(default)s)")
    add("--threads", type=int, help="of torch; to run several of these side by side")
    add("--output", type=Path, default=Path("runs", "nulls"), help="folder of the runs (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="the page (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error(f"--runs: got {args.runs}, allowed: 1 or greater")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    runs = [one(seed, args.output) for seed in range(args.seed, args.seed + args.runs)]
    text = PAGE.format(
        options=f"--runs {args.runs} --seed {args.seed}",
        commits=", ".join(sorted({f"`{run['commit']}`" for run in runs})),
        machine=machine(*PACKAGES),
        runs=len(runs),
        photos=NUM_PHOTOS,
        steps=STEPS,
        batch=BATCH,
        every=EVERY,
        showings=STEPS * BATCH / NUM_PHOTOS,
        table=markdown_table(table(runs)),
        calls=markdown_table(call_table(runs)) if call_table(runs) else "Nothing was called.",
    )
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
