"""Audit: the whole rule, patience included, run on every control against the others.

By exchangeability a control is called as often as a probe of which nothing is stored. So the audit estimates the rate
of false alarms of this very run, without assumptions, and it can contradict what was promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memwatch.config import AlertsConfig
from memwatch.judge.alerts import ProbeState
from memwatch.judge.calibration import contradicts, upper_bound


class Judged(Protocol):
    """A control after this event."""

    @property
    def state(self) -> ProbeState: ...

    @property
    def p(self) -> float | None: ...


@dataclass(frozen=True)
class Audit:
    """What the rule said of the controls so far.

    Attributes:
        called: controls that were called memorized at any event so far.
        of: controls that were judged.
        promised: the rate that the promise allows for each of them, in a whole run.
        rarest_p: the smallest p-value that a called control has at this event. By exchangeability the rarest of all
            that is called is as likely to be any control as any probe of which nothing is stored.
    """

    called: int = 0
    of: int = 0
    promised: float = 0.0
    rarest_p: float = 1.0

    @property
    def at_most(self) -> float:
        """The largest rate of false alarms per probe and run that this leaves plausible, at 95 % confidence."""
        return upper_bound(self.called, self.of) if self.of else 1.0

    @property
    def contradicts(self) -> bool:
        """Whether more controls were called than the promise allows."""
        return contradicts(self.called, self.of, self.promised)

    def __str__(self) -> str:
        if not self.of:
            return "no controls could be audited"
        return f"{self.called} of {self.of} controls called; at most {100 * self.at_most:.0f} % at 95 % confidence"


def audit_of(controls: Sequence[Judged], num_probes: int, rule: AlertsConfig) -> Audit:
    """What the rule has said of these controls up to this event.

    Args:
        num_probes: that share the run's budget; each may be called with an equal part of the promised probability.
    """
    called = [control.p for control in controls if control.state.called]
    rarest = min((p for p in called if p is not None), default=1.0)
    return Audit(len(called), len(controls), rule.false_alarms_per_run / num_probes, rarest)
