"""The benchmark's page: ``README.md`` (its prose is ``results.md``), the same tables as JSON, and pictures of items."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evidence.pages.gallery import write_gallery
from evidence.pages.markdown import PACKAGES, markdown_table
from evidence.rivals.contest import detection_table, first_table, localization_table
from evidence.rivals.stops import stop_table
from evidence.runs.finished import Finished
from evidence.verdicts.intervals import Estimate
from evidence.verdicts.product import Product, judged
from evidence.verdicts.tables import calibration_table, mistakes, null_table, size_table, world_table
from evidence.worlds.bases import BASES
from memwatch.config import MemWatchConfig
from memwatch.report.about import machine

PROSE = Path(__file__).with_name("results.md")


def write_page(runs: Sequence[Finished], config: MemWatchConfig, folder: Path) -> Path:
    """``README.md``, ``bench.json`` with the same tables, and ``items.md`` with its pictures, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    products = [judged(run, config) for run in tqdm(runs, desc="memwatch's own judge")]
    tables: dict[str, Sequence[Mapping[str, Any]]] = {
        "worlds": world_table(products),
        "sizes": size_table(products),
        "localization": localization_table(products),
        "detection_prompts": detection_table(products, prompts=True),
        "detection": detection_table(products, prompts=False),
        "first": first_table(products),
        "stops": stop_table(products),
        "nulls": null_table(products),
        "calibration": calibration_table(products),
        "runs": [run_row(product) for product in products],
    }
    wrong = [f"{what.capitalize()}: {', '.join(names) or 'none'}.  " for what, names in mistakes(products).items()]
    text = PROSE.read_text(encoding="utf-8").format(
        **{name: markdown_table(rows) for name, rows in tables.items()},
        machine=machine(*PACKAGES),
        commits=", ".join(sorted({f"`{run.plan['commit']}`" for run in runs})),
        num_runs=len(runs),
        num_planted=sum(bool(run.planted) for run in runs),
        mistakes="\n".join(wrong),
        promise=config.alerts.false_alarms_per_run,
        bases="; ".join(f"`{name}`: {BASES[name].says}" for name in sorted({run.world.base for run in runs})),
    )
    (folder / "bench.json").write_text(json.dumps(tables, indent=1, default=plain), encoding="utf-8")
    write_gallery(products, folder)
    file = folder / "README.md"
    file.write_text(text, encoding="utf-8")
    return file


def plain(value: Any) -> Any:
    """What JSON does not know."""
    if isinstance(value, Estimate):
        return {"value": value.value, "low": value.low, "high": value.high, "count": value.count}
    raise TypeError(f"no plain form of {type(value).__name__}")


def run_row(product: Product) -> dict[str, Any]:
    """How a run was trained."""
    run = product.run
    return {
        "run": run.name,
        "base": run.world.base,
        "steps": run.plan["steps"],
        "went on to": run.later_steps[-1] if run.later_steps else None,
        "batch": run.plan["batch_size"],
        "events": ", ".join(map(str, run.steps)),
        "memwatch stops at": product.stop,
        "commit": run.plan["commit"],
    }
