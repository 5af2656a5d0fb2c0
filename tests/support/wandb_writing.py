"""Reports made by hand, written to a W&B run that stays offline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import picture
from support.observations import controls, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.judge.verdict import Verdict
from memwatch.report.about import About
from memwatch.report.report import Report
from memwatch.report.wandb import WandbSink

ABOUT = About(
    model="StableDiffusion, epsilon",
    probes=({"name": "cat", "role": "probe"}, {"name": "c", "role": "control"}, {"name": "d", "role": "control"}),
    settings={"every_steps": 2, "levels": {"timesteps": (61, 301)}, "max_train_steps": None},
    machine="x86_64, 2 CPU cores",
    versions={"torch": "2.13.0"},
    training_rows=8,
)


def offline(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Whatever W&B writes lies below ``folder``."""
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "ARTIFACT_DIR"):
        patch.setenv(f"WANDB_{name}", str(folder))
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        patch.setenv(f"WANDB_{name}", value)


def report_of(step: int, *, factor: float = 5.0, states: Any = None, others: int = 0) -> Report:
    """A cat that has lost ``factor`` times its freedom on the left, ``others`` that have not, and twenty controls."""
    config = load_config({"alerts": {"false_alarms_per_run": 0.5}})
    shown = np.asarray(picture(0, 32))
    quiet = [seen(f"other{i}", 1.0, image=shown) for i in range(others)]
    observations = [seen("cat", factor, image=shown), *quiet, *controls(20, 1.0, spread=0.1)]
    judgement = judge_event(observations, states or {}, step, config)
    report = Report(step, config, judgement, True, 1.5, 0, None, about=ABOUT)
    return replace(report, pictures={f.name: picture(step, 48) for f in report.findings})


def reports_of_a_run() -> list[Report]:
    """Quiet, then suspicious, then memorized, then still memorized but weaker."""
    reports: list[Report] = []
    for step, factor in ((0, 1.0), (2, 4.0), (4, 6.0), (6, 5.0)):
        reports.append(report_of(step, factor=factor, states=reports[-1].judgement.states if reports else None))
    verdicts = [report.findings[0].verdict for report in reports]
    assert verdicts == [Verdict.NO_EVIDENCE, Verdict.SUSPICIOUS, Verdict.MEMORIZED, Verdict.MEMORIZED]
    return reports


class Tracker:
    """As much of accelerate's tracker as the sink asks for."""

    name = "wandb"

    def __init__(self, run):
        self.tracker = run


def write(reports: Sequence[Report], between: Callable[[Any], Any] = lambda run: None, **options: Any) -> None:
    """A whole W&B run of these reports.

    Args:
        between: called with W&B's run before every report. options: of ``wandb.init``.
    """
    import wandb

    run = wandb.init(project="watched", **options)
    sink = WandbSink(Tracker(run))
    for report in reports:
        between(run)
        sink.write(report)
    sink.close()
    run.finish()
    wandb.teardown()  # W&B's own process has written everything
