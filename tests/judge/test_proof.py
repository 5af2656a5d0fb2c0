"""Proof by generation: what is due, what a generation copies, and that it costs the training nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.builders import CONFIG, Loop, assert_same, picture
from support.observations import seen

import memwatch.judge.proof
from memwatch import Probe
from memwatch.config_file import load_config
from memwatch.faults import Faults, StrictError
from memwatch.judge.alerts import Evidence, ProbeState, Verdict
from memwatch.judge.findings import Finding
from memwatch.judge.proof import COMPARING, PROVING, core_of, due, proofs_of, prove
from memwatch.judge.regions import Region
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.images import decode_latents
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import Signals

REGION = Region((0, 0, 16, 32), 0.5, 1.0, 1.0, 0.1, 0.8)
SUSPICIOUS, MEMORIZED = Verdict.SUSPICIOUS, Verdict.MEMORIZED
REQUIRED = {"stop": {"require_copy": True}}


def photo(seed: int, side: int = 32) -> np.ndarray:
    return np.asarray(picture(seed, side))


def found(
    observation: Observation, verdict: Verdict = SUSPICIOUS, severity: float = 2.0, *, alert: bool = True
) -> Finding:
    """A finding whose region is the left half."""
    labels = np.zeros((4, 4), np.int32)
    labels[:, :2] = 1
    evidence, state = Evidence(severity=severity), ProbeState(verdict=verdict)
    decisive = CurvatureMap(torch.from_numpy(labels).double()[None])  # as strong everywhere inside
    signals = replace(Signals.of(observation, 1), decisive=decisive)
    return Finding(observation, signals, evidence, state, "", (REGION,), labels, alert)


def drawn(name: str, *seeds: int) -> Observation:
    """A prompt probe with these generations."""
    return seen(name, reference=False, generations=np.stack([photo(seed) for seed in seeds]))


# --- what is due ------------------------------------------------------------------------------------------------------


def names(findings) -> list[str]:
    return [f.name for f in findings]


def test_what_is_news_and_has_a_region_is_due_worst_first():
    findings = [
        found(seen("mild"), severity=2.0),
        found(seen("strong"), severity=9.0),
        found(seen("stored"), MEMORIZED, 1.6),
        found(seen("old"), MEMORIZED, 9.0, alert=False),
        replace(found(seen("nowhere")), regions=(), labels=None),
        found(seen("broken"), Verdict.INCONCLUSIVE),
    ]
    assert names(due(findings, load_config(None))) == ["stored", "strong", "mild"]
    assert names(due(findings, load_config(None, proof={"max_probes": 2}))) == ["stored", "strong"]
    assert due(findings, load_config(None, proof={"enabled": False})) == []


def test_a_stop_that_waits_for_a_copy_asks_until_there_is_one():
    findings = [found(seen("old"), MEMORIZED, alert=False), found(seen("mild"), alert=False)]
    assert names(due(findings, load_config(REQUIRED))) == ["old"]
    assert due(findings, load_config(REQUIRED), copied=["old"]) == []
    assert due(findings, load_config({"stop": {"require_copy": True, "enabled": False}})) == []


def test_a_prompt_s_generations_cost_nothing_and_one_is_no_proof():
    findings = [found(drawn("p", 1, 2)), found(drawn("q", 1)), found(seen("a")), found(seen("b"), severity=1.5)]
    assert names(due(findings, load_config(None, proof={"max_probes": 1}))) == ["a", "p"]


# --- what a generation copies -----------------------------------------------------------------------------------------

LEFT = np.zeros((32, 32), bool)
LEFT[:, :16] = True


def left_of(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    return np.where(LEFT[..., None], inside, outside)


def proofs(findings, generated, caption_of=lambda probe: probe.prompt):
    """Against six controls."""
    chance = [seen(f"control/{i}", control=True) for i in range(6)]
    observations = [*(f.observation for f in findings), *chance]
    pictures = {o.name: photo(50 + i) for i, o in enumerate(chance)}
    pictures |= {f.name: photo(i) for i, f in enumerate(findings) if f.observation.probe.is_reference}
    return proofs_of([f for f in findings if f.is_alert], findings, observations, generated, pictures, caption_of)


def test_generations_are_compared_inside_the_region():
    generated = np.stack([photo(0), left_of(photo(0), photo(8)), left_of(photo(8), photo(0)), photo(9)])
    proof = proofs([found(seen("a"))], {"a photo of a": generated})["a"]
    assert proof.is_copy == (True, True, False, False)
    assert proof.copies == (("a",), ("a",), (), ())
    assert proof.num_others == 6
    assert proof.generations is generated
    assert proof.ratios[0] < 1e-9


def test_the_rim_of_a_region_does_not_count():
    """Where the map ends in a slope, the picture is in part what every picture has anew."""
    finding = found(seen("a"))
    values = torch.from_numpy(finding.labels).double()
    values[:, 1] = 0.7  # of the peak
    rimmed = replace(finding, signals=replace(finding.signals, decisive=CurvatureMap(values[None])))
    assert core_of(finding)[:, :2].all()
    assert core_of(rimmed).tolist() == [[True, False, False, False]] * 4


def test_only_the_region_that_decides_counts():
    finding = found(seen("a"))
    labels = np.full((4, 4), 2, np.int32)
    labels[:, :2] = 1
    generated = left_of(photo(0), photo(8))[None]
    assert proofs([replace(finding, labels=labels)], {"a photo of a": generated})["a"].copied == 1


def test_probes_that_share_a_caption_share_generations_and_each_counts_its_own():
    """Two of three are news; the third has no region and is compared as a whole."""
    first, second, quiet = seen("a"), seen("b"), seen("c")
    whole = replace(found(quiet, Verdict.NO_EVIDENCE, alert=False), regions=(), labels=None)
    generated = np.stack([photo(0), left_of(photo(1), photo(8)), photo(2), left_of(photo(2), photo(8)), photo(9)])
    of = proofs([found(first), found(second), whole], {"sks": generated}, caption_of=lambda probe: "sks")
    assert set(of) == {"a", "b"}
    assert of["a"].is_copy == (True, False, False, False, False)
    assert of["b"].is_copy == (False, True, False, False, False)
    assert of["a"].copies == of["b"].copies == (("a",), ("b",), ("c",), (), ())


def test_another_caption_s_images_are_not_named():
    of = proofs([found(seen("a")), found(seen("b"))], {f"a photo of {n}": photo(0)[None] for n in "ab"})
    assert (of["a"].copies, of["b"].copies) == ((("a",),), ((),))


def test_a_prompt_s_generations_are_compared_with_each_other():
    generations = np.stack([photo(3), left_of(photo(3), photo(4)), photo(5)])
    prompt = replace(drawn("p", 0), generations=generations)
    proof = proofs([found(prompt)], {})["p"]
    assert proof.is_copy == (True, True, False)
    assert proof.num_others == 6
    assert proof.generations is generations


def test_a_prompt_that_generates_a_watched_image_is_no_chance():
    """The image's own proof is not spoiled by a watched prompt that copies it, and the prompt's names the image."""
    image, prompt = seen("a"), replace(drawn("p", 0, 0, 7), probe=Probe("a photo of a", name="p"))
    of = proofs([found(image), found(prompt)], {"a photo of a": photo(0)[None]})
    assert of["a"].copied == 1
    assert of["p"].is_copy == (True, True, False)
    assert of["p"].copies == (("p", "a"), ("p", "a"), ())


def test_what_is_drawn_from_the_caption_is_no_chance():
    """A prompt's generations may be the very ones that are compared."""
    image, prompt = seen("a"), replace(drawn("p", 8, 9), probe=Probe("a photo of a", name="p"))
    alone = proofs([found(image)], {"a photo of a": prompt.generations})["a"]
    shared = proofs([found(image), found(prompt)], {"a photo of a": prompt.generations})["a"]
    assert shared.ratios == alone.ratios
    assert np.isfinite(shared.ratios).all()
    assert shared.num_others == alone.num_others == 6


