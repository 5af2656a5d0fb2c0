"""Findings: maps -> regions -> numbers -> verdicts -> false-alarm check, for all probes of one event."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from support.observations import controls, measured, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.judge.statistic import Null, profile_of, top_means
from memwatch.judge.verdict import Audit, ProbeState, Verdict
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import RHO_FLOOR

DEFAULT = load_config(None)
UNSMOOTHED = load_config({"signals": {"smooth": 1}})


def judged(observations, events=1, config=DEFAULT):
    """The judgement of the last of some equal events."""
    states = {}
    for step in range(1, events + 1):
        judgement = judge_event(observations, states, step, config)
        states = judgement.states
    return judgement


def test_a_finding_carries_what_its_verdict_rests_on():
    """Effect, region and p-value are of the same place."""
    observation = replace(seen(), image=np.zeros((32, 32, 3), np.uint8))  # 8 pixels per pixel of the map
    gone = {"gone": ProbeState(streak=3)}
    judgement = judge_event([observation, *controls(20, 1.0, spread=0.1)], gone, 7, UNSMOOTHED)
    (finding,) = judgement.findings
    assert finding.observation is observation
    assert (finding.name, finding.is_alert) == ("a", True)
    assert (judgement.states["a"], judgement.states["gone"]) == (finding.state, ProbeState(streak=3))
    assert gone == {"gone": ProbeState(streak=3)}  # states are handed on, not changed
    assert judge_event([], gone, 7, UNSMOOTHED).states == gone
    assert finding.state == ProbeState(events=1, streak=1, since=7, is_enough=True, verdict=Verdict.SUSPICIOUS)
    evidence, (region,), decisive = finding.evidence, finding.regions, finding.signals.decisive.mean.numpy()
    assert region.box == (0, 0, 16, 32)
    assert region.mean == pytest.approx(decisive[finding.labels == 1].mean())
    assert region.effect == pytest.approx(region.mean, rel=0.01)
    assert finding.severity == evidence.severity == pytest.approx(math.exp(region.effect))
    assert evidence.severity_low == pytest.approx(math.exp(region.low))
    null = Null.of([profile_of(f.signals) for f in judgement.controls])
    assert region.z_score == evidence.z_score == pytest.approx(null.z_score(region.mean, size=1))  # half of the map
    assert finding.p == evidence.p == region.p == null.p_value(region.z_score)
    assert (evidence.num_controls, evidence.any_controls) == (20, True)
    assert profile_of(finding.signals) == pytest.approx(top_means(decisive.clip(min=0)))


SIDE = 32


def looks_like(log_factors: np.ndarray, name: str = "a", **kind) -> Observation:
    """A probe whose variance term is this map, ``(32, 32)``."""
    rho = (0.5 + RHO_FLOOR) / np.exp(log_factors) - RHO_FLOOR
    now = measured(torch.from_numpy(rho).float(), side=SIDE)
    return seen(name, baseline=measured(0.5, side=SIDE), now=now, **kind)


def noisy(seed: int, std: float = 0.05, *, left: float = 0.0, spot: float = 0.0) -> np.ndarray:
    """Smooth noise, ``(32, 32)``, with a change of the left half, and of a spot of 1.6 % of the picture."""
    noise = ndimage.uniform_filter(np.random.default_rng(seed).standard_normal((SIDE, SIDE)), 5)
    values = std * noise / noise.std()
    values[:, : SIDE // 2] += left
    values[20:24, 24:28] += spot
    return values


@pytest.mark.parametrize("column", [4, 24], ids=["inside the change", "beside it"])
def test_a_spike_beside_a_change_that_all_controls_share_is_not_called(column):
    """0.2 % of the picture far above every control, in a picture that has changed as controls have."""
    strengths = 0.4 + 0.1 * np.random.default_rng(0).standard_normal(20)
    alike = [looks_like(noisy(i, left=s), f"control/{i}", control=True) for i, s in enumerate(strengths)]
    spiked = noisy(99, left=0.4)
    spiked[9, column : column + 2] += 2.0
    judgement = judged([looks_like(spiked), *alike], 3, UNSMOOTHED)
    assert judgement.findings[0].verdict is Verdict.NO_EVIDENCE
    highest = [f.signals.decisive.mean.max().item() for f in (*judgement.controls, *judgement.findings)]
    assert highest[-1] > 2 * max(highest[:-1])  # the peak alone would have called it


def test_large_faint_and_small_strong_regions_are_both_found():
    quiet = [looks_like(noisy(i), f"control/{i}", control=True) for i in range(20)]
    kinds = {"large": {"left": 0.45}, "small": {"spot": 1.5}, "both": {"left": 0.45, "spot": 1.5}}
    probes = [looks_like(noisy(95 + i, **kind), name) for i, (name, kind) in enumerate(kinds.items())]
    findings = judged([*probes, *quiet], 2, UNSMOOTHED).findings
    assert {f.verdict for f in findings} == {Verdict.MEMORIZED}
    sizes = [sorted(round(region.area, 2) for region in f.regions) for f in findings]
    assert (sizes[0][-1], sizes[1][-1], sizes[2]) == (0.5, 0.02, [0.02, 0.5])
    few, many = sorted(findings[2].regions, key=lambda region: region.area)
    assert (few.effect, many.effect) == pytest.approx((1.5, 0.45), abs=0.1)
    assert max(few.p, many.p) < 1e-4


def test_the_region_that_decides_exceeds_the_controls_most():
    """Not the largest, nor the strongest: controls vary over few pixels more than over many."""
    varied = [looks_like(noisy(i, std=0.3), f"control/{i}", control=True) for i in range(20)]
    (finding,) = judged([looks_like(noisy(98, left=0.9, spot=1.2)), *varied], config=UNSMOOTHED).findings
    large, small = finding.regions
    assert (round(large.area, 2), round(small.area, 2)) == (0.5, 0.02)
    assert large.z_score > small.z_score
    assert large.mean < small.mean
    assert finding.severity == pytest.approx(math.exp(large.effect))


def test_a_sibling_among_the_controls_keeps_a_learned_subject_from_being_called():
    """It is as rare as the probe, and the rule would call it as well."""
    quiet = controls(20, 1.0, spread=0.05)
    sibling = replace(quiet[0], now=seen(fallen=4.5).now)
    judgement = judged([seen(), sibling, *quiet[1:]], 3)
    (finding,) = judgement.findings
    assert (finding.verdict, finding.state.streak, finding.state.called) == (Verdict.SUSPICIOUS, 3, False)
    assert "not called memorized, because the same rule called 1 of 20 controls" in finding.reason
    assert judgement.states["control/0"].called
    assert judgement.audit == Audit(1, 20, judgement.controls[0].p)
    assert judged([seen(), *quiet], 2).findings[0].verdict is Verdict.MEMORIZED


def test_the_budget_is_shared_by_the_watched_probes_and_rows_in_rotation_have_half_of_it():
    """Controls do not share. Rows are told with evidence alone."""
    quiet, others = controls(20, 1.0, spread=0.4), [seen(f"other/{i}", 1.0) for i in range(19)]
    rows = [replace(o, probe=replace(o.probe, in_rotation=True)) for o in (seen("row0", 5.0), seen("row1", 1.0))]
    kinds = (([], 0), (others, 0), (rows, 20))
    alone, among, rotated = (judge_event([seen(), *more, *quiet], {}, 1, DEFAULT, None, n) for more, n in kinds)
    assert 0.05 / 32 / 20 < alone.findings[0].p == among.findings[0].p == rotated.findings[1].p < 0.05 / 32 / 2
    assert [j.findings[0].state.is_enough for j in (alone, among, rotated)] == [True, False, True]
    assert not rotated.findings[1].state.is_enough  # 1/2 for one probe, 1/40 for each row
    assert [f.name for f in rotated.findings] == ["a", "row0"]
    assert rotated.num_rotated == 2
    assert {"row0", "row1"} <= rotated.states.keys()


@pytest.mark.parametrize("reference", [True, False])
def test_a_probe_is_judged_against_controls_of_its_own_kind(reference):
    loud, quiet = controls(20, 5.0, spread=0.1, reference=reference), controls(20, 1.0, reference=not reference)
    quiet = [replace(c, probe=replace(c.probe, name=f"{c.name}/quiet")) for c in quiet]
    probes = [seen("like the loud", reference=reference), seen("like the quiet", reference=not reference)]
    first, second = judged([*probes, *loud, *quiet]).findings
    assert (first.verdict, second.verdict) == (Verdict.NO_EVIDENCE, Verdict.SUSPICIOUS)
    assert (first.regions, first.labels.any()) == ((), False)  # every map has a highest place; it is no region
    assert (len(second.regions), second.labels.any()) == (1, True)
    assert second.p < 1e-9 < 0.5 < first.p
    assert (first.evidence.num_controls, second.evidence.num_controls) == (20, 20)


@pytest.mark.parametrize(
    ("number", "reference", "verdict", "has_p", "audited"),
    [
        (20, False, Verdict.INCONCLUSIVE, False, 20),  # controls of the other kind
        (10, True, Verdict.INCONCLUSIVE, False, 0),
        (11, True, Verdict.SUSPICIOUS, True, 11),  # of which each has the ten others
        (0, True, Verdict.SUSPICIOUS, False, 0),  # the severity alone speaks
    ],
)
def test_who_can_be_judged(number, reference, verdict, has_p, audited):
    judgement = judged([seen(), *controls(number, 1.0, reference=reference)])
    (finding,) = judgement.findings
    assert (finding.verdict, finding.p is not None) == (verdict, has_p)
    assert sum(f.p is not None for f in judgement.controls) == judgement.audit.of == audited


def test_nothing_earlier_to_compare_with():
    (finding,) = judged([seen(baseline=None, baseline_step=None), *controls(20, 1.0)]).findings
    assert (finding.verdict, finding.reason) == (Verdict.INCONCLUSIVE, "nothing earlier to compare with")
    assert (finding.regions, finding.labels, finding.severity, finding.state.events) == ((), None, 1.0, 0)
    assert np.isnan(profile_of(finding.signals)).all()
    lacking = [replace(c, baseline=None) for c in controls(20, 1.0)]
    assert judged([seen(), *lacking]).findings[0].evidence.num_controls == 0


def test_what_is_not_finite_is_inconclusive_and_no_control():
    broken, control = (seen(name, now=measured(math.nan), control=name == "c") for name in "ac")
    judgement = judged([broken, control, *controls(20, 1.0)])
    (finding,) = judgement.findings
    assert (finding.signals, finding.verdict, finding.is_alert) == (None, Verdict.INCONCLUSIVE, True)
    assert finding.evidence.num_controls == 20
    assert not judge_event([broken], judgement.states, 2, DEFAULT).findings[0].is_alert  # said once
