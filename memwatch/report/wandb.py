"""Weights & Biases: scalars against ``memwatch/step``, heatmaps with the regions as boxes, alerts as W&B alerts.

A script that logs without a step moves W&B's own step ahead, and W&B then drops rows with an earlier one. So every event is one row at the
newest step, and the true one is ``memwatch/step``, declared as the x axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memwatch.alerts import Verdict
from memwatch.report import Report


class WandbSink:
    name = "wandb"

    def __init__(self, tracker: Any) -> None:
        self._run = tracker.tracker
        self._run.define_metric("memwatch/step", hidden=True)
        self._run.define_metric("memwatch/*", step_metric="memwatch/step")

    def write(self, report: Report) -> None:
        import wandb

        row: dict[str, Any] = dict(report.scalars())
        for finding in report.findings:
            if (picture := report.pictures.get(finding.name)) is not None:
                image = wandb.Image(np.asarray(picture), caption=f"{finding.verdict}: {finding.reason}")
                row[f"memwatch/heatmap/{finding.name}"] = image
            if finding.image is not None:
                boxes = [
                    {
                        "position": dict(zip(("minX", "minY", "maxX", "maxY"), region.box, strict=True)),
                        "domain": "pixel",
                        "class_id": 1,
                        "box_caption": f"{np.exp(region.mean):.1f}x",
                        "scores": {"factor": float(np.exp(region.mean))},
                    }
                    for region in finding.regions
                ]
                layer = {"regions": {"box_data": boxes, "class_labels": {1: "stored"}}} if boxes else None
                row[f"memwatch/regions/{finding.name}"] = wandb.Image(
                    finding.image, boxes=layer, caption=finding.prompt
                )
        if report.alerts:
            row["memwatch/alert"] = "\n\n".join(report.alert_text(finding) for finding in report.alerts)
        self._run.log(row, step=max(report.step, self._run.step))
        for finding in report.alerts:
            level = "WARN" if finding.verdict is Verdict.SUSPICIOUS else "ERROR"
            self._run.alert(
                title=f"memwatch: {finding.name} {finding.verdict}", text=report.alert_text(finding), level=level
            )

    def close(self) -> None:
        """accelerate finishes its trackers itself."""
