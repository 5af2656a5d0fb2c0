"""The benchmark's page, from finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memwatch.bench.markdown import markdown_table
from memwatch.bench.product import judged
from memwatch.bench.runs import Finished
from memwatch.bench.stored import state_of
from memwatch.config import MemWatchConfig


def write_page(
    runs: Sequence[Finished], config: MemWatchConfig, folder: Path, command: str, sscd: Path | None, base: Path
) -> Path:
    """``README.md`` in ``folder``: what is stored and what was called, item by item."""
    rows = []
    for run in runs:
        product = judged(run, config)
        for item in run.watched:
            called, state = product.first_alert.get(item.name), state_of(run, item)
            if called is not None or item in run.planted:
                rows.append({"run": run.name, "item": item.name, "state": str(state), "called": called})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "README.md"
    file.write_text(f"Written by `{command}`.\n\n{markdown_table(rows)}\n", encoding="utf-8")
    return file
