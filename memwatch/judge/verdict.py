"""The rule: from the numbers of one event to a verdict. Pure functions of state.

The whole rule, with all its constants:

1.  Map: logs of the factor (before + f) / (now + f) by which the denoising loss has fallen, f the mean loss of the
    controls before training: S since before training, N by the prompt, K without prompt (k0: the most on a control, 0.9
    quantile). min(S, N + relu(K - k0)) at each of two noise levels, and their mean.
2.  Take the means of its k largest pixels at 7 sizes k: all, a half, ... 1/64. z: how far such a mean lies above those
    of the controls of its kind, 11 or more, in units of sqrt(v (1 + 1/N)), at least 0.05; v: their variance, drawn to
    its mean over the sizes as if by 10 more controls. T is the largest z. A control is compared with the N - 1 others.
3.  p = 7 P(t > T), Student's t with N - 1 degrees of freedom.
4.  suspicious: p <= max_p (0.01). memorized: also p <= false_alarms_per_run (0.05) / (probes and rows per event x
    planned events, 100 if unknown) with T averaged over the last three events that looked at it (0 without), and S,
    filtered, of 1.5x over its largest 1/16. no evidence: larger. inconclusive: output that is not finite, nothing
    earlier to compare with, or too few controls. Without any controls: suspicious from a factor of 2 on.
5.  One draw per level judges all by the loss; what reaches T = 2.9, and all at each 8th event, four draws by the term.
Regions say where: components of the map after a 3x3 mean filter, from Otsu's threshold and 1.1x on, 1/64 or larger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from memwatch.measure.probes import MIN_CONTROLS

LASTING = 3  # events over which T is averaged: what is stored lasts, and what strays does not
MIN_SEVERITY = 1.5  # reduction factor: pictures that are seen as often as any other reach up to that, all of them
UNCALIBRATED_SEVERITY = 2.0  # reduction factor from which a probe is suspicious where there are no controls


class Verdict(StrEnum):
    """What the rule says of a probe at one event, see ``judge``."""

    MEMORIZED = "memorized"
    SUSPICIOUS = "suspicious"
    NO_EVIDENCE = "no evidence"
    INCONCLUSIVE = "inconclusive"

    @property
    def is_evidence(self) -> bool:
        """Whether it says that something may be stored: suspicious or memorized."""
        return self in (Verdict.SUSPICIOUS, Verdict.MEMORIZED)


@dataclass(frozen=True)
class Evidence:
    """The numbers of one probe at one event.

    Attributes:
        severity: reduction factor since the baseline, mean over the sixteenth of the picture where it is largest.
        p, z_score: p-value, and T; ``None`` without enough controls, and where nothing could be compared.
        lasting_p: p-value of the mean of T at this event and at the two before that looked at it, 0 without.
        num_controls: finite controls of the probe's own kind. any_controls: whether there are any of either kind.
        finite: whether every number was finite. compared: whether there was a baseline to compare with.
    """

    severity: float = 1.0
    p: float | None = None
    z_score: float | None = None
    lasting_p: float | None = None
    num_controls: int = 0
    any_controls: bool = False
    finite: bool = True
    compared: bool = True


@dataclass(frozen=True)
class ProbeState:
    """What is remembered of one probe between events.

    Attributes:
        since: step at which its evidence began; ``None`` without evidence at the last event.
        scores: T at the last events, the newest first. has_begun: whether the last event alone would do.
        highest: of a control, the largest score T so far.
        last_clean: step of the last event without evidence. verdict, finite: of the last event.
    """

    since: int | None = None
    scores: tuple[float, ...] = ()
    has_begun: bool = False
    highest: float | None = None
    last_clean: int | None = None
    verdict: Verdict = Verdict.INCONCLUSIVE
    finite: bool = True


def judge(state: ProbeState, evidence: Evidence, step: int, max_p: float, memorized_p: float) -> tuple[ProbeState, str]:
    """The probe's next state, which holds the verdict, and the reason in words, without effect and p-value.

    Args:
        max_p, memorized_p: the largest p-value of a suspicious and of a memorized probe.
    """
    unknown = replace(
        state,
        since=None,
        scores=(evidence.z_score, *state.scores)[:LASTING] if evidence.z_score is not None else (),
        has_begun=False,
        verdict=Verdict.INCONCLUSIVE,
        finite=evidence.finite,
    )
    if not evidence.finite:
        return unknown, "non-finite values in the model's output"
    if not evidence.compared:
        return unknown, "nothing earlier to compare with"
    clean = replace(unknown, last_clean=step, verdict=Verdict.NO_EVIDENCE)
    since = step if state.since is None else state.since
    suspicious = replace(unknown, since=since, verdict=Verdict.SUSPICIOUS)
    if not evidence.any_controls:
        if evidence.severity < UNCALIBRATED_SEVERITY:
            return clean, f"without controls a probe is suspicious from {UNCALIBRATED_SEVERITY:g}x on"
        return suspicious, "uncalibrated: there are no controls"
    if evidence.p is None:
        few = f"{evidence.num_controls} controls of its kind are usable, and a p-value takes {MIN_CONTROLS}"
        return unknown, few
    if evidence.p > max_p:
        return clean, "the controls show as much"
    is_large = evidence.severity >= MIN_SEVERITY
    suspicious = replace(suspicious, has_begun=is_large and evidence.p <= memorized_p)
    if evidence.lasting_p is None or evidence.lasting_p > memorized_p:
        over = "by the mean of three events" if evidence.p <= memorized_p else "which keeps the run's false-alarm rate"
        return suspicious, f"memorized takes p = {memorized_p:.1g}, {over}"
    if not is_large:
        return suspicious, f"memorized takes {MIN_SEVERITY:g}x, and this is {evidence.severity:.2f}x"
    return replace(suspicious, verdict=Verdict.MEMORIZED), f"evidence since step {since}"


def is_alert(before: ProbeState, after: ProbeState) -> bool:
    """Whether this event is news: the verdict became suspicious or memorized, or the output is no longer finite."""
    if not after.finite:
        return before.finite
    if after.verdict is Verdict.MEMORIZED:
        return before.verdict is not Verdict.MEMORIZED
    return after.verdict.is_evidence and not before.verdict.is_evidence
