"""Prompt probes on the same runs: generations that are noised again, by the number of seeds, and other ways to look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memwatch.bench.items import Item, Kind
from memwatch.bench.metrics import auc, resized
from memwatch.bench.protocol import NUM_PROMPTS
from memwatch.bench.results import RunResult, keep_map, run_method
from memwatch.bench.rivals import RIVALS
from memwatch.bench.rows import mean_of, overlap_of
from memwatch.bench.runs import Finished
from memwatch.config import MemWatchConfig
from memwatch.judge.alerts import ProbeState, Verdict
from memwatch.judge.findings import judge_event

SEEDS = (1, 2, 4)
CONTROL, HELD_OUT = NUM_PROMPTS  # names of captions that were never trained on


def run_prompts(config: MemWatchConfig, run: Finished, seeds: int) -> RunResult:
    """memwatch on the captions alone: its own rule at the last two events, judged by captions never trained on.

    Args:
        seeds: generations of each caption that are pooled.
    """
    names = [item.name for item in run.planted]
    names += [f"{kind}-{i:02d}" for kind, count in NUM_PROMPTS.items() for i in range(count)]
    result = RunResult(run)
    states: Mapping[str, ProbeState] = {}
    for step in run.steps[-2:]:
        observed = [run.prompt_observation(name, step, seeds, name.startswith(CONTROL)) for name in names]
        judgement = judge_event(observed, states, step, config)
        states = judgement.states
        result.events[step] = judgement
        result.scores = {f.name: f.evidence.excess or 0.0 for f in judgement.findings}
        for f in judgement.findings:
            if f.verdict is Verdict.MEMORIZED:
                result.first_alert.setdefault(f.name, step)
            if not f.name.startswith(HELD_OUT):
                keep_map(result, f)
    return result


def prompt_table(product: Sequence[RunResult], config: MemWatchConfig) -> list[dict[str, Any]]:
    """Localization and detection of stored items, by the way one looks; on runs whose captions are the items' own."""
    reference = [r for r in product if r.run.has_prompts]
    if not reference:
        return []
    rows = [row_of("reference probes (the training image)", reference, [held_out_photos(r) for r in reference])]
    for seeds in SEEDS:
        found = [run_prompts(config, r.run, seeds) for r in reference]
        held_out = [[name for name in r.scores if name.startswith(HELD_OUT)] for r in found]
        rows.append(row_of(f"captions, re-noised, {seeds} seed{'s' * (seeds > 1)}", found, held_out))
    for method in RIVALS:
        if method.method == "published":
            found = [run_method(method, r.run) for r in reference]
            photos = [held_out_photos(r) for r in reference]
            name = f"captions, the published way, {method.signal.removeprefix('published_')}"
            rows.append(row_of(name, found, photos, verdicts=False))
    return rows


def held_out_photos(result: RunResult) -> list[str]:
    return [item.name for item in result.run.of_kind(Kind.HELD_OUT)]


def row_of(
    look: str, results: Sequence[RunResult], held_out: Sequence[Sequence[str]], verdicts: bool = True
) -> dict[str, Any]:
    """One line of the table.

    Args:
        held_out: names of what was never trained on, for each run.
        verdicts: whether the way has a rule of its own, with regions and calls.
    """
    stored = [(r, i) for r in results for i in r.run.stored]
    templates = [(r, i) for r in results for i in r.templates]
    positives = [r.scores[i.name] for r, i in stored if i.name in r.scores]
    negatives = [r.scores[name] for r, names in zip(results, held_out, strict=True) for name in names]
    calls = [name in r.first_alert for r, names in zip(results, held_out, strict=True) for name in names]
    return {
        "look": look,
        "stored": len(stored),
        "pixel_auroc": mean_of([pixel_auroc(r, i) for r, i in templates]),
        "iou": overlap_of(templates)[1] if verdicts else None,
        "auc": auc(positives, negatives) if positives and negatives else None,
        "called_stored": mean_of([i.name in r.first_alert for r, i in stored]) if verdicts else None,
        "called_heldout": mean_of(calls) if verdicts else None,
    }


def pixel_auroc(result: RunResult, item: Item) -> float:
    """Probability that a pixel inside the mask exceeds one outside."""
    values = resized(result.maps[item.name], item.mask.shape)
    return float(auc(np.asarray(values[item.mask]), np.asarray(values[~item.mask])))
