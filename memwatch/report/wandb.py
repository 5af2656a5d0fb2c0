"""Weights & Biases: one row per event, pictures with layers to switch on and off, a table, alerts, the configuration.

A script that logs without a step moves W&B's own step ahead, and W&B then drops rows with an earlier one. So every
event is one row at the newest step, and the true one is ``memwatch/step``, declared as the x axis.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.measure.signals import factor
from memwatch.report.about import About
from memwatch.report.pictures import image_of
from memwatch.report.report import Report

logger = logging.getLogger("memwatch")

STEP = "memwatch/step"
ABOUT = ("model", "machine", "versions", "training_rows")  # of ``About``: beside the settings in the run's config
TITLE = 63  # characters of an alert's title that W&B takes
PICTURED = 16  # probes whose pictures an event logs, unless more have evidence
CLASSES = {Verdict.SUSPICIOUS: 1, Verdict.MEMORIZED: 2}  # of region layers; 0 is no region
COLUMNS = ("step", "probe", "prompt", "image", "heatmap", "severity", "p", "area", "copied", "verdict", "reason")


class WandbSink:
    """Writes to the tracker's run; accelerate finishes it.

    | in W&B | holds |
    |---|---|
    | history | a row per event: the keys of ``Report`` |
    | ``memwatch/probes`` | one growing table: a row per probe and event, with ``COLUMNS`` |
    | summary | of each key ``.last``, ``.min`` and ``.max`` |
    | config | ``memwatch``: the settings; ``memwatch.about``: model, machine, versions, numbers of probes |
    | alerts | one per event with news |

    In the table a probe has its pictures in its first row, and wherever it has evidence or news: each one lies in W&B's
    storage a second time. A run that W&B has resumed may hold events already that are measured again, because the
    checkpoint is older. Their rows stay as they are, because W&B takes no second row for a step.
    """

    def __init__(self, tracker: Any) -> None:
        self._run = tracker.tracker
        self._run.define_metric(STEP, hidden=True)
        self._defined: set[str] = set()
        self._define("memwatch/*")
        held = self._run.summary.get(STEP) if self._run.resumed else None
        self._held = -1.0 if held is None else float(held)  # the last event's step in the run
        self._about = About()
        self._table: Any = None
        self._in_table: set[str] = set()  # probes with pictures there
        self._row = -1  # W&B's step of the last row

    def write(self, report: Report) -> None:
        if report.step <= self._held:
            logger.info("the W&B run holds the event of step %d already; its row stays as it is", report.step)
            return
        if (about := report.about) != self._about and about.settings:
            facts: dict[str, Any] = {key: getattr(about, key) for key in ABOUT}
            facts["watched"] = dict(Counter(probe["role"] for probe in about.probes))
            self._run.config.update({"memwatch": about.settings | {"about": facts}}, allow_val_change=True)
            self._about = about
        row: dict[str, Any] = dict(report.scalars())
        for key in row:
            if "." in key:
                self._define(key.replace(".", "\\."))  # a bare dot leads into nested values, and no pattern fits it
        images, text = images_of(report), "\n\n".join(report.alert_text(f) for f in report.alerts)
        row |= {"memwatch/alert": text} | images if text else images
        if report.findings:
            row["memwatch/probes"] = self._with_rows(report, images)
        if self._run.settings.mode == "shared":  # where W&B counts no steps
            self._run.log(row)
        else:  # at a step of its own that it takes and that none of the earlier events has
            self._row = max(report.step, self._run.step, self._row + 1)
            self._run.log(row, step=self._row)
        self._held = report.step
        if text:
            worst, *others = sorted(report.alerts, key=lambda f: list(Verdict).index(f.verdict))
            said = f"{worst.verdict}{f' and {len(others)} more' if others else ''}: {worst.observation.probe.title}"
            title = f"memwatch, step {report.step}: {said}"  # W&B sends no title twice in a row
            level = "WARN" if all(f.verdict is Verdict.SUSPICIOUS for f in report.alerts) else "ERROR"
            self._run.alert(title=title[:TITLE], text=text, level=level, wait_duration=0)

    def _define(self, key: str) -> None:
        if key not in self._defined:
            self._run.define_metric(key, step_metric=STEP, summary="last,min,max")
            self._defined.add(key)

    def _with_rows(self, report: Report, images: dict[str, Any]) -> Any:
        """The table with the event's rows added; W&B uploads those that are new."""
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        scalars = report.scalars()
        for f in report.findings:
            pictures: list[Any] = [None, None]
            if f.name not in self._in_table or f.is_worth_a_look:
                pictures = [images.get(f"memwatch/{kind}/{f.name}") for kind in ("regions", "heatmap")]
            if any(pictures):
                self._in_table.add(f.name)
            numbers = [scalars.get(f"memwatch/{key}/{f.name}") for key in ("severity", "p", "area", "copied")]
            said = f.name, f.observation.probe.prompt
            self._table.add_data(report.step, *said, *pictures, *numbers, str(f.verdict), f.reason)
        return self._table


def images_of(report: Report) -> dict[str, Any]:
    """The images of an event's row by key, as ``wandb.Image``: the overview, and of a probe its heatmap and regions.

    Of many probes those with evidence or news and some others have images, ``PICTURED`` in all, so that a run stays
    small. The overview and the table have every probe, and ``output_dir`` every picture.
    """
    import wandb

    first = sorted(report.findings, key=lambda f: not f.is_worth_a_look)
    images = {}
    for f in first[: max(PICTURED, sum(f.is_worth_a_look for f in first))]:
        if (picture := report.pictures.get(f.name)) is not None:
            row, labels = report.rows[f.name], {number: str(verdict) for verdict, number in CLASSES.items()}
            images[f"memwatch/heatmap/{f.name}"] = wandb.Image(picture, caption=row.caption)
            images[f"memwatch/regions/{f.name}"] = wandb.Image(
                image_of(f),
                caption=row.title,
                masks={"regions": {"mask_data": mask_of(f), "class_labels": labels}},
                boxes={"regions": {"box_data": boxes_of(f), "class_labels": labels}},
            )
    if report.overview is not None:
        images["memwatch/overview"] = wandb.Image(report.overview, caption=f"step {report.step}")
    return images


def mask_of(finding: Finding) -> np.ndarray:
    """Its regions in pixels of its image: uint8 ``(H, W)``, its number of ``CLASSES`` inside, 0 outside."""
    height, width = image_of(finding).shape[:2]
    labels = np.zeros((1, 1)) if finding.labels is None else finding.labels
    inside = Image.fromarray(np.where(labels > 0, CLASSES.get(finding.verdict, 0), 0).astype(np.uint8))
    return np.asarray(inside.resize((width, height), Image.Resampling.NEAREST))


def boxes_of(finding: Finding) -> list[dict[str, Any]]:
    """Its regions as W&B draws boxes, with reduction factor and share of the image."""
    boxes = []
    for region in finding.regions:
        scores = {"factor": factor(region.effect), "area": region.area}
        text = f"{scores['factor']:.1f}x"
        position = dict(zip(("minX", "minY", "maxX", "maxY"), region.box, strict=True))
        box = {"position": position, "domain": "pixel", "class_id": CLASSES[finding.verdict]}
        boxes.append(box | {"box_caption": text, "scores": scores})
    return boxes
