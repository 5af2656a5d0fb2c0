"""Proofs: whether memwatch's own ``copied`` is right, by the benchmark's ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memwatch.bench.protocol import as_decoded
from memwatch.bench.results import RunResult
from memwatch.judge.findings import Finding
from memwatch.judge.proof import compared
from memwatch.measure.copies import COPY, Pool


def proof_table(product: Sequence[RunResult], vae: Any) -> list[dict[str, Any]]:
    """Generations of planted items that memwatch spoke of, run by run, and all runs together.

    ``precision``: of those that memwatch says copy the region, the share that copy the item inside its mask by the
    benchmark's rule. ``recall``: the other way round.
    """
    rows = []
    total = np.zeros(3, dtype=int)
    for result in product:
        counts = np.zeros(3, dtype=int)  # said and true, said, true
        pictures = as_decoded([np.asarray(item.probe) for item in result.run.items], vae)
        names = [item.name for item in result.run.items]
        shown = {n: (picture[None] * 255).round().astype(np.uint8) for n, picture in zip(names, pictures, strict=True)}
        pool = Pool.of(shown, {name for name, probe in result.run.probes.items() if probe.is_control})
        for step, judgement in result.events.items():
            for finding in judgement.findings:
                counts += counted(result, step, finding, pool)
        rows.append(row(result.run.name, counts))
        total += counts
    return [*rows, row("all", total)]


def counted(result: RunResult, step: int, finding: Finding, pool: Pool) -> np.ndarray:
    """Generations that memwatch and the benchmark both call copies, that memwatch does, and that the benchmark does."""
    true = np.asarray(result.run.numbers[step]["copy_ratio"].get(finding.name, [])) < COPY
    if not len(true) or not finding.regions:
        return np.zeros(3, dtype=int)
    made = result.run.tensors(step)[f"{finding.name}/generated"].numpy()
    said = np.asarray(compared(finding, made, pool)[0]) < COPY
    return np.array([(said & true).sum(), said.sum(), true.sum()])


def row(name: str, counts: np.ndarray) -> dict[str, Any]:
    both, said, true = map(int, counts)
    return {
        "run": name,
        "copies by the benchmark": true,
        "by memwatch": said,
        "precision": both / said if said else None,
        "recall": both / true if true else None,
    }
