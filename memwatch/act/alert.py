"""Alert: a new verdict on one probe, as hooks and the webhook get it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from memwatch.judge.findings import Finding
from memwatch.report.report import Report


@dataclass(frozen=True)
class Alert:
    """A verdict that is news, with what a person or a program needs to act on it.

    Attributes:
        step: optimizer step of the event.
        probe: its name.
        verdict: ``memorized``, ``suspicious``, or ``inconclusive`` where the model's output is no longer finite.
        severity: reduction factor, 1 is none.
        p: p-value against the controls; ``None`` without enough of them.
        box: of the region that decides, ``(left, top, right, bottom)`` in pixels of the probe's image; ``None`` where
            there is none.
        area: share of the image inside that region, in [0, 1].
        copied: how many of its generations copy the region; ``None`` where nothing was generated.
        row: of the training set that the probe was picked from; ``None`` where it came otherwise.
        text: the alert in words, as the dashboards show it.
    """

    step: int
    probe: str
    verdict: str
    severity: float
    p: float | None
    box: tuple[int, int, int, int] | None
    area: float
    copied: int | None
    row: int | None
    text: str

    @classmethod
    def of(cls, report: Report, finding: Finding) -> Alert:
        """The alert of one of ``report.alerts``."""
        region = finding.regions[0] if finding.regions else None
        return cls(
            step=report.step,
            probe=finding.name,
            verdict=str(finding.verdict),
            severity=finding.severity,
            p=finding.p,
            box=None if region is None else region.box,
            area=0.0 if region is None else region.area,
            copied=None if finding.proof is None else finding.proof.copied,
            row=finding.observation.probe.row,
            text=report.alert_text(finding),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them: a number that is not finite becomes ``None``."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
