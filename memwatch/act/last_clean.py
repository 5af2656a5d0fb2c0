"""Last clean: the latest weights saved before any probe met the memorized criteria, to roll back to."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from memwatch.act.formats import Part, write_parts
from memwatch.faults import Faults, PartError
from memwatch.judge.findings import Finding
from memwatch.judge.verdict import ProbeState, Verdict
from memwatch.measure.observer import Observer
from memwatch.measure.weights import averages, read_safetensors, write_safetensors
from memwatch.report.about import PACKAGES, versions
from memwatch.run_folder import write_json

logger = logging.getLogger("memwatch")

KEEPING, WRITING = "keeping the weights to roll back to", "writing the weights to roll back to"


def is_clean(states: Mapping[str, ProbeState], findings: Sequence[Finding]) -> bool:
    """Whether no watched probe meets the memorized criteria, and all output is finite. ``states``: after the event."""
    watched = [states.get(finding.name, finding.state) for finding in findings]
    return all(s.finite and not s.is_enough for s in watched)


def is_memorized(findings: Sequence[Finding]) -> bool:
    """Whether a watched probe is called memorized: from then on no later weights are good to roll back to."""
    return any(finding.verdict is Verdict.MEMORIZED for finding in findings)


class LastClean:
    """The latest weights saved before any probe met the memorized criteria, one file in ``output_dir/rollback``.

    They are what training changes: of the denoiser, its averages where MemWatch was given an ``ema``; and of the text
    encoders that it was given. Lives on every rank; the main process reads, writes and deletes.

    Args:
        folder: ``output_dir``; nothing is written there until the first clean event.

    Attributes:
        step: whose weights are kept; ``None`` where none are.
        unclean_since: step of the first event after it that was not clean; ``None`` where there is none, and so nothing
            to roll back to.
        final: whether something was memorized, so that nothing later is kept.
    """

    def __init__(self, observer: Observer, folder: Path, faults: Faults) -> None:
        self.ranks, self.pipeline, self._faults = observer.ranks, observer.denoiser.pipeline, faults
        self._is_main = bool(self.ranks.accelerator.is_main_process)
        self.folder, self._kept_in = folder / "last_clean", folder / "rollback"
        self._parts = parts_of(observer)
        self._trained: dict[str, set[str]] = {part.name: set() for part in self._parts}
        self.step: int | None = None
        self.unclean_since: int | None = None
        self.final = False
        self._written: int | None = None
        self._protected: int | None = None  # what the last checkpoint refers to
        self._ema, why = usable_ema(observer)
        if self.ranks.lockstep:
            why = f"rollback is off, because {self.ranks.sharding} holds the model in shards; to go back, use "
            why += "accelerate's checkpoints from before the step that the report names"
        if self._is_main and why:
            logger.warning("%s", why)

    # --- at each event -----------------------------------------------------------------------------------------------

    def note(self, step: int, clean: bool, *, final: bool = False) -> None:
        """Keep the weights of a clean event in place of those kept before; call it at each event, on every rank.

        Where that fails, those kept before stay. ``clean``, ``final``: see ``is_clean`` and ``is_memorized``.
        """
        if self.ranks.lockstep:
            return
        self.final = self.final or final
        if not clean or self.final:
            self.unclean_since = step if self.unclean_since is None else self.unclean_since
            return
        for part in self._parts:  # a script may train a part for some of its steps only
            self._trained[part.name] |= {name for name, p in part.network.named_parameters() if p.requires_grad}
        if any(self._trained.values()) and not self._faults.is_off(KEEPING):
            with suppress(PartError):
                self.ranks.together(KEEPING, self._faults, lambda: self._keep(step))
                self.step, self.unclean_since = step, None

    def _keep(self, step: int) -> None:
        """CPU copies of what is trained, as ``PART/PARAMETER``."""
        if not self._is_main:
            return
        found: dict[str, Tensor] = {}
        for i, part in enumerate(self._parts):
            now: dict[str, Tensor] = dict(part.network.named_parameters())
            now |= averages(part.network, self._ema) if i == 0 and self._ema is not None else {}
            for name in sorted(self._trained[part.name] & now.keys()):
                found[f"{part.name}/{name}"] = now[name].detach().to("cpu", copy=True)
        write_safetensors(self._file(step), found)
        self._delete_but(step, self._protected)

    def _file(self, step: int) -> Path:
        return self._kept_in / f"step_{step:07d}.safetensors"

    def _delete_but(self, *steps: int | None) -> None:
        """Delete what is kept of all other steps, also of a past that a resume has left."""
        known = {self._file(step) for step in steps if step is not None}
        for file in set(self._kept_in.glob("step_*.safetensors")) - known if self._is_main else ():
            with suppress(OSError):
                file.unlink()

    # --- at the end --------------------------------------------------------------------------------------------------

    def write(self) -> Path | None:
        """Write ``output_dir/last_clean``, as diffusers loads it, and say how; on every rank, again is safe.

        It waits for no other rank. Returns the folder; ``None`` where nothing is kept, writing failed, or there is no
        reason to roll back: then what was kept is deleted.
        """
        if self.ranks.lockstep or self.step is None:
            return None
        if self.unclean_since is None:
            self.step = None
            if self._is_main:
                shutil.rmtree(self._kept_in, ignore_errors=True)
            return None
        if not self._is_main or self._written == self.step:
            return self.folder
        with self._faults.surviving(WRITING, f"those of step {self.step} stay in {self._file(self.step)}"):
            how = self._write(self.step)
            self._written = self.step
            what = "the latest weights saved before any probe met the memorized criteria"
            since = f"since step {self.unclean_since} one does, or output is not finite"
            logger.warning("%s (step %d) are in %s; %s. To load them: %s", what, self.step, self.folder, since, how)
        return self.folder if self._written == self.step else None

    def _write(self, step: int) -> str:
        """The folder; ``memwatch.json`` in it comes last, and says that it is whole. Returns the line that loads it."""
        weights: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_safetensors(self._file(step)).items():
            part, _, parameter = name.partition("/")
            weights.setdefault(part, {})[parameter] = tensor
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            how = write_parts(self._parts, weights, self.pipeline, self.folder)
            about = {"step": step, "unclean_since": self.unclean_since, "ema": self._ema is not None}
            write_json(self.folder / "memwatch.json", about | {"load": how, "versions": versions((*PACKAGES, "peft"))})
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return how

    # --- resume ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values. The file of now outlasts newer ones until the next checkpoint."""
        self._protected = self.step
        if self.step is not None:
            self._delete_but(self.step)
        return {"step": self.step, "unclean_since": self.unclean_since, "final": self.final}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, on every rank; from an empty one afresh."""
        self.step, self.unclean_since = state.get("step"), state.get("unclean_since")
        self.final, self._written = bool(state.get("final", False)), None
        self._protected = self.step
        if self._is_main and self.step is not None and not self._file(self.step).is_file():
            what = f"the weights of step {self.step}, kept to roll back to, are missing from {self._kept_in}"
            logger.warning("%s; those of the next clean event are kept", what)
            self.step = None


def parts_of(observer: Observer) -> list[Part]:
    """The denoiser, and the text encoders that the caller passed."""
    denoiser, encoders = observer.denoiser, observer.text_encoders
    given = zip(denoiser.text_encoders, encoders, observer.parts.tokenizers, strict=False)  # not all need be given
    found = [Part(name, network, tokenizer) for name, network, tokenizer in given if network is not None]
    return [Part(denoiser.part, observer.model), *found]


def usable_ema(observer: Observer) -> tuple[Any, str]:
    """The averages that were given, or ``None``, and why they cannot be used, where they are of other tensors."""
    if (ema := observer.ema) is None:
        return None, ""
    averaged, parameters = len(ema.shadow_params), list(observer.model.parameters())
    trained = sum(p.requires_grad for p in parameters)
    if averaged in (len(parameters), trained):
        return ema, ""
    what = f"the EMA averages {averaged} tensors, and the model has {len(parameters)}, {trained} of them trained"
    return None, f"{what}; rollback keeps the live weights instead"
