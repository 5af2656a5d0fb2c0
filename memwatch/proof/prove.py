"""Proof by generation: does the caption of a suspicious or memorized probe bring out a copy of its region?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from memwatch.config import MemWatchConfig
from memwatch.faults import Faults, PartError
from memwatch.judge.copied import COPY, Proof
from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.measure.measurement import Observation
from memwatch.measure.observer import Observer
from memwatch.measure.probes import Probe
from memwatch.proof.copies import (
    Pool,
    comparable,
    copy_ratios,
    grade_of,
    mask_at,
    sibling_grade,
    sibling_ratios,
    uncopied,
)

NUM_SEEDS = 4  # generations per probe; probes with the same caption share theirs
MAX_PROBES = 4  # per event, the worst first
PEAK = 0.98  # the quantile that stands for a region's peak, so that one odd pixel does not move it
CORE = 0.8  # share of a region's peak, on the log scale: what surely belongs to the region
PROVING, COMPARING = "proof by generation", "comparing generations with images"


def prove(
    findings: Sequence[Finding],
    observations: Sequence[Observation],
    observer: Observer,
    faults: Faults,
    copied: Collection[str] = (),
) -> tuple[Finding, ...]:
    """The findings, with a proof where one is due; call it on every rank, outside ``observer.borrowed``.

    Every rank generates its share of the captions, and the main rank compares. What a prompt probe has just generated
    from a caption is not sampled again. A failure costs the proofs of this event, on every rank, and nothing else.

    Args:
        observations: of this event. Other pictures, those of controls included, show what is alike by chance.
        copied: names of probes that are known to be copied, see ``due``.
    """
    ranks, wanted = observer.ranks, due(findings, observer.config, copied)
    if not wanted or any(map(faults.is_off, (PROVING, COMPARING))):
        return tuple(findings)
    caption_of, main = observer.caption_of, ranks.accelerator.is_main_process
    captions = Counter(caption_of(f.observation.probe) for f in wanted if f.observation.probe.is_reference)
    counts = {caption: NUM_SEEDS * times for caption, times in captions.items()}
    drawn = {caption_of(o.probe): o.generations for o in observations if o.generations is not None}
    there = {c: drawn[c][:count] for c, count in counts.items() if c in drawn and len(drawn[c]) >= count}
    share = ranks.share([(caption, count) for caption, count in counts.items() if caption not in there])

    def generate() -> tuple[list[tuple[str, np.ndarray]], dict[str, np.ndarray]]:
        with observer.borrowed():
            made = [(caption, observer.generate(caption, count)) for caption, count in share]
            return made, observer.pictures() if main else {}

    with suppress(PartError):
        mine, pictures = ranks.together(PROVING, faults, generate)
        generated = there | dict(ranks.gather(mine))

        def compare() -> dict[str, Proof]:
            return proofs_of(wanted, findings, observations, generated, pictures, caption_of) if main else {}

        proofs = ranks.broadcast(ranks.together(COMPARING, faults, compare))
        return tuple(replace(f, proof=proofs.get(f.name)) for f in findings)
    return tuple(findings)


def due(findings: Iterable[Finding], config: MemWatchConfig, copied: Collection[str] = ()) -> list[Finding]:
    """The findings to be proved, worst first: those that newly became suspicious or memorized, and have a region.

    With ``stop.require_copy`` also those that are memorized and not known to be ``copied``, since the stop waits for a
    copy. ``MAX_PROBES`` limits what has to be sampled. Prompt probes have their generations; a proof takes two of them.
    """
    if not config.proof.enabled:
        return []
    waits = config.stop.enabled and config.stop.require_copy

    def is_due(f: Finding) -> bool:
        awaited = waits and f.verdict is Verdict.MEMORIZED and f.name not in copied
        return bool(f.regions) and (awaited or (f.is_alert and f.verdict.is_evidence))

    worst = sorted(filter(is_due, findings), key=lambda f: (f.verdict is not Verdict.MEMORIZED, -f.severity))
    references = [f for f in worst if f.observation.probe.is_reference][:MAX_PROBES]
    drawn = [f for f in worst if f.observation.generations is not None and len(f.observation.generations) > 1]
    return references + drawn


def proofs_of(
    wanted: Sequence[Finding],
    findings: Sequence[Finding],
    observations: Sequence[Observation],
    generated: Mapping[str, np.ndarray],
    pictures: Mapping[str, np.ndarray],
    caption_of: Callable[[Probe], str],
) -> dict[str, Proof]:
    """By name, the proofs of ``wanted``.

    Args:
        findings: of all watched probes.
        observations: of all probes.
        generated: by caption, RGB uint8 ``(n, H, W, 3)``.
        pictures: by name, the images of all reference probes as the autoencoder decodes them.
        caption_of: what a probe is generated from.
    """
    drawn = {o.name: o.generations for o in observations if o.generations is not None}
    shown = {o.name: pictures[o.name][None] for o in observations if o.name in pictures}
    pool = Pool.of(shown | drawn, {o.name for o in observations if o.probe.is_control})
    made_from = {**{caption_of(o.probe): drawn[o.name] for o in observations if o.name in drawn}, **generated}
    small, proofs = {caption: comparable(made) for caption, made in made_from.items()}, {}
    for f in wanted:
        caption = caption_of(f.observation.probe)
        elsewhere = [made for other, made in small.items() if other != caption]
        made = drawn[f.name] if f.name in drawn else generated[caption]
        # not by chance alike: what prompt probes generated from this caption, perhaps these very pictures
        chance = pool.without({o.name for o in observations if o.name in drawn and caption_of(o.probe) == caption})
        found = {f.name: compared(f, made, chance, elsewhere)}
        for other in findings:  # a generation may copy another image of the same caption
            probe = other.observation.probe
            if other.name != f.name and probe.is_reference and caption_of(probe) == caption:
                found[other.name] = compared(other, made, chance, elsewhere)
        ratios, num_others, grade = found[f.name]
        copies = tuple(tuple(n for n, (of_n, *_) in found.items() if of_n[i] < COPY) for i in range(len(made)))
        proofs[f.name] = Proof(made, tuple(ratios), copies, num_others, grade)
    return proofs


def compared(
    finding: Finding, generations: np.ndarray, pool: Pool, elsewhere: Sequence[np.ndarray]
) -> tuple[list[float], int, float | None]:
    """The generations' ratios to one probe inside its region, the number of other probes compared with, and the grade.

    A probe without a region is compared as a whole.

    Args:
        elsewhere: ``comparable`` generations of other captions. Those that do not copy the probe say what is alike by
            chance in the grade; where there are none, the pool's views do.
    """
    made, name = comparable(generations), finding.name
    size = made.shape[1], made.shape[2]
    mask = np.ones(size, dtype=bool) if not finding.regions else mask_at(core_of(finding), size)
    is_reference = finding.observation.probe.is_reference
    targets = pool.whole[name] if is_reference else made
    others, num_others = pool.others(name, targets, mask)
    chance = uncopied(targets, np.concatenate(elsewhere), others, mask) if elsewhere else others
    chance = chance if len(chance) else others
    if is_reference:
        return copy_ratios(targets[0], made, others, mask), num_others, grade_of(targets[0], made, chance, mask)
    return sibling_ratios(made, others, mask), num_others, sibling_grade(made, chance, mask)


def core_of(finding: Finding) -> np.ndarray:
    """The core of the strongest region, bool ``(h, w)`` on the grid of latents.

    A region ends in the middle of a smooth slope, and its rim is not stored in full. The core is where the map reaches
    ``CORE`` of the region's own peak.
    """
    if finding.labels is None or finding.signals is None or finding.signals.heatmap is None:
        raise ValueError(f"{finding.name} has no region")
    inside, values = finding.labels == 1, finding.signals.heatmap.mean.numpy()
    core: np.ndarray = inside & (values >= CORE * np.quantile(values[inside], PEAK))
    return core
