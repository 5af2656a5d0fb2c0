"""Everything one event found, ready for people, trackers and files.

Logged keys (their names are API; PROBE is the probe's name):

| key | kind | meaning |
|---|---|---|
| ``memwatch/step`` | scalar | optimizer step of the event; the x axis of the others in W&B |
| ``memwatch/max_severity`` | scalar | largest reduction factor over probes, 1 is none |
| ``memwatch/min_p`` | scalar | smallest p-value over probes (with controls only) |
| ``memwatch/num_memorized``, ``memwatch/num_suspicious``, ``memwatch/num_inconclusive`` | scalar | probes by verdict |
| ``memwatch/control_score`` | scalar | largest score T of a control so far, each by the others; predictive deviations |
| ``memwatch/called_from`` | scalar | the mean score of three events from which on a probe is memorized |
| ``memwatch/severity/PROBE`` | scalar | reduction factor since the baseline, of the sixteenth where it is largest |
| ``memwatch/p/PROBE`` | scalar | p-value against the controls |
| ``memwatch/area/PROBE`` | scalar | share of the image inside regions |
| ``memwatch/collapse/PROBE``, ``memwatch/score/PROBE`` | scalar | image means of the differences to the snapshot |
| ``memwatch/collapse_null/PROBE``, ``memwatch/score_null/PROBE`` | scalar | the same, to the unconditional branch |
| ``memwatch/loss_log_ratio/PROBE`` | scalar | image mean of the loss log ratio to the snapshot |
| ``memwatch/retained_variance/PROBE`` | scalar | image mean of rho, 1 is free |
| ``memwatch/control_severity`` | scalar | the largest over controls |
| ``memwatch/control_severity_median``, ``memwatch/control_severity_least`` | scalar | median and least of them |
| ``memwatch/copied/PROBE`` | scalar | share of its generations that copy its region (when it was generated) |
| ``memwatch/num_copied`` | scalar | probes that a generation copies (when any was generated) |
| ``memwatch/overview`` | image | all probes of an event, the most severe first, beside the controls |
| ``memwatch/heatmap/PROBE`` | image | the image, its heatmap and regions, what is generated; colours mean the same |
| ``memwatch/map/PROBE`` | histogram | TensorBoard only: the reduction factors of the heatmap, 1 is none |
| ``memwatch/alerts`` | text | TensorBoard only: all alerts so far, one table; written at each event with news |
| ``memwatch/regions/PROBE`` | image | W&B only: the image with regions as a mask and as boxes to switch on and off |
| ``memwatch/probes`` | table | W&B only: a row per probe and event, see ``wandb.COLUMNS`` |
| ``memwatch/alert`` | text | one paragraph per alert (other trackers than W&B: ``memwatch/alert/PROBE``) |
| ``memwatch/seconds`` | scalar | what the event cost |
| ``memwatch/overhead`` | scalar | share of training time that memwatch has taken so far (0.02 is 2 %) |
| ``memwatch/measured`` | scalar | probes and controls whose curvature was measured at this event |
| ``memwatch/rotated`` | scalar | training rows of the rotation that were screened at this event (where there is one) |
| ``memwatch/errors`` | scalar | parts of memwatch that failed so far |
| ``memwatch/stop`` | scalar | 1 from the event on that decided to stop, else 0 |

W&B takes pictures of up to 16 probes per event, other trackers than it and TensorBoard those of probes with evidence or
news; the longer a run is, the fewer events send any (see ``retention.is_shown``). An event that failed logs
``memwatch/step``, ``seconds``, ``overhead``, ``errors`` and ``stop`` alone.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from PIL import Image

from memwatch.config import MemWatchConfig
from memwatch.judge.findings import Finding, Judgement
from memwatch.judge.statistic import SIXTEENTH, top_means
from memwatch.judge.verdict import Verdict
from memwatch.measure.signals import Signals, factor
from memwatch.report.about import About
from memwatch.report.history import Event, Row

IMAGE_MEANS = ("collapse", "score", "collapse_null", "score_null", "loss_log_ratio")  # maps whose mean is logged


@dataclass(frozen=True)
class Report:
    """Everything of one event.

    Attributes:
        step: optimizer step.
        config, about: what the event was measured and judged by, and the run that it belongs to.
        judgement: what the judge says; empty for an event that failed.
        calibrated: whether there are controls at all.
        seconds: what the event cost. errors: failures of memwatch's parts so far.
        stop_reason: set from the event on that decided to stop.
        pictures, overview: one per probe, by name, and one of the whole event; on the main process alone.
        failure: what cost this event, for people.
        overhead: share of training time so far; ``None`` before the first step, and where nothing is trained.
    """

    step: int
    config: MemWatchConfig
    judgement: Judgement
    calibrated: bool
    seconds: float
    errors: int
    stop_reason: str | None
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    failure: str | None = None
    overhead: float | None = None
    overview: Image.Image | None = None
    about: About = About()  # noqa: RUF009  # frozen

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One per probe."""
        return self.judgement.findings

    @property
    def controls(self) -> dict[str, float]:
        """The severity of every control that was compared and finite."""
        return {f.name: f.severity for f in self.judgement.controls if f.evidence.finite and f.evidence.compared}

    @property
    def alerts(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.is_alert)

    @cached_property
    def event(self) -> Event:
        """The same as it is read back from ``history.jsonl``."""
        return Event.from_dict(self.to_dict())

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Those of ``event`` by the probe's name."""
        return {row.name: row for row in self.event.rows}

    def images(self) -> dict[str, Image.Image]:
        """The pictures that were drawn, by logged key."""
        found = {f"memwatch/heatmap/{name}": picture for name, picture in self.pictures.items()}
        return found if self.overview is None else found | {"memwatch/overview": self.overview}

    def scalars(self) -> dict[str, float]:
        """Logged scalars; see the table above. Non-finite ones are left out, because dashboards drop or mangle them."""
        values: dict[str, float | None] = {
            "step": self.step,
            "seconds": self.seconds,
            "overhead": self.overhead,
            "errors": self.errors,
            "stop": float(self.stop_reason is not None),
        }
        if self.failure is None:
            values |= self._scalars_of_the_event()
            values |= {f"{key}/{f.name}": value for f in self.findings for key, value in _scalars_of(f).items()}
        finite = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        return {f"memwatch/{key}": float(value) for key, value in finite.items()}

    def _scalars_of_the_event(self) -> dict[str, float | None]:
        standings, controls = self.judgement.standings.values(), list(self.controls.values())
        proofs = [f.proof for f in self.findings if f.proof is not None]
        verdicts = Counter(f.verdict for f in self.findings)
        return {
            "measured": self.judgement.num_measured,
            "rotated": self.judgement.num_rotated or None,
            "max_severity": max((f.severity for f in self.findings), default=1.0),
            "min_p": min((f.p for f in self.findings if f.p is not None), default=None),
            **{f"num_{verdict}": verdicts[verdict] for verdict in Verdict if verdict is not Verdict.NO_EVIDENCE},
            "control_score": max((s.highest for s in standings), default=None),
            "called_from": max((s.called_from for s in standings), default=None),
            "control_severity": max(controls, default=None),
            "control_severity_median": median(controls) if controls else None,
            "control_severity_least": min(controls, default=None),
            "num_copied": sum(proof.copied > 0 for proof in proofs) if proofs else None,
        }

    def alert_text(self, finding: Finding) -> str:
        """An alert in words: where, since when, how strong, how unlikely, against what."""
        probe, evidence = finding.observation.probe, finding.evidence
        lines = [f"memwatch, step {self.step}: {probe.title} is {finding.verdict}: {finding.reason}."]
        if finding.p is not None:
            lasting = f" ({evidence.lasting_p:.2g} by three events)" if evidence.lasting_p is not None else ""
            controls = f"against {evidence.num_controls} controls"
            lines.append(f"score {evidence.z_score:.1f}, p = {finding.p:.2g}{lasting} {controls}")
        for r in finding.regions:
            effect = f"{math.exp(r.effect):.1f}x reduction (log ratio {r.effect:.2f} ± {r.sem:.2f})"
            lines.append(f"region {r.box} px, {r.area:.0%} of the image: {effect}")
        if copied := Row(finding.name, is_reference=probe.is_reference, copied=_copied(finding)).proof():
            lines.append(copied)
        lines.append(f"baseline: {self.baseline_text(finding)}.")
        if probe.prompt:
            lines.append(f"prompt: {probe.prompt!r}")
        return "\n".join(lines)

    def baseline_text(self, finding: Finding) -> str:
        """What a probe was compared with, in words."""
        o, signals = finding.observation, self.config.signals
        kind, argument = signals.baseline_parts
        snapshot = {"base": "the base model (LoRA off)", "path": argument}.get(kind)
        if o.baseline_step is not None:
            snapshot = f"step {o.baseline_step}"
        used = [snapshot] if o.baseline is not None and signals.against in ("snapshot", "both") else []
        if o.unconditional is not None and signals.against in ("unconditional", "both"):
            used.append("the model's own unconditional branch")
        return " and ".join(filter(None, used)) or "none yet"

    def to_dict(self) -> dict[str, Any]:
        """One line of ``history.jsonl``: plain numbers and text, no maps. Non-finite numbers become null."""
        line = {
            "step": self.step,
            "findings": [self._row(finding) for finding in self.findings],
            "controls": self.controls,
            "calibrated": self.calibrated,
            "standing": self.judgement.standing,
            "scalars": self.scalars(),
        }
        line |= {key: getattr(self, key) for key in ("seconds", "overhead", "errors", "stop_reason", "failure")}
        plain: dict[str, Any] = json.loads(json.dumps(line), parse_constant=lambda name: None)
        return plain

    def _row(self, finding: Finding) -> dict[str, Any]:
        """A finding in ``history.jsonl``."""
        o, evidence = finding.observation, finding.evidence
        return {
            "name": finding.name,
            "title": o.probe.title,
            "prompt": o.probe.prompt,
            "is_reference": o.probe.is_reference,
            "reason": finding.reason,
            **{key: getattr(evidence, key) for key in ("severity", "p", "lasting_p", "z_score")},
            "baseline": self.baseline_text(finding),
            "baseline_step": o.baseline_step,
            "since": finding.state.since,
            "verdict": str(finding.verdict),
            "alert": finding.is_alert,
            "alert_text": self.alert_text(finding) if finding.is_alert else None,
            "timesteps": o.timesteps,
            "levels": level_factors(finding.signals),
            "regions": [asdict(region) for region in finding.regions],
            "copied": _copied(finding),
        }


