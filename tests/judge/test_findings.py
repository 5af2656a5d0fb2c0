"""Findings: maps -> regions -> calibration -> verdicts -> audit, for all probes of one event."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from support.observations import controls, measured, peers, seen

from memwatch import Probe
from memwatch.config_file import load_config
from memwatch.judge.alerts import Evidence, ProbeState, Verdict
from memwatch.judge.audit import Audit
from memwatch.judge.calibration import Null, top_means
from memwatch.judge.compared import References, profile_of
from memwatch.judge.findings import is_alert, judge_event, judge_probe
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import RHO_FLOOR, compute_signals

DEFAULT = load_config(None)
UNSMOOTHED = load_config({"signals": {"smooth": 1}})


def judged(observations, states=None, step=1, config=DEFAULT):
    """The findings of one event."""
    return judge_event(observations, states or {}, step, config).findings


# --- one finding ------------------------------------------------------------------------------------------------------


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
    signals = {"terms": "variance", "against": "unconditional"}
    (finding,) = judged([observation], config=load_config({"signals": signals}))
    assert finding.severity == pytest.approx((0.95 / 0.15) ** 0.5, rel=0.01)  # the mean of two levels
    assert [region.level for region in finding.regions] == [301]


def test_a_region_is_one_only_where_there_is_evidence():
    """Every map has a highest place; what no alert speaks of is not boxed."""
    (alike,) = judged([seen(), *controls(20, 5.0, spread=0.1)])  # every control shows as much
    assert alike.verdict is Verdict.NO_EVIDENCE
    assert (alike.regions, alike.labels.any()) == ((), False)
    (found,) = judged([seen(), *controls(20, 1.0, spread=0.1)])
    assert found.verdict is Verdict.SUSPICIOUS
    assert (len(found.regions), found.labels.any()) == (1, True)


def test_a_finding_carries_what_its_verdict_rests_on():
    """Effect, region and p-value are of the same place."""
    observation, quiet = seen(), controls(20, 1.0, spread=0.1)
    judgement = judge_event([observation, *quiet], {}, 7, DEFAULT)
    (finding,) = judgement.findings
    assert finding.observation is observation
    assert (finding.name, finding.is_alert) == ("a", True)
    assert judgement.states["a"] == finding.state
    assert finding.state == ProbeState(events=1, streak=1, since=7, is_enough=True, verdict=Verdict.SUSPICIOUS)
    evidence, (region,) = finding.evidence, finding.regions
    decisive = finding.signals.decisive
    assert region.mean == pytest.approx(decisive.mean.numpy()[finding.labels == 1].mean())
    assert region.effect == pytest.approx(region.mean, rel=0.01)
    assert finding.severity == evidence.severity == pytest.approx(math.exp(region.effect))
    assert evidence.severity_low == pytest.approx(math.exp(region.low))
    null = Null.of([profile_of(f.signals) for f in judgement.controls])
    size = {16: 0, 8: 1, 12: 1}[int((finding.labels == 1).sum())]
    assert region.z_score == evidence.z_score == pytest.approx(null.z_score(region.mean, size))
    assert finding.p == evidence.p == region.p == null.p_value(region.z_score)
    assert evidence.rank_p == region.rank_p == 1 / 21
    assert (evidence.num_controls, evidence.any_controls) == (20, True)
    assert region.level == 61


def test_boxes_are_in_pixels_of_the_image():
    observation = replace(seen(), image=np.zeros((32, 32, 3), np.uint8))  # 8 pixels per pixel of the map
    (finding,) = judged([observation, *controls(20, 1.0)], config=UNSMOOTHED)
    assert [region.box for region in finding.regions] == [(0, 0, 16, 32)]


def test_a_profile_is_of_the_map_that_decides():
    observation = seen()
    signals = compute_signals([observation], terms="both", against="both", smooth=1)["a"]
    assert profile_of(signals) == pytest.approx(top_means(signals.decisive.mean.numpy()))
    nothing = compute_signals([replace(observation, baseline=None)], terms="both", against="both", smooth=1)
    assert np.isnan(profile_of(nothing["a"])).all()
    assert np.isnan(profile_of(None)).all()


# --- a region is judged by the size it has ----------------------------------------------------------------------------

SIDE = 32


def looks_like(log_factors: np.ndarray, name: str = "a", **kind) -> Observation:
    """A probe whose variance term is this map, ``(32, 32)``."""
    rho = (0.5 + RHO_FLOOR) / np.exp(log_factors) - RHO_FLOOR
    now = measured(torch.from_numpy(rho).float(), side=SIDE)
    return seen(name, baseline=measured(0.5, side=SIDE), now=now, **kind)


def noisy(seed: int, std: float = 0.05) -> np.ndarray:
    """What a control shows: smooth noise, ``(32, 32)``."""
    noise = ndimage.uniform_filter(np.random.default_rng(seed).standard_normal((SIDE, SIDE)), 5)
    return std * noise / noise.std()


def broad(seed: int, strength: float) -> np.ndarray:
    """A change of the left half of the picture."""
    values = noisy(seed)
    values[:, : SIDE // 2] += strength
    return values


LEVEL = {"control": True}


@pytest.mark.parametrize("columns", [slice(4, 6), slice(24, 26)], ids=["inside the change", "beside it"])
def test_a_spike_beside_a_change_that_all_controls_share_is_not_called(columns):
    """0.2 % of the picture far above every control, in a picture that has changed as controls have."""
    strengths = 0.4 + 0.1 * np.random.default_rng(0).standard_normal(20)
    alike = [looks_like(broad(i, s), f"control/{i}", **LEVEL) for i, s in enumerate(strengths)]
    spiked = broad(99, 0.4)
    spiked[9, columns] += 2.0
    states = {}
    for step in (1, 2, 3):
        judgement = judge_event([looks_like(spiked), *alike], states, step, UNSMOOTHED)
        states = judgement.states
        assert judgement.findings[0].verdict is Verdict.NO_EVIDENCE
    highest = [f.signals.decisive.mean.max().item() for f in (*judgement.controls, *judgement.findings)]
    assert highest[-1] > 2 * max(highest[:-1])  # the peak alone would have called it


def test_large_faint_and_small_strong_regions_are_both_found():
    quiet = [looks_like(noisy(i), f"control/{i}", **LEVEL) for i in range(20)]
    both = broad(98, 0.45)
    both[20:24, 24:28] += 1.5  # 1.6 % of the picture
    small = noisy(97)
    small[20:24, 24:28] += 1.5
    probes = [looks_like(broad(96, 0.45), "large"), looks_like(small, "small"), looks_like(both, "both")]
    states = {}
    for step in (1, 2):
        judgement = judge_event([*probes, *quiet], states, step, UNSMOOTHED)
        states = judgement.states
    assert [f.verdict for f in judgement.findings] == [Verdict.MEMORIZED] * 3
    large, small, both = judgement.findings
    assert [round(f.regions[0].area, 2) for f in (large, small)] == [0.5, 0.02]
    assert sorted(round(region.area, 2) for region in both.regions) == [0.02, 0.5]
    assert all(region.p < 1e-4 for region in both.regions)
    effects = [region.effect for region in sorted(both.regions, key=lambda region: region.area)]
    assert effects == pytest.approx([1.5, 0.45], abs=0.1)


def test_the_region_that_decides_exceeds_the_controls_most():
    """Not the largest, nor the strongest: controls vary over few pixels more than over many."""
    varied = [looks_like(noisy(i, std=0.3), f"control/{i}", **LEVEL) for i in range(20)]
    values = broad(98, 0.9)
    values[20:24, 24:28] += 1.2
    (finding,) = judged([looks_like(values), *varied], config=UNSMOOTHED)
    large, small = finding.regions
    assert (round(large.area, 2), round(small.area, 2)) == (0.5, 0.02)
    assert large.z_score > small.z_score
    assert large.mean < small.mean
    assert finding.severity == pytest.approx(math.exp(large.effect))


# --- who is compared with whom ----------------------------------------------------------------------------------------


def test_every_control_is_judged_by_the_others():
    quiet = controls(20, 1.0, spread=0.3)
    loud = replace(quiet[3], now=seen(fallen=9.0).now)
    observations = [*quiet[:3], loud, *quiet[4:]]
    judgement = judge_event([seen(), *observations], {}, 1, DEFAULT)
    assert [f.name for f in judgement.controls] == [o.name for o in observations]
    profiles = [profile_of(f.signals) for f in judgement.controls]
    assert {f.evidence.num_controls for f in judgement.controls} == {19}
    found = judgement.controls[3]
    expected = Null.of(profiles).without(3)
    assert found.p == pytest.approx(expected.p_value(found.regions[0].z_score))
    assert found.p < 1e-5
    assert judgement.states.keys() == {"a", *(o.name for o in observations)}
    assert judgement.states[found.name] == ProbeState(
        events=1, streak=1, since=1, is_enough=True, verdict=Verdict.SUSPICIOUS
    )
    assert (judgement.audit.called, judgement.audit.of) == (0, 20)


def test_a_sibling_among_the_controls_keeps_a_learned_subject_from_being_called():
    """It is as rare as the probe, and the rule would call it as well."""
    quiet = controls(20, 1.0, spread=0.05)
    sibling = replace(quiet[0], now=seen(fallen=4.5).now)
    states, verdicts = {}, []
    for step in (1, 2, 3):
        judgement = judge_event([seen(), sibling, *quiet[1:]], states, step, DEFAULT)
        states = judgement.states
        verdicts.append(judgement.findings[0].verdict)
    assert verdicts == [Verdict.SUSPICIOUS] * 3
    assert not states["a"].called
    assert states["control/0"].called
    (finding,) = judgement.findings
    assert finding.state.streak == 3  # it would have been called, but for the audit
    assert "not called memorized, because the same rule calls 1 of 20 controls" in finding.reason
    assert judgement.audit == Audit(1, 20, judgement.controls[0].p)
    without = judge_event([seen(), *quiet], {}, 1, DEFAULT).states
    assert judged([seen(), *quiet], without, 2)[0].verdict is Verdict.MEMORIZED


def test_the_budget_is_shared_by_the_watched_probes_alone():
    """With one probe p is rare enough, with twenty it is not; controls and peers do not share."""
    quiet, others = controls(20, 1.0, spread=0.4), [seen(f"other/{i}", 1.0) for i in range(19)]
    (alone,) = judged([seen(), *quiet, *peers(30, 1.0)])
    among = judged([seen(), *others, *quiet])[0]
    assert 0.05 / 32 / 20 < alone.p == among.p < 0.05 / 32
    assert (alone.state.is_enough, among.state.is_enough) == (True, False)
    assert "not rare enough to call in a whole run" in among.reason


@pytest.mark.parametrize("reference", [True, False])
def test_a_probe_is_judged_against_controls_of_its_own_kind(reference):
    loud, quiet = controls(20, 5.0, spread=0.1, reference=reference), controls(20, 1.0, reference=not reference)
    quiet = [replace(c, probe=replace(c.probe, name=f"{c.name}/quiet")) for c in quiet]
    probes = [seen("like the loud", reference=reference), seen("like the quiet", reference=not reference)]
    first, second = judged([*probes, *loud, *quiet])
    assert (first.verdict, second.verdict) == (Verdict.NO_EVIDENCE, Verdict.SUSPICIOUS)
    assert first.p > 0.5
    assert second.p < 1e-9
    assert (first.evidence.num_controls, second.evidence.num_controls) == (20, 20)


def test_image_probes_with_controls_of_prompts_are_inconclusive():
    judgement = judge_event([seen(), *controls(20, 1.0, reference=False)], {}, 1, DEFAULT)
    (finding,) = judgement.findings
    assert (finding.verdict, finding.p) == (Verdict.INCONCLUSIVE, None)
    assert finding.reason.endswith("but there are 0 usable controls of its kind, and it takes 11")
    assert judgement.audit.of == 20


def test_ten_controls_are_too_few_for_anybody_and_eleven_are_enough_for_all():
    """A control is judged by the others, so one rule asks for eleven: then each has ten of them."""
    judgement = judge_event([seen(), *controls(10, 1.0)], {}, 1, DEFAULT)
    (finding,) = judgement.findings
    assert (finding.verdict, finding.p, finding.regions) == (Verdict.INCONCLUSIVE, None, ())
    assert finding.reason.endswith("but there are 10 usable controls of its kind, and it takes 11")
    assert {f.p for f in judgement.controls} == {None}
    assert str(judgement.audit) == "no controls could be audited"
    judgement = judge_event([seen(), *controls(11, 1.0)], {}, 1, DEFAULT)
    assert judgement.findings[0].verdict is Verdict.SUSPICIOUS
    assert {f.evidence.num_controls for f in judgement.controls} == {10}
    assert None not in {f.p for f in judgement.controls}
    assert judgement.audit.of == 11


def test_without_controls_there_is_no_p_value():
    judgement = judge_event([seen()], {}, 1, DEFAULT)
    (finding,) = judgement.findings
    assert (finding.p, judgement.controls) == (None, ())
    assert finding.verdict is Verdict.SUSPICIOUS
    assert finding.reason.endswith("uncalibrated (no controls)")
    assert [region.p for region in finding.regions] == [None]


@pytest.mark.parametrize(
    ("fallen", "count"),
    [
        pytest.param(1.2, 12, id="they show less"),
        pytest.param(9.0, 12, id="they are stored themselves, which is no excuse"),
        pytest.param(1.2, 0, id="there are none"),
    ],
)
def test_peers_that_are_no_excuse(fallen, count):
    states = {}
    for step in (1, 2):
        judgement = judge_event([seen(), *peers(count, fallen), *controls(20, 1.0)], states, step, UNSMOOTHED)
        states = judgement.states
    evidence = judgement.findings[0].evidence
    typical = (0.5 + RHO_FLOOR) / (0.5 / fallen + RHO_FLOOR) if count else 1.0
    assert evidence.severity_peers == pytest.approx(typical, rel=0.01)
    assert evidence.num_peers == len(judgement.peers) == count
    assert not any(name.startswith("peer") for name in judgement.states)  # they have no memory
    assert judgement.findings[0].verdict is Verdict.MEMORIZED


def test_peers_that_show_as_much_are_an_excuse():
    """A third of a set of ordinary pictures shows as much; if half of it did, it would count as stored itself."""
    group = [seen(f"peer/{i}", fallen, peer=True) for i, fallen in enumerate([1.1] * 8 + [3.0] * 4)]
    states = {}
    for step in (1, 2):
        judgement = judge_event([seen(fallen=2.5), *group, *controls(20, 1.0)], states, step, UNSMOOTHED)
        states = judgement.states
    (finding,) = judgement.findings
    assert finding.verdict is Verdict.SUSPICIOUS
    assert finding.evidence.rank_p_peers == finding.regions[0].rank_p_peers == pytest.approx(5 / 13)
    assert finding.reason.endswith("but no more than ordinary training images show (rank p = 0.38)")


# --- what cannot be judged --------------------------------------------------------------------------------------------


def test_nothing_earlier_to_compare_with():
    observation = replace(seen(), baseline=None, baseline_step=None)
    (finding,) = judged([observation, *controls(20, 1.0)])
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert finding.reason == "nothing earlier to compare with"
    assert (finding.regions, finding.labels, finding.severity) == ((), None, 1.0)
    assert finding.state.events == 0
    lacking = [replace(c, baseline=None) for c in controls(20, 1.0)]
    assert judged([seen(), *lacking])[0].evidence.num_controls == 0


def test_what_is_not_finite_is_inconclusive_and_no_control():
    broken = replace(seen(), now=measured(math.nan))
    control = replace(controls(1, 1.0)[0], now=measured(math.nan), probe=Probe("c", name="c", is_control=True))
    control = replace(control, probe=replace(control.probe, image=seen().probe.image))
    judgement = judge_event([broken, control, *controls(20, 1.0)], {}, 1, DEFAULT)
    (finding,) = judgement.findings
    assert finding.signals is None
    assert (finding.verdict, finding.is_alert) == (Verdict.INCONCLUSIVE, True)
    assert finding.reason == "non-finite values in the model's output"
    assert finding.evidence.num_controls == 20
    assert not judged([broken], judgement.states, 2)[0].is_alert  # said once


def test_judging_nothing():
    judgement = judge_event([], {"gone": ProbeState(streak=3)}, 1, DEFAULT)
    assert (judgement.findings, judgement.controls, judgement.peers) == ((), (), ())
    assert judgement.states == {"gone": ProbeState(streak=3)}


# --- from event to event ----------------------------------------------------------------------------------------------


def test_patience_is_counted_in_the_states_that_are_handed_on():
    observations = [seen(), *controls(20, 1.0, spread=0.1)]
    states = judge_event(observations, {"gone": ProbeState(streak=3)}, 1, DEFAULT).states
    assert states["gone"] == ProbeState(streak=3)  # of a probe that was not looked at this time
    before = dict(states)
    judgement = judge_event(observations, states, 2, DEFAULT)
    (finding,) = judgement.findings
    expected = ProbeState(2, 2, 1, True, None, Verdict.MEMORIZED, called=True, rarest_p=finding.p)
    assert finding.state == judgement.states["a"] == expected
    assert states == before


def test_judging_one_probe_is_judging_it_among_all():
    observations = [seen("a", 5.0), seen("b", 2.0), *controls(20, 1.0, spread=0.1)]
    judgement = judge_event(observations, {}, 1, DEFAULT)
    references = References(Null.of([profile_of(f.signals) for f in judgement.controls]), Null.of([]), True)
    for expected in judgement.findings:
        o = expected.observation
        found = judge_probe(o, expected.signals, references, ProbeState(), 1, DEFAULT, num_probes=2)
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
        (MEMORIZED, SUSPICIOUS, False),  # as the audit may have it: no worse than before
    ],
)
def test_an_alert_is_news(before, after, expected):
    evidence = Evidence(severity=2.0, severity_low=1.5, p=0.01, finite=after.finite)
    assert is_alert(before, after, evidence) is expected
