"""Audit: the whole rule, patience included, run on every control against the others.

By exchangeability a control is called as often as a probe of which nothing is stored. So the audit estimates the rate
of false alarms of this very run, without assumptions, and it can contradict what was promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memwatch.judge.alerts import ProbeState
from memwatch.judge.calibration import upper_bound


class Judged(Protocol):
    """A control after this event."""

    @property
    def state(self) -> ProbeState: ...


@dataclass(frozen=True)
class Audit:
    """What the rule said of the controls so far.

    Attributes:
        called: controls that were called memorized at any event so far.
        of: controls that were judged.
        rarest_p: the smallest p-value at which a control was called; 1 where none was.
    """

    called: int = 0
    of: int = 0
    rarest_p: float = 1.0

    @property
    def at_most(self) -> float:
        """The largest rate of false alarms per probe and run that this leaves plausible, at 95 % confidence."""
        return upper_bound(self.called, self.of) if self.of else 1.0

    @property
    def largest_p(self) -> float:
        """The p-value that a probe may have at most to be called all the same.

        A called control contradicts the promise: p-values are not what they say. What they still give is an order, in
        which nothing stored is as likely to be the rarest as any control is. So a probe needs twice the called
        control's evidence (the square of its p-value). Where evidence, ``-log p``, has an exponential tail, a probe
        comes to twice the largest of N by chance with probability ``2 / ((N + 1)(N + 2))``.
        """
        return self.rarest_p**2

    def __str__(self) -> str:
        if not self.of:
            return "no controls could be audited"
        return f"{self.called} of {self.of} controls called; at most {100 * self.at_most:.0f} % at 95 % confidence"


def audit_of(controls: Sequence[Judged]) -> Audit:
    """What the rule has said of these controls up to this event."""
    called = [control.state.rarest_p for control in controls if control.state.called]
    return Audit(len(called), len(controls), min(called, default=1.0))
