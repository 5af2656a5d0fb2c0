"""What W&B shows of a probe: its pictures, with layers to switch on and off, and its rows in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from memwatch.judge.findings import Finding
from memwatch.judge.regions import Region
from memwatch.judge.verdict import Verdict
from memwatch.measure.signals import factor
from memwatch.report.report import Report

PICTURED = 16  # probes whose pictures an event logs, unless more have evidence
CLASSES = {1: str(Verdict.SUSPICIOUS), 2: str(Verdict.MEMORIZED)}  # of region layers; 0 is no region
COLUMNS = ("step", "probe", "prompt", "image", "heatmap", "severity", "p", "area", "copied", "verdict", "reason")


def images_of(report: Report) -> dict[str, Any]:
    """The images of an event's row by key, as ``wandb.Image``.

    ``memwatch/heatmap/PROBE`` and ``memwatch/regions/PROBE`` for the probes of ``pictured``, ``memwatch/overview``.
    """
    import wandb

    images = {}
    for f in pictured(report.findings):
        if (picture := report.pictures.get(f.name)) is not None:
            images[f"memwatch/heatmap/{f.name}"] = wandb.Image(picture, caption=f"{f.verdict}: {f.reason}")
        if f.name in report.pictures and f.observation.image is not None:
            images[f"memwatch/regions/{f.name}"] = wandb.Image(
                f.observation.image,
                caption=f.observation.probe.prompt,
                masks={"regions": {"mask_data": mask_of(f), "class_labels": CLASSES}},
                boxes={"regions": {"box_data": boxes_of(f), "class_labels": CLASSES}},
            )
    if report.overview is not None:
        images["memwatch/overview"] = wandb.Image(report.overview, caption=f"step {report.step}")
    return images


def pictured(findings: Sequence[Finding]) -> list[Finding]:
    """Whose pictures are logged: all with evidence or news, and others in their order, ``PICTURED`` in all.

    So a run of many probes stays small. The overview and the table have every probe, and ``output_dir`` every picture.
    """
    sure = [f for f in findings if f.is_worth_a_look]
    others = [f for f in findings if not f.is_worth_a_look]
    return sure + others[: max(0, PICTURED - len(sure))]


def class_of(finding: Finding) -> int:
    """The class of its regions: a key of ``CLASSES``; 0 where it has no evidence."""
    return next((number for number, verdict in CLASSES.items() if verdict == finding.verdict), 0)


def mask_of(finding: Finding) -> np.ndarray:
    """Its regions in pixels of its image: uint8 ``(H, W)``, ``class_of`` inside, 0 outside.

    Raises:
        ValueError: it has no image.
    """
    image = finding.observation.image
    if image is None:
        raise ValueError(f"got {finding.name}, which has no image; allowed: a finding with one")
    height, width = image.shape[:2]
    if finding.labels is None:
        return np.zeros((height, width), np.uint8)
    inside = Image.fromarray(np.where(finding.labels > 0, class_of(finding), 0).astype(np.uint8))
    return np.asarray(inside.resize((width, height), Image.Resampling.NEAREST))


def boxes_of(finding: Finding) -> list[dict[str, Any]]:
    """Its regions as W&B draws boxes, the one that decides first."""
    return [box_of(region, class_of(finding)) for region in finding.regions]


def box_of(region: Region, number: int) -> dict[str, Any]:
    """A box with its scores: ``factor`` (reduction factor), ``area`` (share of the image) and, with controls, ``p``.

    Args:
        number: its class, a key of ``CLASSES``.
    """
    scores = {"factor": factor(region.effect), "area": region.area}
    text = f"{scores['factor']:.1f}x"
    if region.p is not None:
        scores["p"] = region.p
        text += f", p = {region.p:.2g}"
    return {
        "position": dict(zip(("minX", "minY", "maxX", "maxY"), region.box, strict=True)),
        "domain": "pixel",
        "class_id": number,
        "box_caption": text,
        "scores": scores,
    }


class ProbeTable:
    """The run's table: a row per probe and event, with the columns ``COLUMNS``.

    ``copied`` is the share of generations that copy the region. Cells that were not measured are empty. The pictures
    are those of the event's row. A probe has them in its first row, and wherever it has evidence or news: each one lies
    in W&B's storage a second time.
    """

    def __init__(self) -> None:
        self._table: Any = None
        self._shown: set[str] = set()

    def with_rows(self, report: Report, images: Mapping[str, Any]) -> Any:
        """The ``wandb.Table`` with the event's rows added; W&B uploads those that are new.

        Args:
            images: see ``images_of``.
        """
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        for f in report.findings:
            has_pictures = f.name not in self._shown or f.is_worth_a_look
            pictures = [images.get(f"memwatch/{kind}/{f.name}") for kind in ("regions", "heatmap")]
            self._table.add_data(*row_of(f, report.step, *(pictures if has_pictures else (None, None))))
            if any(pictures):
                self._shown.add(f.name)
        return self._table


def row_of(finding: Finding, step: int, image: Any, heatmap: Any) -> list[Any]:
    """A row of the table."""
    proof = finding.proof
    copied = None if proof is None else proof.copied / len(proof.generations)
    area = sum(region.area for region in finding.regions)
    numbers = [finding.severity, finding.p, area, copied]
    numbers = [x if x is None or math.isfinite(x) else None for x in numbers]
    prompt = finding.observation.probe.prompt
    return [step, finding.name, prompt, image, heatmap, *numbers, str(finding.verdict), finding.reason]
