"""Weights & Biases: scalars against ``memwatch/step``, heatmaps with the regions as boxes, alerts as W&B alerts.

A script that logs without a step moves W&B's own step ahead, and W&B then drops rows with an earlier one. So every
event is one row at the newest step, and the true one is ``memwatch/step``, declared as the x axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memwatch.judge.alerts import Verdict
from memwatch.judge.regions import Region
from memwatch.report.report import Report


class WandbSink:
    name = "wandb"

    def __init__(self, tracker: Any) -> None:
        self._run = tracker.tracker
        self._run.define_metric("memwatch/step", hidden=True)
        self._run.define_metric("memwatch/*", step_metric="memwatch/step")

    def write(self, report: Report) -> None:
        import wandb

        row: dict[str, Any] = dict(report.scalars())
        for f in report.findings:
            if (picture := report.pictures.get(f.name)) is not None:
                image = wandb.Image(np.asarray(picture), caption=f"{f.verdict}: {f.reason}")
                row[f"memwatch/heatmap/{f.name}"] = image
            if (shown := f.observation.image) is not None:
                boxes = [_box(region) for region in f.regions]
                layer = {"regions": {"box_data": boxes, "class_labels": {1: "stored"}}} if boxes else None
                image = wandb.Image(shown, boxes=layer, caption=f.observation.probe.prompt)
                row[f"memwatch/regions/{f.name}"] = image
        if report.alerts:
            row["memwatch/alert"] = "\n\n".join(report.alert_text(f) for f in report.alerts)
        self._run.log(row, step=max(report.step, self._run.step))
        for f in report.alerts:
            level = "WARN" if f.verdict is Verdict.SUSPICIOUS else "ERROR"
            self._run.alert(title=f"memwatch: {f.name} {f.verdict}", text=report.alert_text(f), level=level)

    def close(self) -> None:
        """accelerate finishes its trackers itself."""


def _box(region: Region) -> dict[str, Any]:
    """A region as W&B draws boxes."""
    factor = float(np.exp(region.mean))
    return {
        "position": dict(zip(("minX", "minY", "maxX", "maxY"), region.box, strict=True)),
        "domain": "pixel",
        "class_id": 1,
        "box_caption": f"{factor:.1f}x",
        "scores": {"factor": factor},
    }
