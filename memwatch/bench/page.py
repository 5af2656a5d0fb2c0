"""The benchmark's page: markdown, three plots, and ``bench.json``, all written from finished runs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memwatch.bench.items import PLANTED
from memwatch.bench.look import POOL
from memwatch.bench.results import RunResult
from memwatch.bench.runs import COPY
from memwatch.bench.table import NEGATIVES, Row, choice_table, first_alerts_table, precedes, size_table

ALERT_COLUMNS = (
    "method",
    "signal",
    "baseline",
    "level",
    "called_stored",
    "called_learned",
    "called_constrained",
    "called_heldout",
    "false_alarms_per_run",
    "lead_fraction",
    "lead_events",
    "lead_exposures",
)
TARGETS = (  # key of the default row, what it should be, by which comparison
    ("iou_fixed", 0.90, ">="),
    ("auc_heldout", 0.99, ">="),
    ("tpr1_heldout", 0.95, ">="),
    ("called_learned", 0.05, "<="),
    ("called_constrained", 0.05, "<="),
    ("lead_fraction", 0.90, ">="),
)
COLUMNS = (
    "method",
    "signal",
    "probe",
    "baseline",
    "level",
    "draws",
    "iou_fixed",
    "miou_fixed",
    "iou_oracle",
    "pixel_auroc",
    "auc_heldout",
    "tpr1_heldout",
    "tpr5_heldout",
    "auc_learned",
    "auc_constrained",
)


def machine() -> str:
    """Versions and processor, as every result names them."""
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "memwatch"))
    return f"{packages}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPU cores"


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def with_interval(row: Mapping[str, Any], key: str) -> str:
    interval = row.get(f"{key}_interval")
    return shown(row[key]) + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [with_interval(row, key) for key in columns]
        lines.append(
            "| " + " | ".join(f"**{c}**" if row.get("default") and i == 0 else c for i, c in enumerate(cells)) + " |"
        )
    return "\n".join(lines)


def best_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The default, every rival, and of each probe, signal and baseline the level and number of draws that does best."""
    chosen = [row for row in rows if row.get("default")]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("default"):
            continue
        if row["method"] != "memwatch":
            chosen.append(row)
        else:
            groups.setdefault((row["probe"], row["signal"], row["baseline"]), []).append(row)
    for group in groups.values():
        chosen.append(max(group, key=lambda row: (row["auc_heldout"] or 0) + (row["iou_fixed"] or 0)))
    return chosen


