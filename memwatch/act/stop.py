"""Stop: whether training ends, by a pure function of state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memwatch.config import StopConfig
from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.messages import counted

EXIT_CODE = 3  # of scripts and commands: training is to end, or something is memorized


@dataclass(frozen=True)
class StopState:
    """What the stop rule remembers between events.

    Attributes:
        reason: why training is to end; set once and never taken back.
        copied: names of the probes that a generation has copied so far.
    """

    reason: str | None = None
    copied: Sequence[str] = ()


def decide_stop(state: StopState, findings: Sequence[Finding], step: int, rule: StopConfig) -> StopState:
    """The next state, after the ``findings`` of one event; it has a ``reason`` when training is to end."""
    if state.reason is not None or not rule.enabled:
        return state
    now = [f.name for f in findings if f.proof is not None and f.proof.copied]
    copied = tuple(dict.fromkeys([*state.copied, *now]))
    memorized = [f for f in findings if f.verdict is Verdict.MEMORIZED]
    titles = [f.observation.probe.title for f in memorized if f.name in copied or not rule.require_copy]
    if len(titles) < rule.num_probes:
        return StopState(copied=copied)
    return StopState(f"step {step}: {counted(len(titles), 'probe')} memorized: {', '.join(titles)}", copied)
