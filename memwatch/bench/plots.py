"""The page's three plots, from ``bench.json`` and the default's first alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memwatch.bench.items import PLANTED
from memwatch.bench.results import RunResult

BY_LEVEL = "collapse log_ratio loss_log_ratio both score raw log_ratio_null both_baselines".split()
BY_DRAWS = "log_ratio loss_log_ratio both both_baselines".split()
FIRST = ("first", "first and unconditional")


def plots(rows: Sequence[Mapping[str, Any]], product: Sequence[RunResult], folder: Path) -> None:
    """``levels.png``, ``draws.png`` and ``lead.png``."""
    single = [r for r in rows if r["level"].isdecimal() and r["baseline"] in (*FIRST, "unconditional", "-")]
    lines = {s: [(int(r["level"]), r) for r in single if r["signal"] == s] for s in BY_LEVEL}
    two_panels(lines, folder / "levels.png", ", leave-one-run-out threshold", xlabel="timestep", xscale="log")
    mean = [r for r in rows if r["level"] == "mean" and r["baseline"] in FIRST]
    lines = {s: sorted((r["draws"], r) for r in mean if r["signal"] == s) for s in BY_DRAWS}
    two_panels(lines, folder / "draws.png", "", xlabel="noise draws")
    lead(product, folder / "lead.png")


def two_panels(lines: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]], file: Path, how: str, **axis: str) -> None:
    """Localization and detection of every signal over one axis.

    Args:
        lines: by signal, places on the axis with their rows.
        how: the IoU's threshold came about.
    """
    figure, axes = _figure(1, 2, figsize=(11, 4.5))
    panels = (("iou_fixed", f"IoU on stored templates{how}"), ("auc_heldout", "AUC, stored against held-out"))
    for ax, (key, title) in zip(axes, panels, strict=True):
        for signal, line in lines.items():
            if line:
                values = [np.nan if row[key] is None else row[key] for _, row in line]
                ax.plot([x for x, _ in line], values, marker="o", label=signal)
        ax.set(title=title, **axis, ylim=(0, 1.02))
    if axes[0].lines:
        axes[0].legend(fontsize=8)
    _save(figure, file)


def lead(product: Sequence[RunResult], file: Path) -> None:
    """The default's first alert against the first copy, one dot per item that has both."""
    figure, ax = _figure(figsize=(8, 5))
    for i, kind in enumerate(PLANTED):
        pairs = [
            (r.run.first_copy(item), r.first_alert.get(item.name)) for r in product for item in r.run.of_kind(kind)
        ]
        for copy, alert in pairs:
            if alert is not None and copy is not None:
                ax.plot(copy, alert, "o", color=f"C{i}", alpha=0.7)
        ax.plot([], [], "o", color=f"C{i}", label=str(kind))
    limit = max(result.run.steps[-1] for result in product)
    ax.plot([0, limit], [0, limit], color="grey", linewidth=1)
    ax.set(xlabel="step of the first visible copy", ylabel="step of the first alert")
    ax.set_title("Below the line: alert before the first copy")
    ax.legend()
    _save(figure, file)


def _figure(*shape: int, **how: Any) -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(*shape, **how)


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)
