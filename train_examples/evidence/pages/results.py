"""The benchmark's page: ``README.md`` (its prose is ``page.md``), ``bench.json`` and pictures, from finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from evidence.old.agreement import agreement_table, called_table, compare_run, disagreements
from evidence.old.alternatives import chosen_elsewhere, grid_table, rejudged
from evidence.old.bars import bar_table, by_both_rules
from evidence.old.by_rule import by_rule
from evidence.old.descriptor import read_descriptor
from evidence.old.effort import effort_table
from evidence.old.prompted import prompt_table
from evidence.old.proofs import proof_table
from evidence.pages.gallery import write_gallery
from evidence.pages.markdown import PACKAGES, markdown_table
from evidence.rivals.contest import detection_table, first_table, localization_table
from evidence.runs.finished import Finished
from evidence.verdicts.intervals import Estimate
from evidence.verdicts.product import Product, judged
from evidence.verdicts.stops import stop_table
from evidence.verdicts.tables import (
    calibration_table,
    lead_table,
    mistakes,
    null_table,
    separation_table,
    size_table,
    world_table,
)
from evidence.worlds.bases import BASES, read_parts
from tqdm import tqdm

from memwatch.config import MemWatchConfig
from memwatch.report.about import machine

PAGE = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
DETECTION = (
    "way, sampling, score, AUC held out, AUC ordinary, AUC learned, AUC constrained, AUC planted, AUC all, TPR all"
)
DETECTION += ", called, false"
PATCHES = "patches"  # the second rule that needs no model file
COLUMNS = dict.fromkeys(("detection", "detection_prompts"), tuple(DETECTION.split(", ")))  # the rest is in bench.json
Rows = Sequence[Mapping[str, Any]]


def write_page(
    runs: Sequence[Finished], config: MemWatchConfig, folder: Path, command: str, sscd: Path | None, tiny_sd: Path
) -> Path:
    """``README.md``, ``bench.json`` with the same tables, and ``items.md`` with its pictures, in ``folder``.

    Args:
        sscd: file of the descriptor that the second rule for copies takes; ``None`` compares patches.
        tiny_sd: the pipeline that the runs' autoencoder comes from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    products = [judged(run, config) for run in tqdm(runs, desc="memwatch's own judge")]
    rules = {PATCHES: read_descriptor(None)} | ({} if sscd is None else {"SSCD": read_descriptor(sscd)})
    planted = [product for product in products if product.run.planted]
    parts_of = cache(partial(read_parts, tiny_sd=tiny_sd))
    again = {name: by_rule([p.run for p in planted], rule, parts_of) for name, rule in rules.items()}
    compared = {name: [compare_run(run) for run in found] for name, found in again.items()}
    localization, alternatives = localization_table(products), rejudged(products)
    tables: dict[str, Rows] = {
        "worlds": world_table(products),
        "sizes": size_table(products),
        "separation": separation_table(products),
        "chosen": chosen_elsewhere(alternatives),
        "grid": grid_table(alternatives),
        "localization": localization,
        "detection_prompts": detection_table(products, prompts=True),
        "detection": detection_table(products, prompts=False),
        "prompts": prompt_table(products),
        "leads": lead_table(products),
        "first": first_table(products),
        "stops": stop_table(products),
        "nulls": null_table(products),
        "calibration": calibration_table(products),
        "agreement": [{"rule": name} | row for name, c in compared.items() for row in agreement_table(c)],
        "called": [{"rule": name} | row for name, c in compared.items() for row in called_table(c, products)],
        "proofs": proof_table(products, lambda run: parts_of(run.world.start).vae),
        "effort": effort_table(products),
        "runs": [run_row(product) for product in products],
    }
    nulls = [p for p in products if not p.run.planted]
    patches = [replace(product, run=run) for product, run in zip(planted, again[PATCHES], strict=True)]
    second = bar_table([*patches, *nulls], localization_table(patches))
    bars = by_both_rules(bar_table(products, localization), second, PATCHES)
    texts = {name: markdown_table(rows, COLUMNS.get(name, ())) for name, rows in tables.items()}
    text = PAGE.format(
        **texts,
        command=command,
        machine=machine(*PACKAGES),
        commits=", ".join(sorted({f"`{run.plan['commit']}`" for run in runs})),
        num_runs=len(runs),
        num_planted=len(planted),
        bars="\n".join(f"| {' | '.join(row.values())} |" for row in bars),
        mistakes=mistakes_text(products),
        promise=config.alerts.false_alarms_per_run,
        rules="\n".join(f"* `{name}`: {rule.says}." for name, rule in rules.items()),
        disagreements="\n".join(f"* {name}: {'; '.join(disagreements(c)) or 'none'}." for name, c in compared.items()),
        bases="; ".join(f"`{name}`: {BASES[name].says}" for name in sorted({run.world.base for run in runs})),
    )
    (folder / "bench.json").write_text(json.dumps({"bars": bars} | tables, indent=1, default=plain), encoding="utf-8")
    write_gallery({"the region rule": products, PATCHES: [*patches, *nulls]}, folder, command)
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


def mistakes_text(products: Sequence[Product]) -> str:
    return "\n".join(
        f"{what.capitalize()}: {', '.join(names) or 'none'}.  " for what, names in mistakes(products).items()
    )
