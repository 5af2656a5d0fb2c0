"""Findings: maps -> regions -> calibration -> verdicts, for all probes of one event."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.observations import controls, measured, seen

from memwatch import Probe
from memwatch.config_file import load_config
from memwatch.judge.alerts import Evidence, ProbeState, Verdict
from memwatch.judge.calibration import Null
from memwatch.judge.findings import explained, is_alert, judge_event, judge_probe, signals_of, statistic
from memwatch.measure.measurement import Observation

DEFAULT = load_config(None)


def test_the_level_of_a_region_is_that_of_the_deciding_signal():
    """The unconditional branch decides and differs at 301 only; the snapshot differs at 61 only."""
    observation = Observation(
        Probe("a", name="a"),
        (61, 301),
        now=measured(0.1, 0.1),
        unconditional=measured(0.1, 0.9),
        baseline=measured(0.9, 0.1),
        baseline_step=0,
    )
    signals = {"terms": "variance", "against": "unconditional", "combine": "max"}
    config = load_config({"signals": signals, "alerts": {"uncalibrated_severity": 2.0}})
    (finding,), _, _ = judge_event([observation], {}, 1, config)
    assert finding.severity == pytest.approx(0.95 / 0.15, rel=0.01)
    assert [region.level for region in finding.regions] == [301]


def test_a_region_is_one_only_where_there_is_evidence():
    """Every map has a highest place; what no alert speaks of is not boxed."""
    observation = seen()
    (alike,), _, _ = judge_event([observation, *controls(20, 5.0)], {}, 1, DEFAULT)  # every control shows as much
    assert alike.verdict is Verdict.NO_EVIDENCE
    assert (alike.regions, alike.labels.any()) == ((), False)
    (found,), _, _ = judge_event([observation, *controls(20, 1.0)], {}, 1, DEFAULT)
    assert found.verdict is Verdict.SUSPICIOUS
    assert ([region.p for region in found.regions], found.labels.any()) == ([1 / 21], True)


def test_a_finding_carries_what_its_verdict_rests_on():
    observation = seen()
    quiet = controls(20, 1.0)
    (finding,), statistics, states = judge_event([observation, *quiet], {}, 7, DEFAULT)
    assert finding.observation is observation
    assert (finding.name, finding.is_alert) == ("a", True)
    assert states == {"a": finding.state}
    assert finding.state == ProbeState(streak=1, since=7, verdict=Verdict.SUSPICIOUS)
    assert set(statistics) == {control.name for control in quiet}
    evidence, (region,) = finding.evidence, finding.regions
    assert evidence.statistic == pytest.approx(region.peak)
    assert evidence.statistic == pytest.approx(float(finding.signals.decisive.mean.max()))
    assert finding.severity == evidence.severity == pytest.approx(math.exp(region.mean))
    assert evidence.severity_low == pytest.approx(math.exp(region.mean - 2 * region.sem))
    assert finding.p == evidence.p == evidence.smallest_p == 1 / 21
    assert region.level == 61
    assert np.array_equal(finding.labels == 1, finding.signals.decisive.mean.numpy() >= region.peak / 2)


def test_boxes_are_in_pixels_of_the_image():
    observation = replace(seen(), image=np.zeros((32, 32, 3), np.uint8))  # 8 pixels per pixel of the map
    finding = judge_event([observation, *controls(20, 1.0)], {}, 1, DEFAULT)[0][0]
    assert [region.box for region in finding.regions] == [(0, 0, 16, 32)]


def test_a_region_is_judged_by_its_peak():
    """As controls are: by the largest value of their map."""
    observation = seen()
    (finding,), _, _ = judge_event([observation, *controls(20, 1.0)], {}, 1, DEFAULT)
    (region,) = finding.regions
    for x, p in [((region.peak + region.mean) / 2, 1 / 21), (region.peak, 1.0)]:
        null = Null.of([x] * 20)
        found = explained(region, finding.labels == 1, finding.signals, observation, null)
        assert region.mean < x <= region.peak
        assert found.p == p


def test_patience_is_counted_in_the_states_that_are_handed_on():
    observations = [seen(), *controls(20, 1.0)]
    _, _, states = judge_event(observations, {"gone": ProbeState(streak=3)}, 1, DEFAULT)
    assert states["gone"] == ProbeState(streak=3)  # of a probe that was not looked at this time
    before = dict(states)
    (finding,), _, after = judge_event(observations, states, 2, DEFAULT)
    assert finding.verdict is Verdict.MEMORIZED
    assert finding.state == after["a"] == ProbeState(streak=2, since=1, verdict=Verdict.MEMORIZED)
    assert states == before


def test_a_probe_is_judged_against_controls_of_its_own_kind():
    loud_images, quiet_prompts = controls(20, 5.0), controls(20, 1.0, reference=False)
    quiet_prompts = [replace(c, probe=replace(c.probe, name=f"{c.name}/prompt")) for c in quiet_prompts]
    probes = [seen("image"), seen("prompt", reference=False)]
    (image, prompt), statistics, _ = judge_event([*probes, *loud_images, *quiet_prompts], {}, 1, DEFAULT)
    assert (image.verdict, prompt.verdict) == (Verdict.NO_EVIDENCE, Verdict.SUSPICIOUS)
    assert (image.p, prompt.p) == (1.0, 1 / 21)
    assert len(statistics) == 40


def test_without_controls_there_is_no_p_value():
    (finding,), statistics, _ = judge_event([seen()], {}, 1, DEFAULT)
    assert (finding.p, statistics) == (None, {})
    assert finding.verdict is Verdict.SUSPICIOUS
    assert [region.p for region in finding.regions] == [None]


def test_nothing_earlier_to_compare_with():
    observation = replace(seen(), baseline=None, baseline_step=None)
    (finding,), statistics, _ = judge_event([observation, *controls(20, 1.0)], {}, 1, DEFAULT)
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert finding.reason == "nothing earlier to compare with"
    assert (finding.regions, finding.labels, finding.severity, finding.p) == ((), None, 1.0, None)
    assert math.isnan(finding.evidence.statistic)
    assert len(statistics) == 20
    assert judge_event([observation, replace(controls(1, 1.0)[0], baseline=None)], {}, 1, DEFAULT)[1] == {}


def test_what_is_not_finite_is_inconclusive_and_no_control():
    broken = replace(seen(), now=measured(math.nan))
    control = replace(controls(1, 1.0)[0], now=measured(math.nan))
    (finding,), statistics, states = judge_event([broken, control], {}, 1, DEFAULT)
    assert signals_of(broken, DEFAULT) is finding.signals is None
    assert (finding.verdict, finding.is_alert) == (Verdict.INCONCLUSIVE, True)
    assert (finding.reason, statistics) == ("non-finite values in the model's output", {})
    (again,), _, _ = judge_event([broken], states, 2, DEFAULT)
    assert not again.is_alert  # said once


def test_the_statistic_of_nothing_is_not_a_number():
    assert math.isnan(statistic(None))
    assert math.isnan(statistic(signals_of(replace(seen(), baseline=None), DEFAULT)))


def test_judging_one_probe_is_judging_it_among_all():
    observations = [seen("a", 5.0), seen("b", 2.0), *controls(20, 1.0)]
    findings, statistics, _ = judge_event(observations, {}, 1, DEFAULT)
    null = Null.of(statistics.values())
    for observation, expected in zip(observations[:2], findings, strict=True):
        signals = signals_of(observation, DEFAULT)
        found = judge_probe(observation, signals, null, ProbeState(), 1, DEFAULT)
        parts = ("name", "evidence", "state", "reason", "regions", "is_alert")
        assert [getattr(found, part) for part in parts] == [getattr(expected, part) for part in parts]


MEMORIZED, SUSPICIOUS, NO_EVIDENCE, INCONCLUSIVE = (
    ProbeState(verdict=Verdict.MEMORIZED),
    ProbeState(verdict=Verdict.SUSPICIOUS),
    ProbeState(verdict=Verdict.NO_EVIDENCE),
    ProbeState(verdict=Verdict.INCONCLUSIVE),
)
BROKEN = ProbeState(verdict=Verdict.INCONCLUSIVE, finite=False)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (NO_EVIDENCE, SUSPICIOUS, True),
        (INCONCLUSIVE, SUSPICIOUS, True),
        (NO_EVIDENCE, MEMORIZED, True),
        (SUSPICIOUS, MEMORIZED, True),
        (SUSPICIOUS, SUSPICIOUS, False),
        (MEMORIZED, MEMORIZED, False),
        (MEMORIZED, NO_EVIDENCE, False),
        (SUSPICIOUS, INCONCLUSIVE, False),
        (SUSPICIOUS, BROKEN, True),
        (BROKEN, BROKEN, False),
        (BROKEN, NO_EVIDENCE, False),
        (BROKEN, SUSPICIOUS, True),
    ],
)
def test_an_alert_is_news(before, after, expected):
    evidence = Evidence(severity=2.0, severity_low=1.5, p=0.01, smallest_p=0.01, finite=after.finite)
    assert is_alert(before, after, evidence) is expected
