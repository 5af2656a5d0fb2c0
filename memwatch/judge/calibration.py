"""What chance alone shows: the null distribution from held-out controls, looked at again at every event."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Null:
    """Statistics of the controls at one event: for each its maximum over levels and regions."""

    statistics: tuple[float, ...]

    @classmethod
    def of(cls, statistics: Iterable[float]) -> Null:
        """Controls whose look was not finite are left out."""
        return cls(tuple(sorted(x for x in statistics if math.isfinite(x))))

    def p_value(self, x: float) -> float | None:
        """``p = (1 + #{controls >= x}) / (1 + N)`` (Phipson & Smyth 2010); ``None`` without controls.

        Valid for a maximum over levels and regions because every control's statistic is that same maximum.
        """
        if not self.statistics:
            return None
        return (1 + sum(control >= x for control in self.statistics)) / (1 + len(self.statistics))

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that N controls can give: ``1 / (1 + N)``; 1 without controls."""
        return 1 / (1 + len(self.statistics))


def expected_false_alarms(num_probes: int, max_p: float) -> float:
    """Probes that pass ``p <= max_p`` in one event by chance when none is memorized (upper bound, before patience)."""
    return num_probes * max_p
