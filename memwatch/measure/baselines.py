"""Baselines: which earlier event a probe is compared with, and what is kept of earlier events to do so.

Reference probes are looked at under the same noise at every event, so what was measured then is enough: the *ledger*.
The noisy latents of prompt probes move with the model, so they need the earlier *weights*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from memwatch.config import SignalsConfig, SnapshotsConfig
from memwatch.faults import Faults
from memwatch.measure.measurement import Measurement, Observation, from_tensors, to_tensors
from memwatch.measure.probes import Probe
from memwatch.measure.snapshots import SnapshotStore
from memwatch.ranks import Ranks


def choose_baseline(signals: SignalsConfig, steps: Sequence[int], last_clean: int | None = None) -> int | None:
    """The step of the configured baseline; ``None`` before there is one, and for weights from outside the run.

    Args:
        signals: ``baseline`` is ``first``, ``previous``, ``lag:N``, ``last_clean``, ``base`` or ``path:FILE``.
        steps: of earlier events, smallest first.
        last_clean: of the last event in which the probe raised no suspicion.

    Where the wanted event is missing, the first one stands in for it.

    >>> choose_baseline(SignalsConfig(baseline="lag:2"), [0, 500, 1000])
    500
    >>> choose_baseline(SignalsConfig(baseline="lag:9"), [0, 500, 1000])
    0
    """
    kind, argument = signals.baseline_parts
    if signals.baseline_is_fixed or not steps:
        return None
    if kind == "last_clean":
        return last_clean if last_clean in steps else steps[0]
    back = {"first": len(steps), "previous": 1}.get(kind) or int(argument)
    return steps[-back] if back <= len(steps) else steps[0]


class Baselines:
    """Keeps what earlier events left behind, and chooses from it.

    Args:
        signals: names the baseline.
        ledger: of measurements.
        weights: of trainable tensors; prompt probes only.
        fixed_weights: what ``base`` and ``path:FILE`` mean, read when it is needed.
    """

    def __init__(
        self,
        signals: SignalsConfig,
        ledger: SnapshotStore,
        weights: SnapshotStore,
        fixed_weights: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self.signals, self.ledger, self.weights = signals, ledger, weights
        self._fixed_weights = fixed_weights
        self._fixed: dict[str, Measurement] = {}  # of reference probes against weights from outside: never change

    def step_of(self, probe: Probe, last_clean: int | None) -> int | None:
        """See ``choose_baseline``."""
        store = self.ledger if probe.is_reference else self.weights
        return choose_baseline(self.signals, store.steps, last_clean)

    def recall(self, probe: Probe, step: int | None) -> Measurement | None:
        """What was measured on a reference probe at that step; ``None`` where only a second look can tell."""
        if probe.name in self._fixed:
            return self._fixed[probe.name]
        return from_tensors(self.ledger.get(step), probe.name) if probe.is_reference and step is not None else None

    def needs_weights(self, probe: Probe, step: int | None) -> bool:
        """Whether the model must be looked at again with earlier weights."""
        if self.signals.baseline_is_fixed:
            return probe.name not in self._fixed
        return not probe.is_reference and step is not None

    def weights_at(self, step: int | None) -> Mapping[str, Tensor]:
        """The weights of a step, or those from outside the run."""
        return self._fixed_weights() if step is None else self.weights.get(step)

    def keep(self, probe: Probe, step: int | None, measurement: Measurement) -> None:
        """Remember what a reference probe reads against weights from outside the run."""
        if step is None and probe.is_reference:
            self._fixed[probe.name] = measurement

    def remember(
        self,
        step: int,
        observations: Sequence[Observation],
        read_weights: Callable[[], dict[str, Tensor]],
        faults: Faults,
    ) -> None:
        """This event becomes a baseline of later ones, unless its output was not finite."""
        finite = [o for o in observations if o.now.finite]
        instead = "what it holds is kept in memory"
        if measured := {o.name: o.now for o in finite if o.probe.is_reference}:
            with faults.surviving("writing the ledger", instead):
                self.ledger.add(step, to_tensors(measured))
        if any(not o.probe.is_reference for o in finite) and not self.signals.baseline_is_fixed:
            with faults.surviving("writing the weights of this event", instead):
                self.weights.add(step, read_weights())

    def state_dict(self) -> dict[str, Any]:
        """The steps that are kept; the tensors lie on disk."""
        return {"ledger": self.ledger.protect(), "weights": self.weights.protect()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on with these steps. Returns whether everything is still there."""
        self.ledger.resume(state["ledger"])
        self.weights.resume(state["weights"])
        return bool(self.ledger.steps == state["ledger"] and self.weights.steps == state["weights"])


def open_stores(folder: Path, snapshots: SnapshotsConfig, ranks: Ranks) -> tuple[SnapshotStore, SnapshotStore]:
    """The ledger and the weights below ``folder``."""
    writes_ledger = ranks.accelerator.is_local_main_process
    ledger = SnapshotStore(folder / "ledger", snapshots.keep, in_memory=True, writes=writes_ledger)
    weights = ranks.weights_folder(folder / "snapshots") if snapshots.on_disk else None
    return ledger, SnapshotStore(weights, snapshots.keep, writes=ranks.writes_weights)
