"""Baselines: which earlier event a probe is compared with, and what is kept of earlier events to do so.

Reference probes are looked at under the same noise at every event, so what was measured then is enough: the *ledger*.
The noisy latents of prompt probes move with the model, so they need the earlier *weights*. Both carry a fingerprint for
each probe, so that measurements under other settings, of another probe or of another run are never compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from memwatch.config import SignalsConfig
from memwatch.faults import Faults
from memwatch.measure.measurement import (
    SCREEN,
    UNCONDITIONAL,
    Measurement,
    Observation,
    from_tensors,
    tensor_names,
    to_tensors,
)
from memwatch.measure.probes import Probe
from memwatch.measure.snapshots import SnapshotStore
from memwatch.measure.weights import kept_on_disk
from memwatch.ranks import Ranks

KEEP_EVENTS = 4  # of the latest, that stay usable as baselines beside the first one


def choose_baseline(signals: SignalsConfig, steps: Sequence[int], last_clean: int | None = None) -> int | None:
    """The step of the configured baseline; ``None`` before there is one, and for weights from outside the run.

    Where the wanted one of the earlier ``steps`` is missing, the first stands in for it. ``last_clean``: of the last
    event in which the probe raised no suspicion.
    """
    kind, argument = signals.baseline_parts
    if signals.baseline_is_fixed or not steps:
        return None
    if kind == "last_clean":
        return last_clean if last_clean in steps else steps[0]
    back = {"first": len(steps), "previous": 1}.get(kind) or int(argument)
    return steps[-back] if back <= len(steps) else steps[0]


def open_stores(folder: Path, ranks: Ranks) -> tuple[SnapshotStore, SnapshotStore]:
    """The ledger, written once per machine, and the weights below ``folder``."""
    ledger = SnapshotStore(folder / "ledger", KEEP_EVENTS, writes=ranks.accelerator.is_local_main_process)
    return ledger, SnapshotStore(ranks.weights_folder(folder / "snapshots"), KEEP_EVENTS, writes=ranks.writes_weights)


class Baselines:
    """Keeps what earlier events left behind, and chooses from it what may be compared.

    Args:
        ledger: of measurements. weights: of trainable tensors.
        fixed_weights: what ``base`` and ``path:FILE`` mean, read when it is needed.
        fingerprints: see ``measurement.fingerprints``. Only what was kept under the same one, and by a run of the same
            id ``run``, is compared.
    """

    def __init__(
        self,
        signals: SignalsConfig,
        ledger: SnapshotStore,
        weights: SnapshotStore,
        fixed_weights: Callable[[], Mapping[str, Tensor]],
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        self.signals, self.ledger, self.weights, self.run = signals, ledger, weights, ""
        self._fixed_weights, self._fingerprints = fixed_weights, fingerprints or {}
        # of reference probes against weights from outside, by name and whether with curvature: they never change
        self._fixed: dict[tuple[str, bool], dict[str, Tensor]] = {}

    def _mark(self, name: str) -> str:
        return f"{self.run}/{self._fingerprints.get(name, '')}"

    def _fits(self, store: SnapshotStore, step: int, name: str) -> bool:
        return store.mark(step, name) == self._mark(name)

    def _steps(self, probe: Probe) -> list[int]:
        """The kept events that a probe may be compared with, smallest first.

        What was screened then must have left the weights as well, since its curvature may be asked for later.
        """
        name, steps = probe.name, {*self.weights.steps, *self.ledger.steps}
        has_weights = {s for s in steps if self.weights.has(s) and self._fits(self.weights, s, name)}
        if not probe.is_reference or probe.in_rotation:
            return [s for s in self.weights.steps if s in has_weights]
        fitting = {s for s in steps if self._fits(self.ledger, s, name)}
        fitting |= {s for s in has_weights if self._fits(self.ledger, s, name + SCREEN)}
        return [s for s in self.ledger.steps if s in fitting and self.ledger.has(s)]

    def step_of(self, probe: Probe, last_clean: int | None) -> int | None:
        """See ``choose_baseline``."""
        return choose_baseline(self.signals, self._steps(probe), last_clean)

    def recall(self, probe: Probe, step: int | None, *, curvature: bool = True) -> list[Measurement | None]:
        """What was measured on a reference probe at that step, or by the screen then, with the prompt and without it.

        It is ``None`` where the model must be looked at again, with the weights of that step.
        """
        if (probe.name, curvature) in self._fixed:
            kept = {name: tensor.clone() for name, tensor in self._fixed[probe.name, curvature].items()}
            return [from_tensors(kept, probe.name), from_tensors(kept, probe.name + UNCONDITIONAL)]
        if not probe.is_reference or step is None:
            return [None, None]
        end = "" if curvature else SCREEN
        names = [name + end for name in (probe.name, probe.name + UNCONDITIONAL)]
        fitting = [name if self._fits(self.ledger, step, name) else None for name in names]
        kept = self.ledger.read(step, [each for name in fitting if name is not None for each in tensor_names(name)])
        return [None if name is None else from_tensors(kept, name) for name in fitting]

    def weights_at(self, step: int | None) -> Mapping[str, Tensor]:
        """The weights of a step, or those from outside the run."""
        return self._fixed_weights() if step is None else self.weights.get(step)

    def keep(self, probe: Probe, step: int | None, measurement: Measurement, without: Measurement | None) -> None:
        """Remember what a reference probe reads, with its prompt and without, by weights from outside the run."""
        if step is None and probe.is_reference:
            found = {probe.name: measurement} | ({} if without is None else {probe.name + UNCONDITIONAL: without})
            self._fixed[probe.name, measurement.rho is not None] = kept_on_disk(to_tensors(found), self.ledger.folder)

    def remember(
        self,
        step: int,
        observations: Sequence[Observation],
        read_weights: Callable[[], dict[str, Tensor]],
        faults: Faults,
        rotation: Sequence[str] = (),
    ) -> None:
        """This event becomes a baseline of later ones, unless its output was not finite.

        With the baseline ``first`` only what has none yet is kept. What was measured under earlier weights is kept as
        part of that earlier event. Rows in ``rotation`` need the weights of the first event later.
        """
        if self.signals.baseline_is_fixed:
            return
        rotation = [] if self.weights.steps else rotation
        only_new = self.signals.baseline_parts[0] == "first"
        kept = [o for o in observations if o.now.finite and not (only_new and o.baseline is not None)]
        references = [o for o in kept if o.probe.is_reference]
        full = {o.name for o in references if o.has_curvature}
        needed = [o.name for o in kept if o.name not in full]
        instead = "what it holds is kept in memory"
        if measured := _measured_now(references):
            with faults.surviving("writing the ledger", instead):
                self.ledger.add(step, to_tensors(measured), {name: self._mark(name) for name in measured})
        if needed or rotation:
            with faults.surviving("writing the weights of this event", instead):
                self.weights.add(step, read_weights(), {name: self._mark(name) for name in (*needed, *rotation)})
        with faults.surviving("writing the ledger", instead):
            self._complete(observations)

    def _complete(self, observations: Sequence[Observation]) -> None:
        """Add to earlier events of the ledger what was measured of them only now, under their weights."""
        late: dict[int, dict[str, Measurement]] = {}
        for o in observations:
            earlier, step = o.baseline, o.baseline_step
            if not o.probe.is_reference or earlier is None or step not in self.ledger.steps:
                continue
            if earlier.rho is not None and earlier.finite and not self._fits(self.ledger, step, o.name):
                entry = late.setdefault(step, {})
                entry[o.name] = earlier
                if o.unconditional_baseline is not None:
                    entry[o.name + UNCONDITIONAL] = o.unconditional_baseline
        for step, measured in late.items():
            self.ledger.extend(step, to_tensors(measured), {name: self._mark(name) for name in measured})

    def state_dict(self) -> dict[str, Any]:
        """The steps that are kept; the tensors lie on disk."""
        return {"ledger": self.ledger.protect(), "weights": self.weights.protect()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on with these steps. Returns whether everything is still there."""
        self.ledger.resume(state["ledger"])
        self.weights.resume(state["weights"])
        return bool(self.ledger.steps == state["ledger"] and self.weights.steps == state["weights"])

    def without_earlier(self, probes: Iterable[Probe]) -> list[str]:
        """The names of those that may be compared with nothing that is kept, although something is kept."""
        if self.signals.baseline_is_fixed:
            return []
        kept = {True: self.ledger.steps, False: self.weights.steps}
        return [probe.name for probe in probes if kept[probe.is_reference] and not self._steps(probe)]


def _measured_now(observations: Sequence[Observation]) -> dict[str, Measurement]:
    """What was measured on the current model; ``UNCONDITIONAL`` without the prompt, ``SCREEN`` forward only."""
    found: dict[str, Measurement] = {}
    for o in observations:
        end = "" if o.has_curvature else SCREEN
        found[o.name + end] = o.now
        if o.unconditional is not None and o.unconditional.finite:
            found[o.name + UNCONDITIONAL + end] = o.unconditional
    return found