def _scalars_of(finding: Finding) -> dict[str, float | None]:
    proof = finding.proof
    values: dict[str, float | None] = {
        "severity": finding.severity,
        "p": finding.p,
        "area": sum(region.area for region in finding.regions),
        "copied": None if proof is None else proof.copied / len(proof.generations),
    }
    if finding.signals:
        means = {key: float(value.mean.mean()) for key, value in finding.signals.maps().items()}
        values |= {key: means[key] for key in IMAGE_MEANS if key in means}
        values["retained_variance"] = 1 - means["raw"] if "raw" in means else None
    return values


def level_factors(signals: Signals | None) -> list[float]:
    """The mean factor of the highest sixteenth of each level of the map that decides; empty where there is none.

    It needs no region, so that it is one curve over all events.
    """
    if signals is None or signals.deciding is None:
        return []
    return [factor(float(top_means(level.numpy())[SIXTEENTH])) for level in signals.deciding.mean.clamp(min=0)]


def _copied(finding: Finding) -> dict[str, Any] | None:
    """A proof in ``history.jsonl``, see ``Row``."""
    if (proof := finding.proof) is None:
        return None
    return {
        "generations": len(proof.generations),
        "copies": proof.copied,
        "grade": proof.grade,
        "ratios": proof.ratios,
        "is_copy": proof.is_copy,
        "of_others": dict(Counter(name for names in proof.copies for name in names if name != finding.name)),
    }
