"""Calibration: what chance alone shows. The null distribution comes from held-out controls, measured at every event."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Null:
    """The null distribution of one event.

    Attributes:
        statistics: one per control, its maximum over levels and regions; smallest first.
    """

    statistics: tuple[float, ...]

    @classmethod
    def of(cls, statistics: Iterable[float]) -> Null:
        """The distribution of ``statistics``. Those that are not finite are left out."""
        return cls(tuple(sorted(x for x in statistics if math.isfinite(x))))

    def p_value(self, x: float) -> float | None:
        """``p = (1 + #{controls >= x}) / (1 + N)`` (Phipson & Smyth 2010); ``None`` without controls.

        It is valid for a maximum over levels and regions, because every control's statistic is that same maximum.

        >>> Null.of([0.1, 0.2, 0.4]).p_value(0.3)
        0.5
        """
        if not self.statistics:
            return None
        return (1 + sum(control >= x for control in self.statistics)) / (1 + len(self.statistics))

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that N controls can give: ``1 / (1 + N)``; 1 without controls."""
        return 1 / (1 + len(self.statistics))


def expected_false_alarms(num_probes: int, max_p: float) -> float:
    """How many probes pass ``p <= max_p`` by chance in one event, at most, when none is memorized; before patience."""
    return num_probes * max_p
