"""Proof by generation: what is due, what a generation copies, and that it costs the training nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.builders import Loop, assert_same, picture
from support.observations import seen

import memwatch.proof.prove
from memwatch import Probe
from memwatch.config_file import load_config
from memwatch.faults import Faults, StrictError
from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Evidence, ProbeState, Verdict
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Observation
from memwatch.measure.regions import Region
from memwatch.measure.signals import Signals
from memwatch.proof.copies import grade_of, mask_at
from memwatch.proof.prove import COMPARING, MAX_PROBES, NUM_SEEDS, PROVING, due, proofs_of, prove

REGION = Region((0, 0, 16, 32), 0.5, 1.0, 0.1)
SUSPICIOUS, MEMORIZED = Verdict.SUSPICIOUS, Verdict.MEMORIZED
CAPTION = "a photo of a"


def photo(seed: int, side: int = 32) -> np.ndarray:
    return np.asarray(picture(seed, side))


def found(o: Observation, verdict: Verdict = SUSPICIOUS, severity: float = 2.0, *, alert: bool = True) -> Finding:
    """A finding whose region is the left half."""
    labels = np.zeros((4, 4), np.int32)
    labels[:, :2] = 1
    heatmap = CurvatureMap(torch.from_numpy(labels).double()[None])  # as strong everywhere inside
    signals = replace(Signals.of(o, 1), heatmap=heatmap)
    return Finding(o, signals, Evidence(severity), ProbeState(verdict=verdict), "", (REGION,), labels, alert)


def drawn(name: str, *seeds: int, caption: str | None = None) -> Observation:
    """A prompt probe with these generations."""
    o = seen(name, reference=False, generations=np.stack([photo(seed) for seed in seeds]))
    return o if caption is None else replace(o, probe=Probe(caption, name=name))


def names(findings) -> list[str]:
    return [f.name for f in findings]


def test_what_is_news_and_has_a_region_is_due_worst_first():
    findings = [
        *(found(seen(f"mild{i}"), severity=2.0 - i / 10) for i in range(MAX_PROBES)),
        found(seen("strong"), severity=9.0),
        found(seen("stored"), MEMORIZED, 1.6),
        found(seen("old"), MEMORIZED, 9.0, alert=False),
        replace(found(seen("nowhere")), regions=(), labels=None),
        found(seen("broken"), Verdict.INCONCLUSIVE),
        found(drawn("p", 1, 2)),  # its generations cost nothing
        found(drawn("q", 1)),  # one is no proof
    ]
    usual = ["stored", "strong", "mild0", "mild1", "p"]
    assert names(due(findings, load_config(None))) == usual
    assert due(findings, load_config(None, proof={"enabled": False})) == []
    waiting = load_config({"stop": {"require_copy": True}})  # asks until there is a copy
    assert names(due(findings, waiting)) == ["old", "stored", "strong", "mild0", "p"]
    assert names(due(findings, waiting, copied=["old"])) == usual
    assert names(due(findings, load_config(waiting, stop={"enabled": False}))) == usual


LEFT = np.zeros((32, 32, 1), bool)
LEFT[:, :16] = True


def left_of(inside: int, outside: int) -> np.ndarray:
    return np.where(LEFT, photo(inside), photo(outside))


def proofs(findings, generated, caption_of=lambda probe: probe.prompt):
    """Against six controls."""
    chance = [seen(f"control/{i}", control=True) for i in range(6)]
    observations = [*(f.observation for f in findings), *chance]
    pictures = {o.name: photo(50 + i) for i, o in enumerate(chance)}
    pictures |= {f.name: photo(i) for i, f in enumerate(findings) if f.observation.probe.is_reference}
    return proofs_of([f for f in findings if f.is_alert], findings, observations, generated, pictures, caption_of)


def test_generations_are_compared_inside_the_region_that_decides():
    generated = np.stack([photo(0), left_of(0, 8), left_of(8, 0), photo(9)])
    finding = found(seen("a"))
    for labels in (finding.labels, np.where(finding.labels, 1, 2)):  # another region plays no part
        proof = proofs([replace(finding, labels=labels)], {CAPTION: generated})["a"]
        assert proof.is_copy == (True, True, False, False)
        assert proof.copies == (("a",), ("a",), (), ())
        assert (proof.num_others, proof.generations is generated) == (6, True)
        assert proof.ratios[0] < 1e-9


def test_probes_that_share_a_caption_share_generations_and_each_counts_its_own():
    """Two of three are news; the third has no region and is compared as a whole."""
    whole = replace(found(seen("c"), Verdict.NO_EVIDENCE, alert=False), regions=(), labels=None)
    findings = [found(seen("a")), found(seen("b")), whole]
    generated = np.stack([photo(0), left_of(1, 8), photo(2), left_of(2, 8), photo(9)])
    of = proofs(findings, {"sks": generated}, caption_of=lambda probe: "sks")
    assert {name: proof.is_copy.index(True) for name, proof in of.items()} == {"a": 0, "b": 1}
    assert of["a"].copies == of["b"].copies == (("a",), ("b",), ("c",), (), ())
    of = proofs(findings, {f"a photo of {n}": photo(0)[None] for n in "abc"})  # images of another caption: not named
    assert (of["a"].copies, of["b"].copies) == ((("a",),), ((),))


def test_what_a_prompt_draws_from_the_same_caption_is_no_chance():
    """The image's own proof is not spoiled by a watched prompt that copies it, and the prompt's names the image."""
    image, prompt = found(seen("a")), drawn("p", 0, 0, 7, caption=CAPTION)
    of = proofs([image, found(prompt)], {CAPTION: photo(0)[None]})
    assert of["a"].copied == 1
    assert of["p"].copies == (("p", "a"), ("p", "a"), ())
    alone, shared = (proofs([image, *more], {CAPTION: prompt.generations})["a"] for more in ([], [found(prompt)]))
    assert shared.ratios == alone.ratios
    assert shared.num_others == alone.num_others == 6


def test_the_grade_is_of_the_region_and_by_chance_is_what_other_captions_generate():
    """A template that two captions bring out is no chance; without other captions the pictures of the pool are."""
    findings, made = [found(seen("a")), found(seen("b"))], np.stack([left_of(0, 8), left_of(0, 9)])
    other = np.stack([photo(20), photo(21)])
    alone = proofs(findings[:1], {CAPTION: made})["a"].grade
    graded = [proofs(findings, {CAPTION: made, "a photo of b": b})["a"].grade for b in (other, made)]
    assert [alone, *graded] == pytest.approx([1] * 3, abs=1e-5)
    mixed = np.stack([left_of(0, 8), photo(30)])
    core = mask_at(findings[0].labels == 1, (32, 32))
    expected = grade_of(photo(0) / 255, mixed / 255, other / 255, core)
    of = [
        proofs(findings, {CAPTION: mixed, "a photo of b": b})["a"].grade for b in (other, np.stack([*other, made[0]]))
    ]
    assert of == pytest.approx([expected] * 2)
    assert 0.3 < expected < 0.7  # one of two
    assert proofs(findings[:1], {CAPTION: mixed})["a"].grade != pytest.approx(expected)


def test_a_prompt_is_graded_by_its_siblings():
    same, different = (proofs([found(drawn("p", *seeds))], {})["p"].grade for seeds in ((7, 7, 7), (7, 8, 9)))
    assert same == pytest.approx(1, abs=1e-5)
    assert abs(different) < 0.3


CATS = [Probe("a cat", picture(0), name="a"), Probe("a cat", picture(1), name="b")]
CATS_AND_PROMPT = [*CATS, Probe("x", name="p")]


@pytest.fixture
def watched(pretrained, images, tmp_path):
    """Makes a loop, its watch, and at its first event the observations, and a finding of every watched probe."""

    def make(probes=CATS_AND_PROMPT, **overrides):
        loop = Loop(pretrained, tmp_path)
        watch = loop.watch(pretrained, probes, controls=images, **overrides)
        with watch.observer.borrowed():
            observations = watch.observer.observe(watch.observer.probes, watch.baselines, {})
        return loop, watch, observations, [found(o) for o in observations if not o.probe.is_control]

    return make


def proven(watch, findings, observations):
    return prove(findings, observations, watch.observer, watch.faults)


def test_a_proof_is_made_of_the_model_s_own_generations(watched):
    _, watch, observations, findings = watched()
    a, b, p = (f.proof for f in proven(watch, findings, observations))
    assert a.generations.shape == (2 * NUM_SEEDS, 16, 16, 3)  # of each probe with this caption
    assert np.array_equal(a.generations, b.generations)
    assert len({g.tobytes() for g in a.generations}) == len(a.generations)
    assert p.generations is observations[2].generations
    assert a.num_others == len(watch.observer.probes) - 1
    again = proven(watch, findings, observations)[0].proof
    assert np.array_equal(again.generations, a.generations)
    assert again.ratios == a.ratios


@pytest.mark.parametrize(("draws", "sampled"), [(2 * NUM_SEEDS, []), (2, [("a cat", 2 * NUM_SEEDS)])])
def test_what_a_prompt_has_drawn_is_not_sampled_again(draws, sampled, watched, monkeypatch):
    """Two images share the caption with a prompt that has generations of it."""
    sampling = {"num_inference_steps": 2, "seeds": draws}
    levels = {"timesteps": [61], "draws": draws}
    _, watch, observations, findings = watched([*CATS, Probe("a cat", name="p")], levels=levels, sampling=sampling)
    real, calls = watch.observer.generate, []
    monkeypatch.setattr(watch.observer, "generate", lambda *call: calls.append(call) or real(*call))
    first, second, prompt = proven(watch, findings, observations)
    assert calls == sampled
    assert len(first.proof.generations) == len(second.proof.generations) == 2 * NUM_SEEDS
    assert np.array_equal(first.proof.generations[:draws], prompt.proof.generations)  # the same seeds


@pytest.mark.parametrize("part", [PROVING, COMPARING])
def test_a_failing_proof_costs_the_proof_alone(part, watched, monkeypatch):
    loop, watch, observations, findings = watched()

    def failing(*_):
        torch.rand(3)
        raise RuntimeError("no")

    owner, name = (watch.observer, "generate") if part == PROVING else (memwatch.proof.prove, "proofs_of")
    monkeypatch.setattr(owner, name, failing)
    before = loop.state()
    for count in (1, 2, 3, 3):  # the fourth is not tried
        assert proven(watch, findings, observations) == tuple(findings)
        assert watch.faults.count == count
    assert watch.faults.is_off(part)
    if part == PROVING:
        assert_same(before, loop.state())
    with pytest.raises(StrictError):
        prove(findings, observations, watch.observer, Faults(strict=True))
