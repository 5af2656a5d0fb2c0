"""Findings: maps -> T and regions -> verdicts, for all probes of one event."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from support.observations import BY_VARIANCE, controls, measured, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.judge.statistic import (
    called_from,
    p_value,
    profile_of,
    scores,
    threshold,
    top_means,
)
from memwatch.judge.verdict import ProbeState, Verdict
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import RHO_FLOOR

DEFAULT = load_config(BY_VARIANCE)
UNSMOOTHED = load_config(BY_VARIANCE, signals={"smooth": 1})


def judged(observations, events=2, config=DEFAULT):
    """The judgement of the last of some equal events."""
    judgement = judge_event([], {}, 0, config)
    for step in range(1, events + 1):
        judgement = judge_event(observations, judgement.states, step, config)
    return judgement


def test_a_finding_carries_what_its_verdict_rests_on():
    observation = replace(seen(), image=np.zeros((32, 32, 3), np.uint8))  # 8 pixels per pixel of the map
    gone = {"gone": ProbeState(last_clean=3), "a": ProbeState(since=7, scores=(9.0, 6.0))}
    judgement = judge_event([observation, *controls(20, 1.0, spread=0.1)], gone, 7, UNSMOOTHED, 160)
    (finding,) = judgement.findings
    assert finding.observation is observation
    assert (finding.name, finding.is_alert) == ("a", True)
    assert (judgement.states["a"], judgement.states["gone"]) == (finding.state, gone["gone"])
    assert gone["a"] == ProbeState(since=7, scores=(9.0, 6.0))  # states are handed on, not changed
    assert judge_event([], gone, 7, UNSMOOTHED).states == gone
    score = finding.evidence.z_score
    assert finding.state == ProbeState(since=7, scores=(score, 9.0, 6.0), has_begun=True, verdict=Verdict.MEMORIZED)
    evidence, (region,), decisive = finding.evidence, finding.regions, finding.signals.decisive.mean.numpy()
    assert region.box == (0, 0, 16, 32)
    fallen = finding.signals.fallen.mean.numpy()
    assert region.effect == pytest.approx(fallen[finding.labels == 1].mean())
    assert finding.severity == evidence.severity == pytest.approx(math.exp(np.sort(fallen.ravel())[-1:].mean()))
    profile, held_out = profile_of(finding.signals), np.stack([profile_of(f.signals) for f in judgement.controls])
    assert profile == pytest.approx(top_means(decisive))
    assert evidence.z_score == pytest.approx(scores(profile[None], held_out)[0])
    own = np.array([f.state.highest for f in judgement.controls])
    assert list(own) == [f.evidence.z_score for f in judgement.controls]
    assert (finding.p, evidence.lasting_p) == pytest.approx(p_value(np.array([score, (score + 9 + 6) / 3]), 20))
    assert (evidence.num_controls, evidence.any_controls) == (20, True)
    (standing,) = judgement.standings.values()
    assert (standing.number, standing.highest) == (20, own.max())
    assert standing.called_from == called_from(threshold(0.05, 160), 20) < evidence.z_score


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


def controls_of_size(number: int) -> list[Observation]:
    """Controls with maps of ``SIDE`` pixels that have hardly changed."""
    return [looks_like(noisy(i), f"control/{i}", control=True) for i in range(number)]


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
    quiet = controls_of_size(20)
    kinds = {"large": {"left": 0.45}, "small": {"spot": 1.5}, "both": {"left": 0.45, "spot": 1.5}}
    probes = [looks_like(noisy(95 + i, **kind), name) for i, (name, kind) in enumerate(kinds.items())]
    findings = judged([*probes, *quiet], 2, UNSMOOTHED).findings
    assert {f.verdict for f in findings} == {Verdict.MEMORIZED}
    sizes = [sorted(round(region.area, 2) for region in f.regions) for f in findings]
    assert (sizes[0][-1], sizes[1][-1], sizes[2]) == (0.5, 0.02, [0.02, 0.5])
    few, many = sorted(findings[2].regions, key=lambda region: region.area)
    assert (few.effect, many.effect) == pytest.approx((1.5, 0.45), abs=0.1)


def test_regions_come_from_the_map_that_decides_and_effects_from_what_has_fallen():
    """The unconditional branch has fallen as much on the right half: the left alone counts, and is shown."""
    left, right = (torch.full((SIDE, SIDE), 0.5) for _ in range(2))
    left[:], right[:, SIDE // 2 :] = 0.1, 0.1
    now, without, before = measured(left, side=SIDE), measured(right, side=SIDE), measured(0.5, side=SIDE)
    seen_by_both = seen(now=now, baseline=before, unconditional=without)
    (finding,) = judged([seen_by_both, *controls_of_size(20)], config=UNSMOOTHED).findings
    decisive, fallen = finding.signals.decisive.mean, finding.signals.fallen.mean
    assert finding.verdict is Verdict.MEMORIZED
    assert fallen.min() > 1.2
    assert (decisive[:, : SIDE // 2].min() > 1.2, decisive[:, SIDE // 2 :].max() < 0.01) == (True, True)
    assert [(region.area, region.effect) for region in finding.regions] == [(0.5, pytest.approx(fallen.mean()))]


def test_a_sibling_among_the_controls_keeps_a_learned_subject_from_being_called():
    """It widens the controls' spread."""
    quiet = controls(20, 1.0, spread=0.05)
    sibling = replace(quiet[0], now=seen(fallen=4.5).now)
    judgement = judged([seen(), sibling, *quiet[1:]], 3)
    assert judgement.findings[0].verdict is not Verdict.MEMORIZED
    assert judgement.standings["reference"].highest > 10
    assert judged([seen(), *quiet]).findings[0].verdict is Verdict.MEMORIZED


