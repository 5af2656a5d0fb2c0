"""The benchmark's page: ``README.md`` (its prose is ``page.md``), the plots and ``bench.json``, from finished runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memwatch.bench.plots import plots
from memwatch.bench.protocol import POOL
from memwatch.bench.rows import Row
from memwatch.bench.runs import Finished
from memwatch.bench.tables import choice_table, first_alerts_table, mistakes, size_table, world_table
from memwatch.measure.copies import COPY
from memwatch.report.about import machine

COLUMNS = (
    "method signal probe baseline level draws iou_fixed miou_fixed iou_oracle pixel_auroc auc_heldout tpr1_heldout "
    "tpr5_heldout auc_learned auc_ordinary auc_constrained"
).split()
ALERT_COLUMNS = (
    "method signal baseline level called_stored called_learned called_constrained called_heldout called_ordinary "
    "false_alarms_per_run lead_fraction lead_events lead_exposures"
).split()
TARGETS = {"iou_fixed": 0.90, "auc_heldout": 0.99, "tpr1_heldout": 0.95}  # of the default: at least
TARGETS |= {
    "called_learned": 0.02,
    "called_ordinary": 0.02,
    "called_heldout": 0.0,
    "called_constrained": 0.05,
}  # at most
TARGETS |= {"lead_fraction": 0.90}
PACKAGES = ("torch", "diffusers", "transformers", "memwatch")  # that results depend on
PAGE = Path(__file__).with_name("page.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Extras:
    """Tables beside the comparison, each a list of rows; empty where nothing was run for it."""

    stored: Sequence[Mapping[str, Any]]
    nulls: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[Mapping[str, Any]] = ()
    proofs: Sequence[Mapping[str, Any]] = ()


def write(rows: Sequence[Row], extras: Extras, folder: Path, command: str) -> None:
    """``README.md``, ``bench.json`` and the plots in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [row.numbers for row in rows]
    (folder / "bench.json").write_text(json.dumps(numbers, indent=1, allow_nan=False), encoding="utf-8")
    plots(numbers, rows[0].results, folder)
    (folder / "README.md").write_text(page(rows, extras, command), encoding="utf-8")


def page(rows: Sequence[Row], extras: Extras, command: str) -> str:
    """``README.md`` of the results."""
    product = rows[0].results
    numbers = [row.numbers for row in rows]
    best = best_rows(numbers)
    return PAGE.format(
        command=command,
        machine=machine(*PACKAGES),
        runs=markdown_table([plan_of(result.run) for result in product]),
        copy=COPY,
        pool=POOL,
        worlds=markdown_table(world_table(product)),
        proofs=markdown_table(extras.proofs),
        nulls=markdown_table(extras.nulls),
        prompts=markdown_table(extras.prompts),
        stored=markdown_table(extras.stored),
        targets=markdown_table(list(targets(numbers))),
        mistakes="; ".join(mistakes(product) or ["nowhere"]),
        first=markdown_table(first_alerts_table(rows)),
        sizes=markdown_table(size_table(product)),
        choices=markdown_table(choice_table(rows)),
        best=markdown_table(best, COLUMNS),
        alerts=markdown_table([row for row in best if row["called_stored"] is not None], ALERT_COLUMNS),
    )


def plan_of(run: Finished) -> dict[str, Any]:
    """How a run was trained."""
    plan = run.plan
    events = ", ".join(map(str, plan["events"]))
    return {
        "run": run.name,
        "world": run.world.says,
        "steps": plan["steps"],
        "batch": plan["batch_size"],
        "events": events,
    }


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Rows of one kind; all their columns, or those that are named. The default's name is bold."""
    if not rows:
        return "Not measured."
    columns = columns or tuple(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        first, *cells = [with_interval(row, key) for key in columns]
        lines.append("| " + " | ".join([f"**{first}**" if row.get("default") else first, *cells]) + " |")
    return "\n".join(lines)


def with_interval(row: Mapping[str, Any], key: str) -> str:
    interval = row.get(f"{key}_interval")
    return shown(row[key]) + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def best_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The default, every rival, and of each probe, signal and baseline the level and number of draws that does best."""
    default, *others = rows
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in others:
        if row["method"] == "memwatch":
            groups.setdefault((row["probe"], row["signal"], row["baseline"]), []).append(row)
    best = [max(g, key=lambda row: (row["auc_heldout"] or 0) + (row["iou_fixed"] or 0)) for g in groups.values()]
    return [default, *(row for row in others if row["method"] != "memwatch"), *best]


def targets(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """What the default is meant to reach, and does."""
    goals = [(key, key, goal) for key, goal in TARGETS.items()]
    if oracles := [r["iou_oracle"] for r in rows if r["method"] == "published" and r["iou_oracle"] is not None]:
        goals.append(("iou_fixed against the best iou_oracle of the published procedure", "iou_fixed", max(oracles)))
    for name, key, goal in goals:
        at_most, value = key.startswith("called"), rows[0][key]
        met = "not measured" if value is None else "yes" if (value <= goal if at_most else value >= goal) else "**no**"
        target = f"{'<=' if at_most else '>='} {shown(goal)}"
        yield {"number": name, "target": target, "measured": with_interval(rows[0], key), "met": met}
