"""What is held against what: the same terms and the same noise draws on both sides, by one rule for everybody."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from evidence.simulation import SIDE, config_of, observation

import memwatch.judge.findings
from memwatch import Probe
from memwatch.config import AlertsConfig
from memwatch.judge.findings import judge_event
from memwatch.judge.screen import chosen, with_references
from memwatch.judge.statistic import Screened
from memwatch.measure.measurement import Measurement

CONFIG = config_of(AlertsConfig())
SECOND_DRAW = 1.3  # times the error of the first: what the screen did not see


def event(falls, names=None):
    """Everything as it is observed where ``names``, or what the screen chooses, is judged with curvature.

    Args:
        falls: by probe, log factors of variance and loss.
    """
    full, screened = {}, {}
    for probe, (variance, loss) in falls.items():
        maps = np.full((SIDE, SIDE), float(variance)), np.full((SIDE, SIDE), float(loss))
        seen = observation(probe, *maps, curvature=True)
        epsilon = seen.now.epsilon * torch.tensor([1.0, SECOND_DRAW]).reshape(1, 2, 1, 1, 1)
        full[probe.name] = replace(seen, now=Measurement(seen.now.rho, epsilon))
        screened[probe.name] = observation(probe, *maps, curvature=False)
    names = frozenset(chosen(list(screened.values()), CONFIG) if names is None else names)
    measured = with_references(names, list(falls))
    return [full[n] if n in measured else screened[n] for n in full], Screened(list(screened.values()), names)


def drawn(number, rng, **kind):
    prefix = "control" if kind.get("is_control") else "peer" if kind else "probe"
    return {Probe("", "drawn", name=f"{prefix}/{i}", **kind): rng.normal((1.0, 0.3), 0.1) for i in range(number)}


def falls(seed=0, controls=12):
    rng = np.random.default_rng(seed)
    return drawn(3, rng) | drawn(controls, rng, is_control=True) | drawn(5, rng, is_peer=True)


def mean_of(fall, *, curvature):
    """What a picture shows all over: of the screen its loss, else both terms over both draws."""
    variance, loss = fall
    if not curvature:
        return loss - 0.002
    error = 1.01 * np.exp(-(loss + np.array([-0.002, 0.002]))) - 0.01
    both = np.log(1.01 / ((error * [1, SECOND_DRAW**2]).mean() + 0.01))
    return (variance + both) / 2


def test_both_sides_are_made_of_the_same_terms(monkeypatch):
    """Chosen: both terms, all draws, of everybody. Not chosen: the loss at the screen's draw, of everybody."""
    seen, real = {}, memwatch.judge.findings.judge_probe

    def judge_probe(o, signals, references, *args):
        seen[o.name, o.has_curvature] = signals, references
        return real(o, signals, references, *args)

    monkeypatch.setattr(memwatch.judge.findings, "judge_probe", judge_probe)
    named, picked = falls(), {"probe/1", "control/4"}
    observations, screened = event(named, picked)
    judgement = judge_event(observations, {}, 1, CONFIG, screened=screened)
    assert {f.name for f in judgement.everything if f.observation.has_curvature} == picked
    assert judgement.num_measured == 1 + 12 + 5
    by_name = {p.name: (p, fall) for p, fall in named.items()}
    for name, (probe, fall) in by_name.items():
        curvature = name in picked
        signals, references = seen[name, curvature]
        assert signals.decisive.mean.numpy() == pytest.approx(mean_of(fall, curvature=curvature), abs=1e-5)
        others = [f for p, f in named.items() if p.is_control and p is not probe]
        expected = [mean_of(f, curvature=curvature) for f in others]
        assert references.controls.profiles[:, 0] == pytest.approx(expected, abs=1e-5)
        if not probe.is_control and not probe.is_peer:
            ordinary = [mean_of(f, curvature=curvature) for p, f in named.items() if p.is_peer]
            assert references.peers.profiles[:, 0] == pytest.approx(ordinary, abs=1e-5)
            assert references.severity_peers == pytest.approx(np.exp(np.median(ordinary)), rel=0.01)


@pytest.mark.parametrize("fall", [(1.0, 0.3), (1.0, 1.2), (2.6, 0.9), (0.0, 0.72)])
def test_a_control_that_is_called_a_probe_gets_the_same_verdict(fall):
    """The same picture among the same others, once as a probe and once as one of the controls."""
    others, verdicts = drawn(11, np.random.default_rng(1), is_control=True), []
    for is_control in (False, True):
        picture = Probe("", "drawn", name="it", is_control=is_control)
        another = {} if not is_control else {Probe("", "drawn", name="another"): (1.0, 0.3)}
        states = {}
        for step in (1, 2, 3):
            observations, screened = event({picture: fall} | another | others)
            judgement = judge_event(observations, states, step, CONFIG, screened=screened)
            states = judgement.states
        (finding,) = [f for f in judgement.everything if f.name == "it"]
        evidence = replace(finding.evidence, num_controls=0)
        verdicts.append((evidence, finding.state, finding.observation.has_curvature))
        assert finding.evidence.num_controls == 11
    assert verdicts[0] == verdicts[1]
    assert verdicts[0][2] == (fall[1] > 0.7)  # the screen sees the loss alone


def test_everything_is_judged_with_curvature_where_everything_is_chosen():
    named = falls()
    observations, screened = event(named, {p.name for p in named})
    by_screen = judge_event(observations, {}, 1, CONFIG, screened=screened)
    without = judge_event(observations, {}, 1, CONFIG)
    assert [f.evidence for f in by_screen.everything] == [f.evidence for f in without.everything]


def test_what_was_not_chosen_keeps_its_history():
    """It is compared, on the loss; a streak ends, and nothing of it is evidence."""
    named = falls()
    states = {}
    for step, names in ((1, ["probe/1"]), (2, []), (3, [])):
        observations, screened = event(named, names)
        judgement = judge_event(observations, states, step, CONFIG, screened=screened)
        states = judgement.states
    state = states["probe/1"]
    assert (state.events, state.last_clean, state.streak) == (3, 3, 0)
    assert [f.evidence.compared for f in judgement.everything] == [True] * 20
    assert not any(f.verdict.is_evidence for f in judgement.everything)
