"""How long the survey of a training set takes, how much memory, and what it finds of what was planted.

    python train_examples/evidence/measure_survey.py --rows 1000 10000

Sets of 256 px JPEG files are made by code in a temporary folder. Of the rows, 5 % each are changed copies of others,
show a part at the same place, show a part that moves, or show something on plain white. Writes what was measured as a
table. 100,000 rows need 2 GB of disk for a while.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from memwatch.picking.parts import MOVED_SAMPLE, SAMPLE, has_opencv
from memwatch.report.about import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
from evidence.pages.markdown import markdown_table
from evidence.planted_files import KINDS, LARGE, SMALL, Plan, planned, write_rows

RESULTS = Path(__file__).parents[1] / "results" / "survey.md"
PACKAGES = ("numpy", "scipy", "pillow", "imagehash", "memwatch")  # that results depend on
PURE, COVER = 0.8, 0.5  # a group counts when so much of it is of one item, and so much of the item is in it
TEXT = """# Time and memory of a survey

Written by `python train_examples/evidence/measure_survey.py{options}`. {machine}.

Sets of 256 px JPEG files made by code, one thread per core. Of the rows, 5 % each are changed copies of others
(compressed, resized, mirrored; most in groups of two to five, a fifth of them copies of one picture), show a part at
the same place, show a part that moves, or show something on plain white. Parts are on 2.5 %, 1.2 % and 0.6 % of the
rows, and `small` ones on {small} rows each.

Seconds are of the wall clock: `hash` reads the files, `near` looks for near-duplicates, `parts` for shared parts,
`strange` measures how unusual each picture is; `processor` counts the seconds of all threads together. `memory` is
the most that the main process has held, less what it held before. Groups are found/planted: found is of what there is a
group that holds at least {cover:.0%} of its rows, and of whose rows at least {pure:.0%} are its own. `others` are rows
with nothing planted that are in any group. Parts at the same place are searched in {sample} rows, moved ones
{moved}, and then looked for in the others.

{table}
"""


def surveyed(folder: Path, number: int) -> dict[str, Any]:
    """One set's line of the table; in a process of its own, which no other set has made larger."""
    from memwatch.picking import survey
    from memwatch.picking.rows import as_training_set

    seconds: dict[str, float] = {}
    stages = {"hash": "hash_rows", "near": "duplicate_groups", "parts": "shared_parts", "strange": "strangeness"}
    for stage, name in stages.items():
        setattr(survey, name, timed(getattr(survey, name), stage, seconds))
    before, busy, start = memory(), processor(), time.perf_counter()
    found = survey.survey(as_training_set(folder))
    seconds |= {"all": time.perf_counter() - start, "processor": processor() - busy}
    line: dict[str, Any] = {"rows": number} | {stage: f"{took:.1f} s" for stage, took in seconds.items()}
    line["memory"] = f"{memory() - before:.0f} MB"
    return line | recall(planned(number), [np.array(group.rows) for group in found.groups])


def timed(function: Callable[..., Any], stage: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **settings)
        finally:
            seconds[stage] = time.perf_counter() - start

    return call


def memory() -> float:
    """The most that this process has held so far, megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def processor() -> float:
    """Seconds of processor time that this process has taken so far, all threads together."""
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def recall(plan: Plan, groups: list[np.ndarray]) -> dict[str, str]:
    """Groups found of those planted, by kind and size."""
    line: dict[str, str] = {}
    for kind, owner in zip(KINDS, plan.owner, strict=True):
        is_found = {item: False for item in range(int(owner.max()) + 1)}
        sizes = np.bincount(owner[owner >= 0])
        for rows in groups:
            items, inside = np.unique(owner[rows], return_counts=True)
            of, most = int(items[inside.argmax()]), int(inside.max())
            if of >= 0 and most >= PURE * len(rows) and most >= COVER * sizes[of]:
                is_found[of] = True
        small = [of for item, of in is_found.items() if item >= LARGE] if kind != "copies" else []
        large = [of for item, of in is_found.items() if item < LARGE] if small else list(is_found.values())
        line[kind] = f"{sum(large)}/{len(large)}"
        line |= {f"{kind}, small": f"{sum(small)}/{len(small)}"} if small else {}
    grouped = np.zeros(plan.owner.shape[1], dtype=bool)
    for rows in groups:
        grouped[rows] = True
    others = (plan.owner < 0).all(0)
    return line | {"others": f"{100 * grouped[others].mean():.2f} %"}


def measured(number: int, folder: Path) -> dict[str, Any]:
    """A set is made, surveyed, and removed."""
    (files := folder / str(number)).mkdir(parents=True)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(2, spawn) as pool:
        for task in [pool.submit(write_rows, files, number, range(i, number, 16)) for i in range(16)]:
            task.result()
    with ProcessPoolExecutor(1, spawn) as pool:
        line = pool.submit(surveyed, files, number).result()
    shutil.rmtree(files)
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10000, 100000], help="of each set")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table = markdown_table([measured(number, Path(folder)) for number in args.rows])
    given = " ".join(sys.argv[1:])
    text = TEXT.format(
        options=f" {given}" if given else "",
        machine=machine(*PACKAGES),
        small=SMALL,
        sample=SAMPLE,
        moved=f"in {MOVED_SAMPLE}" if has_opencv() else "in none (there is no OpenCV)",
        pure=PURE,
        cover=COVER,
        table=table,
    )
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(text, encoding="utf-8")
    print(args.results)


if __name__ == "__main__":
    main()