# --- with a model -----------------------------------------------------------------------------------------------------


def watched(pretrained, images, folder, probes=None, **overrides):
    """A loop, its watch, and at its first event the observations, and a finding of every watched probe."""
    loop = Loop(pretrained, folder)
    probes = probes or [
        Probe("a cat", picture(0), name="a"),
        Probe("a cat", picture(1), name="b"),
        Probe("x", name="p"),
    ]
    watch = loop.watch(pretrained, probes, controls=images, **overrides)
    with watch.observer.borrowed():
        observations = watch.observer.observe(watch.observer.probes, watch.baselines, {})
    return loop, watch, observations, [found(o) for o in observations if not o.probe.is_control]


def proven(watch, findings, observations, **more):
    return prove(findings, observations, watch.observer, watch.faults, **more)


def test_a_proof_is_made_of_the_model_s_own_generations(pretrained, images, tmp_path):
    _, watch, observations, findings = watched(pretrained, images, tmp_path)
    a, b, p = (f.proof for f in proven(watch, findings, observations))
    assert a.generations.shape == (2 * watch.config.proof.seeds, 16, 16, 3)  # of each probe with this caption
    assert np.array_equal(a.generations, b.generations)
    assert len({g.tobytes() for g in a.generations}) == len(a.generations)
    assert p.generations is observations[2].generations
    assert a.num_others == len(watch.observer.probes) - 1
    assert np.isfinite(a.ratios).all()
    again = proven(watch, findings, observations)[0].proof
    assert np.array_equal(again.generations, a.generations)
    assert again.ratios == a.ratios


