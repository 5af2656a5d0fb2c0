"""Findings made by hand: a verdict, a region, and the row that the probe was picked from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from support.observations import seen

from memwatch import MemWatchConfig, Probe, Report
from memwatch.judge.findings import Finding, Judgement
from memwatch.judge.verdict import Evidence, ProbeState, Verdict
from memwatch.measure.regions import Region

SIDE = 32  # pixels of a probe's image


def found(
    name: str,
    verdict: str = "memorized",
    *,
    row: int | None = None,
    severity: float = 2.0,
    box: tuple[int, int, int, int] | None = (0, 0, 16, 16),
) -> Finding:
    """A finding on a picture of ``SIDE`` pixels; ``box`` is of its region."""
    probe = Probe(f"a photo of {name}", None, name=name, row=row)
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    observation = replace(seen(name), probe=probe, image=image)
    regions = () if box is None else (Region(box, 0.25, 0.7, 0.05),)
    state = ProbeState(verdict=Verdict(verdict))
    return Finding(observation, None, Evidence(severity), state, "found", regions, None, False)


def event(step: int, *findings: Finding) -> Report:
    """The report of an event."""
    return Report(step, MemWatchConfig(), Judgement(tuple(findings)), True, 1.0, 0, None)
