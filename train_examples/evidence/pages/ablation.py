"""The ablation, ``results/ablation.md``: each part of the rule changed or removed, one at a time, on the same twins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from evidence.pages.markdown import PACKAGES, markdown_table
from evidence.runs.finished import Pair
from evidence.verdicts.product import judged
from evidence.verdicts.tables import (
    Judged,
    confirmed,
    detection,
    is_before,
    is_called,
    is_in_time,
    of_copied,
    overlap,
)
from evidence.verdicts.truth import truths_of
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config
from memwatch.measure.signals import Signals
from memwatch.report.about import machine

PAGE = """# Ablation: what each part of the rule is for

Written by `bench.py --ablation` from the twins {names}, trained at commit {commits}. {machine}.

The twins chose the rule; other seeds report it (`README.md`, which explains the words). Each row changes or removes one
thing. *AUC* of T at the last event, what is stored against the same pictures in the other twin, against views of
learned subjects, against held-out pictures. *Copied*: {copied} items are copied at the end; how many are called, called
before the first copy, called at it or before. *Wrong*: called, and not confirmed by the twin. *IoU*: mean over the
copied parts of pictures at the last event. Retained variance was measured at every tenth event only, and not of
ordinary pictures, so that those rows say nothing of when.

{table}
"""


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes:
        settings: of memwatch's configuration. constants: by the place where they are read.
        by_curvature: whether it needs what was measured at few events.
    """

    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    by_curvature: bool = False

    @contextmanager
    def applied(self) -> Iterator[MemWatchConfig]:
        """The changed configuration, while the constants are changed."""
        with ExitStack() as stack:
            for place, value in self.constants.items():
                stack.enter_context(patch(f"memwatch.{place}", value))
            yield load_config(self.settings)


def levels(*timesteps: int, draws: int = 4) -> dict[str, Any]:
    return {"levels": {"timesteps": list(timesteps), "draws": draws}}


def never_exceeded(signals: Signals, terms: str) -> torch.Tensor | None:
    """Instead of k0: the unconditional branch gives nothing back."""
    return None if signals.branch is None else torch.full((len(signals.branch.score.samples),), math.inf)


VARIANTS = (
    Variant("the rule"),
    Variant("level 501 alone", levels(501)),
    Variant("level 801 alone", levels(801)),
    Variant("levels 301 and 501", levels(301, 501)),
    Variant("levels 501 and 651", levels(501, 651)),
    Variant("levels 651 and 801", levels(651, 801)),
    Variant("levels 301, 501, 651 and 801", levels(301, 501, 651, 801)),
    Variant("2 draws", levels(501, 801, draws=2)),
    Variant("loss floor 0.3", constants={"measure.signals.LOSS_FLOOR": 0.3}),
    Variant("loss floor 0.1", constants={"measure.signals.LOSS_FLOOR": 0.1}),
    Variant("loss floor 3", constants={"measure.signals.LOSS_FLOOR": 3.0}),
    Variant("S alone", {"signals": {"against": "snapshot"}}),
    Variant("N alone", {"signals": {"against": "unconditional"}}),
    Variant("min(S, N)", constants={"measure.signals.branch_quantile": never_exceeded}),
    Variant("variance", {"signals": {"terms": "variance"}}, by_curvature=True),
    Variant("variance, S alone", {"signals": {"terms": "variance", "against": "snapshot"}}, by_curvature=True),
    Variant("3x3 mean filter before it decides", constants={"measure.signals.DECIDED_ON": 3}),
    Variant("5x5 mean filter before it decides", constants={"measure.signals.DECIDED_ON": 5}),
    Variant("regions and severities without a mean filter", {"signals": {"smooth": 1}}),
    Variant("regions and severities with a 5x5 mean filter", {"signals": {"smooth": 5}}),
    Variant("controls' variance not moderated", constants={"judge.statistic.PRIOR_DF": 0}),
    Variant("no least spread", constants={"judge.statistic.RESOLUTION": 1e-9}),
    Variant("each event alone", constants={"judge.findings.LASTING": 1}),
    Variant("the mean of two events", constants={"judge.findings.LASTING": 2}),
    Variant("no least factor", constants={"judge.verdict.MIN_SEVERITY": 1.0}),
    Variant("least factor 1.4", constants={"judge.verdict.MIN_SEVERITY": 1.4}),
    Variant("least factor 1.6", constants={"judge.verdict.MIN_SEVERITY": 1.6}),
    Variant("no screen: four draws of everything", constants={"judge.screen.MIN_Z_SCORE": -1e9}),
)


def write_ablation(pairs: Sequence[Pair], folder: Path, variants: Sequence[Variant] = VARIANTS) -> Path:
    """``ablation.md`` in ``folder``. ``pairs`` must hold every level of the variants."""
    truths, rows, copied = truths_of(pairs), [], 0
    for variant in tqdm(variants, desc="variants"):
        with variant.applied() as config:
            found = [Judged(judged(truth.run, config), truth) for truth in truths]
        rows.append(row(variant, found))
        copied = sum(len(j.copied) for j in found)
    text = PAGE.format(
        names=", ".join(pair.name for pair in pairs),
        commits=", ".join(sorted({f"`{run.plan['commit']}`" for pair in pairs for run in pair.runs})),
        machine=machine(*PACKAGES),
        copied=copied,
        table=markdown_table(rows),
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ablation.md"
    file.write_text(text, encoding="utf-8")
    return file


def row(variant: Variant, found: Sequence[Judged]) -> dict[str, Any]:
    """One line of the table."""
    groups = {"AUC, other twin": "out", "AUC, learned": "learned", "AUC, held out": "held out"}
    told: dict[str, Any] = {"rule": variant.says} | {name: detection(found, g) for name, g in groups.items()}
    when = {"called": is_called, "before": is_before, "at or before": is_in_time}
    for name, holds in when.items():
        value = of_copied(found, holds).value
        told[name] = None if value is None or variant.by_curvature else f"{value:.2f}"
    calls, right = sum(len(j.called) for j in found), confirmed(found).value
    told["wrong"] = (
        None if variant.by_curvature else f"{round(calls * (1 - (right or 0)))} of {calls}" if calls else "0"
    )
    return told | {"IoU": overlap(found, 0, 1).value}