@pytest.mark.parametrize(("seeds", "sampled"), [(1, []), (2, [("a cat", 4)])])
def test_what_a_prompt_has_drawn_is_not_sampled_again(seeds, sampled, pretrained, images, tmp_path, monkeypatch):
    """Two images share the caption, and the prompt has two generations of it."""
    probes = [*(Probe("a cat", picture(i), name=f"{i}") for i in range(2)), Probe("a cat", name="p")]
    proof = CONFIG["proof"] | {"seeds": seeds}
    _, watch, observations, findings = watched(pretrained, images, tmp_path, probes, proof=proof)
    real, calls = watch.observer.generate, []
    monkeypatch.setattr(watch.observer, "generate", lambda *call: calls.append(call) or real(*call))
    proofs = [f.proof for f in proven(watch, findings, observations)]
    assert calls == sampled
    for i in range(2):
        assert len(proofs[i].generations) == 2 * seeds
    assert seeds > 1 or np.array_equal(proofs[0].generations[:2], observations[2].generations)


def test_pictures_are_what_the_autoencoder_gives_back(pretrained, images, tmp_path):
    observer = watched(pretrained, images, tmp_path)[1].observer
    with observer.borrowed():
        pictures = observer.pictures()
    assert set(pictures) == {p.name for p in observer.probes if p.probe.is_reference}
    assert np.array_equal(pictures["a"], decode_latents(observer.probes[0].latents, observer.parts.vae))


def test_training_is_untouched(pretrained, images, tmp_path):
    loop, watch, observations, findings = watched(pretrained, images, tmp_path)
    loop.run(None, 1)
    before, objects = loop.state(), loop.identities()
    assert any(f.proof for f in proven(watch, findings, observations))
    assert_same(before, loop.state())
    assert loop.identities() == objects


@pytest.mark.parametrize("part", [PROVING, COMPARING])
def test_a_failing_proof_costs_the_proof_alone(part, pretrained, images, tmp_path, monkeypatch):
    loop, watch, observations, findings = watched(pretrained, images, tmp_path)

    def failing(*_):
        torch.rand(3)
        raise RuntimeError("no")

    if part == PROVING:
        monkeypatch.setattr(watch.observer, "generate", failing)
    else:
        monkeypatch.setattr(memwatch.judge.proof, "proofs_of", failing)
    before = loop.state()
    for count in (1, 2, 3, 3):  # the fourth is not tried
        assert proven(watch, findings, observations) == tuple(findings)
        assert watch.faults.count == count
    assert watch.faults.is_off(part)
    if part == PROVING:
        assert_same(before, loop.state())
    with pytest.raises(StrictError):
        prove(findings, observations, watch.observer, Faults(strict=True))


def test_one_key_turns_it_off_and_frees_the_autoencoder(pretrained, images, tmp_path, monkeypatch):
    images_alone = [Probe("a cat", picture(0), name="a")]
    for enabled in (True, False):
        proof = CONFIG["proof"] | {"enabled": enabled}
        _, watch, observations, findings = watched(
            pretrained, images, tmp_path / str(enabled), images_alone, proof=proof
        )
        assert (watch.observer.parts.vae is not None) == enabled
        if not enabled:
            monkeypatch.setattr(watch.observer, "generate", lambda *_: pytest.fail("generates"))
        assert [f.proof is not None for f in proven(watch, findings, observations)] == [enabled]


def test_a_quiet_event_generates_nothing(pretrained, images, tmp_path, monkeypatch):
    _, watch, observations, findings = watched(pretrained, images, tmp_path)
    monkeypatch.setattr(watch.observer, "borrowed", lambda: pytest.fail("borrows the model"))
    quiet = [replace(f, is_alert=False) for f in findings]
    assert proven(watch, quiet, observations) == tuple(quiet)


def test_a_model_without_prompts_generates_by_seeds_alone(families, family_folders, tmp_path):
    """All its probes share the generations, whatever their captions."""
    from accelerate import Accelerator

    from memwatch import MemWatch

    probes = [Probe("one", picture(0, 8), name="a"), Probe("two", picture(1, 8), name="b")]
    config = CONFIG | {"output_dir": str(tmp_path)}
    watch = MemWatch(
        Accelerator(cpu=True),
        families["unconditional"].unet,
        family_folders["unconditional"],
        config=config,
        probes=probes,
    )
    with watch.observer.borrowed():
        observations = watch.observer.observe(watch.observer.probes, watch.baselines, {})
    a, b = (f.proof for f in proven(watch, [found(o) for o in observations], observations))
    assert a.generations.shape == (2 * watch.config.proof.seeds, 8, 8, 3)
    assert np.array_equal(a.generations, b.generations)
