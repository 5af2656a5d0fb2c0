"""Proof by generation: whether what became suspicious or memorized comes out when its caption is sampled.

A copy is a fact of its own, beside the verdict: something can be stored and not come out in four generations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from memwatch.config import MemWatchConfig
from memwatch.faults import Faults, PartError
from memwatch.judge.findings import Finding
from memwatch.judge.regions import PEAK
from memwatch.judge.verdict import Verdict
from memwatch.measure.copies import COPY, Pool, Proof, comparable, copy_ratios, mask_at, sibling_ratios
from memwatch.measure.measurement import Observation
from memwatch.measure.observer import Observer
from memwatch.measure.probes import Probe

NUM_SEEDS = 4  # generations per probe; probes with the same caption share theirs
MAX_PROBES = 4  # per event, the worst first
CORE = 0.8  # of a region's peak, on the log scale: what surely belongs to it
PROVING, COMPARING = "proof by generation", "comparing generations with images"


def prove(
    findings: Sequence[Finding],
    observations: Sequence[Observation],
    observer: Observer,
    faults: Faults,
    copied: Collection[str] = (),
) -> tuple[Finding, ...]:
    """The findings, with a proof where one is due; call it on every rank, outside ``observer.borrowed``.

    Every rank generates its share of the captions, and the main one compares. What a prompt probe has just generated
    from a caption is not sampled again. What fails costs the proofs of this event, on every rank, and nothing else.

    Args:
        observations: of this event, also of controls: their pictures are what comes by chance.
        copied: names of probes that are known to be copied, see ``due``.
    """
    ranks, wanted = observer.ranks, due(findings, observer.config, copied)
    if not wanted or any(map(faults.is_off, (PROVING, COMPARING))):
        return tuple(findings)
    seeds, main = NUM_SEEDS, ranks.accelerator.is_main_process
    captions = Counter(observer.caption_of(f.observation.probe) for f in wanted if f.observation.probe.is_reference)
    counts = {caption: seeds * times for caption, times in captions.items()}
    there = drawn_already(observations, counts, observer.caption_of)
    share = ranks.share([(caption, count) for caption, count in counts.items() if caption not in there])

    def generate() -> tuple[list[tuple[str, np.ndarray]], dict[str, np.ndarray]]:
        with observer.borrowed():
            made = [(caption, observer.generate(caption, count)) for caption, count in share]
            return made, observer.pictures() if main else {}

    with suppress(PartError):
        mine, pictures = ranks.together(PROVING, faults, generate)
        generated = there | dict(ranks.gather(mine))

        def compare() -> dict[str, Proof]:
            if not main:
                return {}
            return proofs_of(wanted, findings, observations, generated, pictures, observer.caption_of)

        proofs = ranks.broadcast(ranks.together(COMPARING, faults, compare))
        return tuple(replace(f, proof=proofs.get(f.name)) for f in findings)
    return tuple(findings)


def due(findings: Iterable[Finding], config: MemWatchConfig, copied: Collection[str] = ()) -> list[Finding]:
    """Those that are to be proved, worst first: what newly became suspicious or memorized, and has a region.

    With ``stop.require_copy`` also what is memorized, and not known to be ``copied``, since the stop waits for it. The
    limit is on what has to be sampled; a prompt probe's generations are there, and it takes two of them.
    """
    if not config.proof.enabled:
        return []
    waits = config.stop.enabled and config.stop.require_copy

    def is_due(f: Finding) -> bool:
        awaited = waits and f.verdict is Verdict.MEMORIZED and f.name not in copied
        is_news = f.is_alert and f.verdict.is_evidence
        return (is_news or awaited) and bool(f.regions)

    worst = sorted(filter(is_due, findings), key=lambda f: (f.verdict is not Verdict.MEMORIZED, -f.severity))
    references = [f for f in worst if f.observation.probe.is_reference][:MAX_PROBES]
    drawn = [f for f in worst if f.observation.generations is not None and len(f.observation.generations) > 1]
    return references + drawn


def drawn_already(
    observations: Iterable[Observation], counts: Mapping[str, int], caption_of: Callable[[Probe], str]
) -> dict[str, np.ndarray]:
    """By caption, what a prompt probe has generated from it at this event, where ``counts`` asks for no more."""
    drawn = {caption_of(o.probe): o.generations for o in observations if o.generations is not None}
    return {c: drawn[c][:count] for c, count in counts.items() if c in drawn and len(drawn[c]) >= count}


def proofs_of(
    wanted: Sequence[Finding],
    findings: Sequence[Finding],
    observations: Sequence[Observation],
    generated: Mapping[str, np.ndarray],
    pictures: Mapping[str, np.ndarray],
    caption_of: Callable[[Probe], str],
) -> dict[str, Proof]:
    """A proof by name for every one of ``wanted``.

    Args:
        findings: of all watched probes.
        observations: of all probes.
        generated: by caption, RGB uint8 ``(n, H, W, 3)``.
        pictures: by name, the images of all reference probes as the autoencoder gives them back.
        caption_of: what a probe is generated from.
    """
    drawn = {o.name: o.generations for o in observations if o.generations is not None}
    known = {o.name for o in observations}
    shown = {name: picture[None] for name, picture in pictures.items() if name in known}
    pool = Pool.of(shown | drawn, {o.name for o in observations if o.probe.is_control})
    proofs = {}
    for f in wanted:
        caption = caption_of(f.observation.probe)
        made = drawn[f.name] if f.name in drawn else generated[caption]
        # what prompt probes draw from this caption is no chance: it may be these very generations
        chance = pool.without({o.name for o in observations if o.name in drawn and caption_of(o.probe) == caption})
        found = {f.name: compared(f, made, chance)}
        for other in findings:  # a generation may copy another image of the same caption
            probe = other.observation.probe
            if other.name != f.name and probe.is_reference and caption_of(probe) == caption:
                found[other.name] = compared(other, made, chance)
        ratios, num_others = found[f.name]
        copies = tuple(
            tuple(name for name, (of_probe, _) in found.items() if of_probe[i] < COPY) for i in range(len(made))
        )
        proofs[f.name] = Proof(made, tuple(ratios), copies, num_others)
    return proofs


def compared(finding: Finding, generations: np.ndarray, pool: Pool) -> tuple[list[float], int]:
    """The generations' ratios to one probe inside its region, and with how many other probes they were compared.

    A probe without a region is compared as a whole.
    """
    made, name = comparable(generations), finding.name
    size = made.shape[1], made.shape[2]
    mask = np.ones(size, dtype=bool) if not finding.regions else mask_at(core_of(finding), size)
    is_reference = finding.observation.probe.is_reference
    targets = pool.whole[name] if is_reference else made
    others, num_others = pool.others(name, targets, mask)
    ratios = copy_ratios(targets[0], made, others, mask) if is_reference else sibling_ratios(made, others, mask)
    return ratios, num_others


def core_of(finding: Finding) -> np.ndarray:
    """The core of the region that decides, bool ``(h, w)`` on the grid of latents.

    A region ends in the middle of a smooth slope, so that its rim is in part what every picture has anew. The core is
    where the map reaches ``CORE`` of the region's own peak.
    """
    assert finding.labels is not None
    assert finding.signals is not None
    assert finding.signals.decisive is not None
    inside, values = finding.labels == 1, finding.signals.decisive.mean.numpy()
    core: np.ndarray = inside & (values >= CORE * np.quantile(values[inside], PEAK))
    return core
