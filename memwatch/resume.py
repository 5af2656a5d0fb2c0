"""Resume: the progress of a run, and the small file that holds it in the checkpoints of accelerate."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

from memwatch.act.stop import StopState
from memwatch.faults import Faults, PartError
from memwatch.judge.verdict import ProbeState, Verdict
from memwatch.measure.baselines import Baselines
from memwatch.measure.probes import Probe
from memwatch.messages import listed
from memwatch.pace import Clock
from memwatch.ranks import Ranks
from memwatch.run_folder import write_json

logger = logging.getLogger("memwatch")

FIRST = "memwatch.json"
SAVING, READING = "saving memwatch's state in the checkpoint", "reading memwatch's state from the checkpoint"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        run: its id.
        last_step: of the last event; ``None`` before the first. events: how many there were.
        every_steps: optimizer steps between events, as memwatch chose them; ``None`` until then.
        states: by probe, what the judge remembers.
        has_entered: whether ``output_dir`` holds this run's files already. A checkpoint does not keep it.
        clock: seconds of training and of memwatch.
    """

    run: str
    last_step: int | None = None
    events: int = 0
    every_steps: int | None = None
    stop: StopState = StopState()  # noqa: RUF009  # frozen
    states: dict[str, ProbeState] = field(default_factory=dict)
    has_entered: bool = False
    clock: Clock = field(default_factory=Clock)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        states = {name: asdict(state) | {"verdict": str(state.verdict)} for name, state in self.states.items()}
        counted = {key: getattr(self, key) for key in ("run", "last_step", "events", "every_steps")}
        judged = {"stop": asdict(self.stop), "states": states}
        return counted | {"clock": self.clock.to_dict()} | judged

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Progress:
        """The inverse of ``to_dict``; other keys are ignored."""
        return cls(
            saved["run"],
            saved["last_step"],
            saved.get("events", 0),
            saved.get("every_steps"),
            StopState(**{k: v for k, v in saved["stop"].items() if k in StopState.__dataclass_fields__}),
            {name: _state_of(state) for name, state in saved["states"].items()},
            clock=Clock(**saved.get("clock", {})),
        )


def _state_of(saved: Mapping[str, Any]) -> ProbeState:
    known = {key: value for key, value in saved.items() if key in ProbeState.__dataclass_fields__}
    typed = {"verdict": Verdict(saved["verdict"]), "scores": tuple(saved.get("scores", ()))}
    return ProbeState(**(known | typed))


class Resumable(Protocol):
    """What has a state of plain values."""

    ranks: Ranks
    faults: Faults

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


_FILES: WeakKeyDictionary[Any, WeakKeyDictionary[Resumable, str]] = WeakKeyDictionary()  # by accelerator


def hook_checkpoints(watch: Resumable) -> Callable[[], None]:
    """Save ``watch`` with every ``accelerator.save_state``, load it with every ``load_state``; returns what ends that.

    The state is in ``memwatch.json`` (``memwatch_1.json`` for a second watch of the same accelerator). It is not
    registered for checkpointing, since accelerate refuses checkpoints with more or fewer objects than are registered.
    """
    accelerator, hooked = watch.ranks.accelerator, ref(watch)
    files = _FILES.setdefault(accelerator, WeakKeyDictionary())
    taken = set(files.values())
    name = next(name for i in range(len(taken) + 1) if (name := f"memwatch_{i}.json" if i else FIRST) not in taken)
    files[watch] = name

    def save_hook(models: Any, weights: Any, folder: str) -> None:
        if (alive := hooked()) is not None:
            save(alive, Path(folder) / name)

    def load_hook(models: Any, folder: str) -> None:
        if (alive := hooked()) is not None:
            load(alive, Path(folder) / name)

    saves = accelerator.register_save_state_pre_hook(save_hook)
    loads = accelerator.register_load_state_pre_hook(load_hook)

    def end() -> None:
        saves.remove()
        loads.remove()
        if (alive := hooked()) is not None:
            files.pop(alive, None)

    return end


def save(watch: Resumable, file: Path) -> None:
    """Write the state without waiting for other ranks: many scripts call ``save_state`` on the main process only."""
    accelerator = watch.ranks.accelerator
    on_each = accelerator.project_configuration.save_on_each_node
    writes = accelerator.is_local_main_process if on_each else accelerator.is_main_process
    with watch.faults.surviving(SAVING, "a run that resumes from it starts afresh"):
        state = watch.state_dict()  # on every rank: each drops the snapshots that only the last checkpoint needed
        if writes:
            write_json(file, state)


def load(watch: Resumable, file: Path) -> None:
    """Read the state on the main process, and resume from it on all ranks; from ``{}`` where there is none."""
    accelerator, state = watch.ranks.accelerator, {}
    with suppress(PartError):
        state = watch.ranks.together(READING, watch.faults, lambda: read(file) if accelerator.is_main_process else {})
    watch.load_state_dict(watch.ranks.broadcast(state))


def read(file: Path) -> dict[str, Any]:
    """The state in a file; ``{}`` where there is no file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def warn_of_baselines(baselines: Baselines, probes: Sequence[Probe], complete: bool, folder: str) -> None:
    """Warn of baselines that are missing, and of those that no longer fit.

    Args:
        complete: whether all that the checkpoint refers to is still in ``folder``.
    """
    if not complete:
        instead = "probes that need them are compared with a later event"
        logger.warning("some earlier baselines are missing from %s; %s", folder, instead)
    if names := baselines.without_earlier(probes):
        why = "settings or probes are not those of the checkpoint"
        what = "the next event is their new baseline; resume with those of the checkpoint to keep the earlier one"
        logger.warning("%s, so there is nothing to compare %s with; %s", why, listed(names), what)
