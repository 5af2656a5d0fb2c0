"""Runs in which nothing is planted, watched by memwatch as it is shipped: how many of them call anything.

python train_examples/evidence/nulls.py --runs 40 --threads 1     # resumes; writes results/nulls.md when all are done
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memwatch.judge.verdict import Verdict
from memwatch.report.about import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
import quickstart

from evidence.pages.markdown import PACKAGES, markdown_table
from evidence.runs.train import commit
from evidence.verdicts import intervals

RESULTS = Path(__file__).parents[1] / "results" / "nulls.md"
NUM_PHOTOS, STEPS, EVERY, BATCH = 80, 200, 10, 8
FIRST_SEED = 2000
WATCHING = {"config": None, "stop": {"enabled": False}, "rollback": False}
PAGE = """# Nothing planted

Written by `python train_examples/evidence/nulls.py {options}` at commit {commits}. {machine}.

{runs} runs of the quickstart's loop on {photos} ordinary photos, {steps} steps of {batch}, an event every {every}
steps, with memwatch's defaults. Each photo is shown about {showings:.0f} times. `called`: runs in which anything was
called memorized at any event. `suspicious`: runs in which anything was suspicious, which p <= 0.01 allows. Seeds
below 2000 chose constants.

{table}
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
        run = quickstart.train(options, [item for item in items if not item.planted], validation, **WATCHING)
        found = {
            verdict: {f.name for r in run.reports for f in r.findings if f.verdict is verdict} for verdict in Verdict
        }
        scores = [f.evidence.z_score for r in run.reports for f in r.findings if f.evidence.z_score is not None]
        said: dict[str, Any] = {
            "seed": seed,
            "commit": commit(),
            "events": len(run.reports),
            "probes": len(run.reports[-1].findings),
            "called": sorted(found[Verdict.MEMORIZED]),
            "suspicious": sorted(found[Verdict.SUSPICIOUS]),
            "largest T": max(scores, default=0.0),
        }
        file.write_text(json.dumps(said), encoding="utf-8")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"runs": len(runs), "events": runs[0]["events"], "probes": runs[0]["probes"]}
    for what in ("called", "suspicious"):
        row[what] = sum(bool(run[what]) for run in runs)
        row[f"{what}, share"] = intervals.share([[bool(run[what])] for run in runs])
    return [row | {"largest T": max(run["largest T"] for run in runs)}]


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
    )
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
