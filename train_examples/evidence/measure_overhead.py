"""The overhead that memwatch logs when it chooses its own interval, in the quickstart's loop.

    python train_examples/evidence/measure_overhead.py

Trains as the quickstart does, with memwatch's defaults (four noise levels; ``overhead: 0.02``) and without stopping.
Writes what was logged as a table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from memwatch.config import MemWatchConfig
from memwatch.report.about import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
import quickstart

from evidence.pages.markdown import PACKAGES, markdown_table

RESULTS = Path(__file__).parents[1] / "results" / "overhead.md"
WATCHING = {"config": None, "every_steps": None, "stop": {"enabled": False}}
NUM_PHOTOS = 2000  # so many that none is seen often
TEXT = """# The overhead that is logged

Written by `python train_examples/evidence/measure_overhead.py{options}`. {machine}.

The quickstart's loop (batch {batch}) with memwatch's defaults: 16 probes, 20 controls, 8 rows per event that take
turns. They may take {allowed:.0%} of training time; the run was not stopped. `quickstart`: its own set, in which
much is being stored, so that far more is measured, and generated as proof, than in a quiet run. `nothing planted`:
{photos} photos of the same kind. `interval`: what memwatch chose after the
first steps; a run of less than 2,000 steps has four events at least, and spends more for it. `logged`:
`memwatch/overhead` at the last event, with everything counted (the screen, curvature, generations, files).

{table}
"""


def measured(what: str, steps: int, folder: Path) -> dict[str, Any]:
    """One run's line of the table."""
    sys.argv = ["quickstart", "--max_train_steps", str(steps), "--report_to", "none"]
    options = quickstart.parse_args()
    options.output_dir = folder / f"{what.replace(' ', '-')}-{steps}"
    items, validation = quickstart.photo_set(options.seed)
    if what == "nothing planted":
        items, validation = quickstart.photo_set(options.seed, num_photos=NUM_PHOTOS)
        items = [item for item in items if not item.planted]
    run = quickstart.train(options, items, validation, **WATCHING)
    reports = run.reports
    chosen = [report.judgement.num_measured for report in reports]
    return {
        "set": what,
        "steps": run.steps,
        "interval": reports[0].step,
        "events": len(reports),
        "measured with curvature": ", ".join(map(str, chosen)),
        "seconds of events": ", ".join(f"{report.seconds:.1f}" for report in reports),
        "logged": f"{100 * (reports[-1].overhead or 0):.1f} %",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=[600, 2000], help="of the two runs")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    given = " ".join(sys.argv[1:])
    rows = [measured(*run, args.output_dir) for run in zip(("quickstart", "nothing planted"), args.steps, strict=True)]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    text = TEXT.format(
        options=f" {given}" if given else "",
        machine=machine(*PACKAGES),
        batch=16,
        photos=NUM_PHOTOS,
        allowed=MemWatchConfig().overhead,
        table=markdown_table(rows),
    )
    args.results.write_text(text, encoding="utf-8")
    print(args.results)


if __name__ == "__main__":
    main()