def test_more_looks_take_more_evidence_and_rows_are_told_with_evidence_alone():
    quiet = controls(20, 1.0, spread=0.2)
    rows = [replace(o, probe=replace(o.probe, in_rotation=True)) for o in (seen("row0", 5.0), seen("row1", 1.0))]
    states = {name: ProbeState(since=1, scores=(9.0, 9.0)) for name in ("a", "row0")}
    few, many = (judge_event([seen(), *rows, *quiet], states, 2, DEFAULT, looks) for looks in (2, 10**12))
    assert [f.name for f in few.findings] == [f.name for f in many.findings] == ["a", "row0"]
    assert {f.p for f in (*few.findings, *many.findings)} == {few.findings[0].p}
    assert [f.verdict for f in few.findings] == [Verdict.MEMORIZED] * 2
    assert [f.verdict for f in many.findings] == [Verdict.SUSPICIOUS] * 2
    assert few.standings["reference"].called_from < few.findings[0].evidence.z_score
    assert few.findings[0].evidence.z_score < many.standings["reference"].called_from
    assert few.num_rotated == 2
    assert {"row0", "row1"} <= few.states.keys()


@pytest.mark.parametrize("reference", [True, False])
def test_a_probe_is_judged_against_controls_of_its_own_kind(reference):
    loud, quiet = controls(20, 5.0, spread=0.1, reference=reference), controls(20, 1.0, reference=not reference)
    quiet = [replace(c, probe=replace(c.probe, name=f"{c.name}/quiet")) for c in quiet]
    probes = [seen("like the loud", reference=reference), seen("like the quiet", reference=not reference)]
    first, second = judged([*probes, *loud, *quiet]).findings
    assert (first.verdict, second.verdict) == (Verdict.NO_EVIDENCE, Verdict.MEMORIZED)
    assert (first.regions, first.labels.any()) == ((), False)  # every map has a highest place; it is no region
    assert (len(second.regions), second.labels.any()) == (1, True)
    assert second.p < 1e-6 < 0.5 < first.p
    assert (first.evidence.num_controls, second.evidence.num_controls) == (20, 20)


@pytest.mark.parametrize(
    ("number", "reference", "verdict", "has_p", "scored"),
    [
        (20, False, Verdict.INCONCLUSIVE, False, 20),  # controls of the other kind
        (10, True, Verdict.INCONCLUSIVE, False, 0),
        (11, True, Verdict.MEMORIZED, True, 11),  # of which each has the ten others
        (0, True, Verdict.SUSPICIOUS, False, 0),  # the severity alone speaks
    ],
)
def test_who_can_be_judged(number, reference, verdict, has_p, scored):
    judgement = judged([seen(), *controls(number, 1.0, reference=reference)])
    (finding,) = judgement.findings
    assert (finding.verdict, finding.p is not None) == (verdict, has_p)
    assert sum(f.p is not None for f in judgement.controls) == scored
    assert {kind: s.number for kind, s in judgement.standings.items()} == (
        {"reference" if reference else "prompt": scored} if scored else {}
    )


def test_nothing_earlier_to_compare_with():
    (finding,) = judged([seen(baseline=None, baseline_step=None), *controls(20, 1.0)]).findings
    assert (finding.verdict, finding.reason) == (Verdict.INCONCLUSIVE, "nothing earlier to compare with")
    assert (finding.regions, finding.labels, finding.severity, finding.p) == ((), None, 1.0, None)
    assert np.isnan(profile_of(finding.signals)).all()
    lacking = [replace(c, baseline=None) for c in controls(20, 1.0)]
    assert judged([seen(), *lacking]).findings[0].evidence.num_controls == 0


def test_what_is_not_finite_is_inconclusive_and_no_control():
    broken, control = (seen(name, now=measured(math.nan), control=name == "c") for name in "ac")
    judgement = judged([broken, control, *controls(20, 1.0)], 1)
    (finding,) = judgement.findings
    assert (finding.signals, finding.verdict, finding.is_alert) == (None, Verdict.INCONCLUSIVE, True)
    assert finding.evidence.num_controls == 20
    assert not judge_event([broken], judgement.states, 2, DEFAULT).findings[0].is_alert  # said once
