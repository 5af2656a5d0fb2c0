"""Everything one event found, ready for people, trackers and files.

Logged keys (their names are API; PROBE is the probe's name):

| key | kind | meaning |
|---|---|---|
| ``memwatch/step`` | scalar | optimizer step of the event; the x axis of the others in W&B |
| ``memwatch/max_severity`` | scalar | largest variance reduction factor over probes, 1 is none |
| ``memwatch/min_p`` | scalar | smallest p-value over probes (with controls only) |
| ``memwatch/num_memorized``, ``memwatch/num_suspicious``, ``memwatch/num_inconclusive`` | scalar | probes by verdict |
| ``memwatch/expected_false_alarms`` | scalar | suspicious probes that chance alone gives in one event, at most |
| ``memwatch/severity/PROBE`` | scalar | variance reduction factor of its strongest region |
| ``memwatch/p/PROBE`` | scalar | p-value against the controls |
| ``memwatch/area/PROBE`` | scalar | share of the image inside regions |
| ``memwatch/collapse/PROBE``, ``memwatch/score/PROBE`` | scalar | image mean of the curvature and the score difference, snapshot baseline |
| ``memwatch/collapse_null/PROBE``, ``memwatch/score_null/PROBE`` | scalar | the same, unconditional baseline |
| ``memwatch/loss_log_ratio/PROBE`` | scalar | image mean of the log ratio of denoising losses, snapshot baseline (reference probes) |
| ``memwatch/retained_variance/PROBE`` | scalar | image mean of rho, 1 is free |
| ``memwatch/control_severity`` | scalar | largest variance reduction factor over controls, at a single pixel |
| ``memwatch/heatmap/PROBE`` | image | the image, and beside it its heatmap with regions; colours mean the same in every picture |
| ``memwatch/regions/PROBE`` | image | W&B only: the image with regions as boxes to switch on and off |
| ``memwatch/alert`` | text | one paragraph an alert (TensorBoard: ``memwatch/alert/PROBE``) |
| ``memwatch/seconds`` | scalar | what the event cost |
| ``memwatch/errors`` | scalar | parts of memwatch that failed so far |
| ``memwatch/stop`` | scalar | 1 from the event on that decided to stop, else 0 |
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from memwatch.alerts import Verdict
from memwatch.heatmap import overlay
from memwatch.regions import Region
from memwatch.signals import Signals


@dataclass(frozen=True)
class Finding:
    """One probe at one event.

    Attributes:
        verdict, reason: what the rule says, and why in words.
        severity: variance reduction factor of the strongest region, 1 when there is none; ``severity_low`` less two standard errors.
        p: p-value against the controls; ``None`` without controls.
        statistic: natural log of the largest factor over levels and regions, which ``p`` judges.
        baseline_step: step compared with; ``None`` when there is none, or the baseline is no step.
        since: step at which the evidence began, while it lasts.
        regions: largest first; ``region_p`` their p-values, ``region_level`` the timestep at which each is strongest.
        labels: int ``(h, w)`` of the map: i inside ``regions[i - 1]``, 0 outside; ``None`` when nothing was compared.
        timesteps: noise levels looked at.
        image: RGB uint8, the training image or what the prompt generated.
        signals: every map.
    """

    name: str
    prompt: str
    is_reference: bool
    verdict: Verdict
    reason: str
    severity: float
    severity_low: float
    p: float | None
    statistic: float
    baseline_step: int | None
    since: int | None
    regions: tuple[Region, ...]
    region_p: tuple[float | None, ...]
    region_level: tuple[float, ...]
    labels: np.ndarray | None
    timesteps: tuple[float, ...]
    image: np.ndarray | None
    signals: Signals | None
    is_new: bool

    @property
    def is_alert(self) -> bool:
        """A verdict that has just become worse, or output that has just become non-finite."""
        return self.is_new and (self.verdict.is_evidence or "non-finite" in self.reason)

    def picture(self, max_factor: float) -> Image.Image | None:
        """The image beside its heatmap; ``None`` where there is nothing to show."""
        if self.image is None:
            return None
        height, width = self.image.shape[:2]
        if self.signals is None or self.signals.decisive is None:
            return overlay(self.image, np.zeros((height, width)), max_factor=max_factor)
        return overlay(self.image, self.signals.decisive.mean.numpy(), self.regions, max_factor=max_factor)


@dataclass(frozen=True)
class Report:
    """Everything of one event.

    Attributes:
        step: optimizer step.
        findings: one a probe.
        controls: statistic of every control that was compared and finite, natural log of a factor.
        calibrated: whether there are controls at all.
        expected_false_alarms: see ``calibration``.
        max_factor: top of the colour scale.
        seconds: what the event cost.
        errors: parts of memwatch that have failed so far.
        stop_reason: set from the event on that decided to stop.
        pictures: one a probe, drawn once for all sinks.
    """

    step: int
    findings: tuple[Finding, ...]
    controls: dict[str, float]
    calibrated: bool
    expected_false_alarms: float
    max_factor: float
    seconds: float
    errors: int
    stop_reason: str | None
    pictures: dict[str, Image.Image]

    @property
    def alerts(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.is_alert)

    def count(self, verdict: Verdict) -> int:
        return sum(finding.verdict is verdict for finding in self.findings)

    def scalars(self) -> dict[str, float]:
        """Logged scalars; see the table above. Non-finite ones are left out, because dashboards drop or mangle them."""
        values: dict[str, float | None] = {
            "memwatch/step": self.step,
            "memwatch/max_severity": max((f.severity for f in self.findings), default=1.0),
            "memwatch/min_p": min((f.p for f in self.findings if f.p is not None), default=None),
            "memwatch/num_memorized": self.count(Verdict.MEMORIZED),
            "memwatch/num_suspicious": self.count(Verdict.SUSPICIOUS),
            "memwatch/num_inconclusive": self.count(Verdict.INCONCLUSIVE),
            "memwatch/expected_false_alarms": self.expected_false_alarms if self.controls else None,
            "memwatch/control_severity": math.exp(max(self.controls.values())) if self.controls else None,
            "memwatch/seconds": self.seconds,
            "memwatch/errors": self.errors,
            "memwatch/stop": float(self.stop_reason is not None),
        }
        for f in self.findings:
            values[f"memwatch/severity/{f.name}"] = f.severity
            values[f"memwatch/p/{f.name}"] = f.p
            values[f"memwatch/area/{f.name}"] = sum(region.area for region in f.regions)
            maps = f.signals.maps() if f.signals else {}
            for key in ("collapse", "score", "collapse_null", "score_null", "loss_log_ratio"):
                if key in maps:
                    values[f"memwatch/{key}/{f.name}"] = float(maps[key].mean.mean())
            if f.signals:
                values[f"memwatch/retained_variance/{f.name}"] = 1 - float(f.signals.raw.mean.mean())
        return {key: float(value) for key, value in values.items() if value is not None and math.isfinite(value)}

    def alert_text(self, finding: Finding) -> str:
        """An alert that explains itself: where, at which level, since when, how strong, how unlikely, judged against what."""
        lines = [f"memwatch, step {self.step}: {finding.name} is {finding.verdict}. {finding.reason}."]
        for region, p, level in zip(finding.regions, finding.region_p, finding.region_level, strict=True):
            chance = f", p = {p:.3f} against {len(self.controls)} controls" if p is not None else ", no controls"
            effect = f"{math.exp(region.mean):.1f}x less freedom (log ratio {region.mean:.2f} ± {region.sem:.2f})"
            lines.append(
                f"region {region.box} px, {region.area:.0%} of the image: {effect}, strongest at timestep {level:g}{chance}"
            )
        lines.append(
            f"baseline: {'step ' + str(finding.baseline_step) if finding.baseline_step is not None else 'see config'}."
        )
        if finding.prompt:
            lines.append(f"prompt: {finding.prompt!r}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """One line of ``history.jsonl``: plain numbers and text, no maps. Non-finite numbers become null."""
        findings = []
        for f in self.findings:
            regions = [
                asdict(region) | {"p": p, "level": level}
                for region, p, level in zip(f.regions, f.region_p, f.region_level, strict=True)
            ]
            keys = (
                "name",
                "prompt",
                "is_reference",
                "reason",
                "severity",
                "severity_low",
                "p",
                "statistic",
                "baseline_step",
                "since",
            )
            row = {key: getattr(f, key) for key in keys}
            findings.append(
                row
                | {"verdict": str(f.verdict), "alert": f.is_alert, "timesteps": list(f.timesteps), "regions": regions}
            )
        data = {
            "step": self.step,
            "findings": findings,
            "controls": self.controls,
            "scalars": self.scalars(),
            "seconds": self.seconds,
            "errors": self.errors,
            "stop_reason": self.stop_reason,
        }
        plain = _plain(data)
        assert isinstance(plain, dict)
        return plain

    def summary(self) -> str:
        """One line for the console."""
        parts = [f"{self.count(verdict)} {verdict}" for verdict in Verdict if self.count(verdict)]
        worst = max(self.findings, key=lambda f: f.severity, default=None)
        strongest = (
            f"; strongest {worst.name} {worst.severity:.1f}x" if worst is not None and worst.severity > 1 else ""
        )
        stop = f"; STOP ({self.stop_reason})" if self.stop_reason else ""
        calibrated = "" if self.calibrated else "; uncalibrated (no controls)"
        return f"memwatch step {self.step}: {', '.join(parts)}{strongest}{calibrated}; {self.seconds:.1f} s{stop}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
