"""Weights & Biases: one row per event, pictures with layers to switch, a table, alerts, maps, the configuration.

A script that logs without a step moves W&B's own step ahead, and W&B then drops rows with an earlier one. So every
event is one row at the newest step, and the true one is ``memwatch/step``, declared as the x axis.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any

import safetensors.torch
from torch import Tensor

from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.report.about import About
from memwatch.report.report import Report
from memwatch.report.wandb_media import ProbeTable, images_of

logger = logging.getLogger("memwatch")

STEP = "memwatch/step"
# What W&B keeps of a series beside its last value. Each key is declared by its full name: of two patterns that fit the
# same key W&B takes either one.
EXTREMES = {"memwatch/max_severity": "max", "memwatch/severity/": "max", "memwatch/min_p": "min", "memwatch/p/": "min"}
ABOUT = ("model", "machine", "versions", "training_rows")  # of ``About``: beside the settings in the run's config
TITLE = 63  # characters of an alert's title that W&B takes
WAIT = 600.0  # seconds in which W&B sends no second alert of the same title
SINGLE = 5  # alerts of one event that are sent one by one; more are sent together


class WandbSink:
    """Writes to the tracker's run.

    | in W&B | holds |
    |---|---|
    | history | a row per event: the keys of ``Report``, the images of ``wandb_media``, ``memwatch/probes`` |
    | ``memwatch/probes`` | one growing table for the run, see ``ProbeTable`` |
    | summary | the last value of each key; with ``.max`` of severities and ``.min`` of p-values |
    | config | ``memwatch``: the settings; ``memwatch.about``: model, machine, versions, numbers of probes |
    | alerts | see ``alerts_of``; W&B sends the same title once in ``WAIT`` seconds |
    | artifact ``memwatch-maps-RUN`` | the deciding maps, see ``maps_of``, with the alias ``step-N`` |

    The maps are uploaded at events with an alert, and once more on closing if there was an event since.

    A run that W&B has resumed may hold events already that are looked at again, because the checkpoint is older. Their
    rows stay as they are, as W&B keeps the script's own: it takes no second row for a step.

    Raises:
        Exception: whatever W&B raises; the row is lost then.
    """

    name = "wandb"

    def __init__(self, tracker: Any) -> None:
        self._run = tracker.tracker
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("memwatch/*", step_metric=STEP)
        self._defined: set[str] = set()
        self._about = About()
        self._table = ProbeTable()
        self._row = -1  # W&B's step of the last row
        self._held: float | None = None  # the last event's step in the run
        self._unsaved: tuple[int, dict[str, Tensor]] | None = None

    def write(self, report: Report) -> None:
        if self._holds(report.step):
            return
        self._configure(report.about)
        row: dict[str, Any] = dict(report.scalars())
        self._define(row)
        if report.alerts:
            row["memwatch/alert"] = "\n\n".join(report.alert_text(f) for f in report.alerts)
        images = images_of(report)
        row |= images
        if report.findings:
            row["memwatch/probes"] = self._table.with_rows(report, images)
        self._log(row, report.step)
        self._held = report.step
        if maps := maps_of(report):
            self._unsaved = (report.step, maps)
        for title, text, level in alerts_of(report):
            self._run.alert(title=title, text=text, level=level, wait_duration=WAIT)
        if report.alerts:
            self._upload()

    def close(self) -> None:
        """Upload the last event's maps. accelerate finishes its trackers itself, after that."""
        self._upload()

    def _holds(self, step: int) -> bool:
        """Whether the run holds this event already."""
        if self._held is None:
            self._held = -1
            if self._run.resumed and (held := self._run.summary.get(STEP)) is not None:
                self._held = float(held)
        if step > self._held:
            return False
        logger.warning("the W&B run holds memwatch's event of step %d already and keeps it as it is", step)
        return True

    def _configure(self, about: About) -> None:
        if about.settings and about != self._about:
            facts: dict[str, Any] = {key: getattr(about, key) for key in ABOUT}
            facts["watched"] = dict(Counter(probe["role"] for probe in about.probes))
            self._run.config.update({"memwatch": about.settings | {"about": facts}}, allow_val_change=True)
            self._about = about

    def _define(self, row: dict[str, Any]) -> None:
        """Declare what the summary keeps of keys that have not been logged before."""
        for key in row.keys() - self._defined:
            extreme = next((what for start, what in EXTREMES.items() if key.startswith(start)), None)
            if extreme is not None:
                path = key.replace(".", "\\.")  # a bare dot leads into nested values
                self._run.define_metric(path, step_metric=STEP, summary=f"last,{extreme}")
            self._defined.add(key)

    def _log(self, row: dict[str, Any], step: int) -> None:
        """One row, at a step of W&B's own that it takes and that none of the earlier events has."""
        if self._run.settings.mode == "shared":  # where W&B counts no steps
            self._run.log(row)
            return
        self._row = max(step, self._run.step, self._row + 1)
        self._run.log(row, step=self._row)

    def _upload(self) -> None:
        import wandb

        if self._unsaved is None:
            return
        step, maps = self._unsaved
        name = re.sub(r"[^\w.-]", "-", f"memwatch-maps-{self._run.id}")
        artifact = wandb.Artifact(name, type="memwatch-maps", metadata={"step": step})
        with artifact.new_file(f"step_{step:07d}.safetensors", mode="wb") as file:
            file.write(safetensors.torch.save(maps))
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
        self._unsaved = None


def maps_of(report: Report) -> dict[str, Tensor]:
    """The deciding map of every probe that was compared, and its error: ``PROBE/decisive`` and ``PROBE/decisive.sem``.

    Natural logs of a factor, float32 ``(h, w)``.
    """
    maps = {}
    for f in report.findings:
        if f.signals is not None and (decisive := f.signals.decisive) is not None:
            maps[f"{f.name}/decisive"] = decisive.mean.float().contiguous()
            maps[f"{f.name}/decisive.sem"] = decisive.sem.float().contiguous()
    return maps


def alerts_of(report: Report) -> list[tuple[str, str, str]]:
    """The event's alerts as ``(title, text, level)``; one for all where there are more than ``SINGLE``.

    Titles are the same at every event, since W&B limits the rate by title: one per probe and verdict, and one for many
    probes at once. What W&B leaves out still stands in ``memwatch/alert`` and in the table.
    """
    alerts = [(f"memwatch: {f.verdict}: {f.name}"[:TITLE], report.alert_text(f), level_of(f)) for f in report.alerts]
    if len(alerts) <= SINGLE:
        return alerts
    level = "ERROR" if any(level == "ERROR" for *_, level in alerts) else "WARN"
    names = ", ".join(f"{f.name} ({f.verdict})" for f in report.alerts)
    texts = [f"memwatch, step {report.step}: {len(alerts)} probes: {names}", *(text for _, text, _ in alerts)]
    return [("memwatch: several probes at once", "\n\n".join(texts), level)]


def level_of(finding: Finding) -> str:
    """``WARN`` for a suspicious probe; ``ERROR`` for a memorized one and for output that is no longer finite."""
    return "WARN" if finding.verdict is Verdict.SUSPICIOUS else "ERROR"
