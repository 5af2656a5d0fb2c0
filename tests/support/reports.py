"""Reports made by hand, and what W&B writes of them offline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.builders import picture
from support.observations import BY_VARIANCE, controls, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import Judgement, judge_event
from memwatch.measure.measurement import Observation
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


def report_of(*observations: Observation, step: int = 7, before: Any = None, settings: Any = None, **parts: Any):
    """The report of an event that saw these, as the callback would make it; ``parts`` of it differ."""
    config, calibrated = load_config(BY_VARIANCE, **(settings or {})), any(o.probe.is_control for o in observations)
    known = Judgement() if before is None else before.judgement
    judgement = judge_event(observations, known.states, step, config)
    report = Report(step, config, judgement, calibrated, 1.5, 2, None)
    return replace(report, **parts)


def event_of_a_cat(step: int, factor: float = 5.0, *, before: Report | None = None, others: int = 0) -> Report:
    """A cat that has lost ``factor`` times its freedom on the left, ``others`` that have not, and twenty controls."""
    settings, shown = {"alerts": {"false_alarms_per_run": 0.1}}, np.asarray(picture(0, 32))
    quiet = [seen(f"other{i}", 1.0, image=shown) for i in range(others)]
    observations = [seen("cat", factor, image=shown), *quiet, *controls(20, 1.0, spread=0.1)]
    report = report_of(*observations, step=step, before=before, settings=settings, about=ABOUT)
    return replace(report, pictures={f.name: picture(step, 48) for f in report.findings})


def run_of_a_cat() -> list[Report]:
    """Quiet, then suspicious, then memorized, then still memorized but weaker."""
    reports: list[Report] = []
    for step, factor in ((0, 1.0), (2, 1.7), (4, 6.0), (6, 5.0)):
        reports.append(event_of_a_cat(step, factor, before=reports[-1] if reports else None))
    found = [str(report.findings[0].verdict) for report in reports]
    assert found == ["no evidence", "suspicious", "memorized", "memorized"]
    return reports


def offline(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Whatever W&B writes lies below ``folder``."""
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "ARTIFACT_DIR"):
        patch.setenv(f"WANDB_{name}", str(folder))
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        patch.setenv(f"WANDB_{name}", value)


def write(reports: Sequence[Report], between: Callable[[Any], Any] = lambda run: None, **options: Any) -> None:
    """A whole W&B run of these reports; ``between`` is called before each with W&B's run. ``options``: of its start."""
    import wandb

    run = wandb.init(project="watched", **options)
    sink = WandbSink(SimpleNamespace(tracker=run))
    for report in reports:
        between(run)
        sink.write(report)
    run.finish()
    wandb.teardown()  # W&B's own process has written everything