def plots(rows: Sequence[Mapping[str, Any]], product: Sequence[RunResult], folder: Path) -> None:
    """``levels.png``, ``draws.png`` and ``lead.png``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for signal in (
        "collapse",
        "log_ratio",
        "loss_log_ratio",
        "both",
        "score",
        "raw",
        "log_ratio_null",
        "both_baselines",
    ):
        baselines = ("first", "unconditional", "-", "first and unconditional")
        line = [r for r in rows if r["signal"] == signal and r["level"].isdecimal() and r["baseline"] in baselines]
        if line:
            for ax, key in zip(axes, ("iou_fixed", "auc_heldout"), strict=True):
                ax.plot(
                    [int(r["level"]) for r in line],
                    [np.nan if r[key] is None else r[key] for r in line],
                    marker="o",
                    label=signal,
                )
    for ax, title in zip(
        axes, ("IoU on stored templates, leave-one-run-out threshold", "AUC, stored against held-out"), strict=True
    ):
        ax.set(title=title, xlabel="timestep", xscale="log", ylim=(0, 1.02))
    axes[0].legend(fontsize=8)
    _save(figure, folder / "levels.png")

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for signal in ("log_ratio", "loss_log_ratio", "both", "both_baselines"):
        line = [
            r
            for r in rows
            if (r["signal"], r["level"]) == (signal, "mean") and r["baseline"].split(" and ")[0] == "first"
        ]
        line.sort(key=lambda r: r["draws"])
        for ax, key in zip(axes, ("iou_fixed", "auc_heldout"), strict=True):
            ax.plot(
                [r["draws"] for r in line],
                [np.nan if r[key] is None else r[key] for r in line],
                marker="o",
                label=signal,
            )
    for ax, title in zip(axes, ("IoU on stored templates", "AUC, stored against held-out"), strict=True):
        ax.set(title=title, xlabel="noise draws", ylim=(0, 1.02))
    axes[0].legend(fontsize=8)
    _save(figure, folder / "draws.png")

    figure, ax = plt.subplots(figsize=(8, 5))
    for result in product:
        for item in result.run.items:
            if item.kind in PLANTED:
                alert, copy = result.first_alert.get(item.name), result.run.first_copy(item)
                if alert is not None and copy is not None:
                    ax.plot(copy, alert, "o", color=f"C{PLANTED.index(item.kind)}", alpha=0.7)
    limit = max(result.run.steps[-1] for result in product)
    ax.plot([0, limit], [0, limit], color="grey", linewidth=1)
    for kind in PLANTED:
        ax.plot([], [], "o", color=f"C{PLANTED.index(kind)}", label=str(kind))
    ax.set(
        title="Below the line: alert before the first copy",
        xlabel="step of the first visible copy",
        ylabel="step of the first alert",
    )
    ax.legend()
    _save(figure, folder / "lead.png")


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def page(table_rows: Sequence[Row], stored: Sequence[Mapping[str, Any]], command: str) -> str:
    """``README.md`` of the results."""
    rows = [row.numbers for row in table_rows]
    product = table_rows[0].results
    runs = [result.run for result in product]
    default, published = (
        rows[0],
        [row["iou_oracle"] for row in rows if row["method"] == "published" and row["iou_oracle"] is not None],
    )
    goals = [(key, key, goal, how) for key, goal, how in TARGETS]
    if published:
        goals.append(
            ("iou_fixed against the best iou_oracle of the published procedure", "iou_fixed", max(published), ">=")
        )
    reached = [
        f"| {name} | {how} {shown(goal)} | {with_interval(default, key)} | {_met(default[key], goal, how)} |"
        for name, key, goal, how in goals
    ]
    plan = runs[0].plan
    chosen = best_rows(rows)
    return "\n".join(
        [
            "# Planted memorization: what memwatch finds, and what else would",
            "",
            f"Written by `{command}` from {len(runs)} runs ({', '.join(run.name for run in runs)}: how trained, and the seed): {plan['steps']} steps of "
            f"{plan['batch_size']}, measured at steps {', '.join(map(str, plan['events']))}. {machine()}.",
            "",
            "Every run plants templates (a fixed region, the rest another each time), single images and logos at four doses, beside subjects that are "
            "learned but never shown twice the same, plain backgrounds, and ordinary photos. An item counts as **stored** when at least half of "
            f"the last event's generations lie, inside its mask, within {COPY:.2f} of their distance to the nearest of {POOL} other pictures, each "
            "without its mean colour and contrast there (a small model leaves the exposure to the initial noise).",
            "",
            "## What became stored",
            "",
            "`exposures`: showings by the end. `copied`: share of generations that are copies. `distance_ratio`: median over items. `called`: items "
            "that the default called memorized at any event; what is called and not stored here may well be on its way.",
            "",
            table(stored, tuple(stored[0])),
            "",
            "## Targets, for what memwatch ships",
            "",
            "| number | target | measured | met |",
            "|---|---|---|---|",
            *reached,
            "",
            "Item by item, where it went wrong: " + "; ".join(mistakes(product) or ["nowhere"]) + ".",
            "",
            "## Who says something first",
            "",
            "On stored items. The default by its own rules; the rivals when above every control twice in a row (`validation loss`: above its lowest "
            "twice in a row; it speaks of the run, not of an item). `memwatch_earlier`, `memwatch_later`: share of stored items where the default's "
            "first alert came at an earlier, or a later, event than the method's.",
            "",
            table(firsts := first_alerts_table(table_rows), tuple(firsts[0])),
            "",
            "## By size of the region (the default)",
            "",
            "Of stored items, and of all items of the largest dose, whether their copies are exact or not. A size without a number had no item that "
            "was copied exactly.",
            "",
            table(sizes := size_table(product), tuple(sizes[0])),
            "",
            "## What one would ship knowing all runs but one",
            "",
            "The signal, baseline, level and number of draws that is best on the other runs (sum of `iou_oracle`, `auc_heldout`, `auc_learned` and "
            "`lead_fraction`), at the threshold that is best on the other runs, and how it does on the run left out.",
            "",
            table(choices, tuple(choices[0])) if (choices := choice_table(table_rows)) else "It takes two runs.",
            "",
            "## Localization and detection",
            "",
            "`iou_fixed`, `miou_fixed`: on stored templates, pixels pooled and mean over items; for the default (first row) at the threshold that is "
            "shipped, for all others at the threshold that is best on the other runs. `iou_oracle`: best of 101 thresholds on these very maps (nobody "
            "has that threshold). Detection by the map's maximum: stored items of every kind against held-out photos, learned subjects and plain "
            "backgrounds. Of every signal and baseline the level and number of draws that does best; all rows: `bench.json`. Brackets: 90 % bootstrap "
            "over runs.",
            "",
            table(chosen, COLUMNS),
            "",
            "## Alerts",
            "",
            "`called_*`: share with an alert at any event. `lead_fraction`: stored items whose first alert precedes the first copy; `lead_events` and "
            "`lead_exposures`: medians of by how much, over those that have both.",
            "",
            table([row for row in chosen if row["called_stored"] is not None], ALERT_COLUMNS),
            "",
            "![by noise level](levels.png)",
            "",
            "![by noise draws](draws.png)",
            "",
            "![alert against first copy](lead.png)",
            "",
        ]
    )


def mistakes(product: Sequence[RunResult]) -> list[str]:
    """The default's false alarms, and the stored items that it called too late or never."""
    found = []
    for result in product:
        run = result.run
        for item in run.items:
            alert, copy = result.first_alert.get(item.name), run.first_copy(item)
            if item.kind in NEGATIVES and alert is not None:
                found.append(f"{run.name} called {item.name} ({item.kind}) at step {alert}")
            if run.is_stored(item) and not precedes(result, item):
                found.append(
                    f"{run.name} {item.name} copied at step {copy}, called {'never' if alert is None else f'at step {alert}'}"
                )
    return found


def _met(value: float | None, goal: float | None, how: str) -> str:
    if value is None or goal is None:
        return "not measured"
    return "yes" if (value >= goal if how == ">=" else value <= goal) else "**no**"


def write(rows: Sequence[Row], stored: Sequence[Mapping[str, Any]], folder: Path, command: str) -> None:
    """``README.md``, ``bench.json`` and the plots in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [row.numbers for row in rows]
    (folder / "bench.json").write_text(json.dumps(numbers, indent=1, allow_nan=False), encoding="utf-8")
    plots(numbers, rows[0].results, folder)
    (folder / "README.md").write_text(page(rows, stored, command), encoding="utf-8")
