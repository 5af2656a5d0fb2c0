"""``memwatch scan --follow``: a trainer's folder of checkpoints, each scanned as it appears.

It works beside every trainer that saves: it reads what the trainer writes, and adds only the file ``STOP``. The same
command goes on after it was ended: ``observations/followed.json`` holds what the follower has come to.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memwatch.measure.measurement import digest, fingerprints
from memwatch.ranks import Ranks
from memwatch.report.page import write_page
from memwatch.report.retention import NEWEST
from memwatch.run_folder import write_json, write_whole
from memwatch.scan.checkpoints import CheckpointError
from memwatch.scan.scan import OBSERVATIONS, Scan
from memwatch.scan.trainer_folder import Arrivals, Checkpoint, checkpoints_in

logger = logging.getLogger("memwatch")

STOP = "STOP"
TRIES = 3  # polls at which a checkpoint that cannot be read is tried
STATE = Path(OBSERVATIONS, "followed.json")  # in the output folder
NO_MATTER = ("output_dir", "strict", "stop", "heatmap", "rollback")  # settings that no earlier event depends on


class Follow:
    """Scans every new checkpoint of a folder in order of step, until an event decides to stop or nothing comes.

    A checkpoint is taken when its files have been the same at two polls. One that cannot be read, or is incomplete, is
    tried at three polls, then named and skipped; so is one that is deleted before it is scanned.

    Args:
        accelerator: see ``Scan``.
        folder: where the trainer saves. It need not exist yet.
        open_scan: makes the scan, once the first checkpoint is there. A ``CheckpointError`` is tried again; other
            errors are wrong settings, and end the follower.
        base: what the training began with, as step 0 of the history; ``None`` makes the first checkpoint the first
            baseline.
        poll: seconds between two polls of the folder.
        idle: seconds without anything new after which it ends; ``None`` waits until Ctrl-C.
        clock: has ``monotonic`` and ``sleep``.
        keep_going: whether to go on after a stop was decided.

    Attributes:
        scan: ``None`` before the first checkpoint.
    """

    def __init__(
        self,
        accelerator: Any,
        folder: Path,
        open_scan: Callable[[Checkpoint], Scan],
        *,
        base: Checkpoint | None = None,
        poll: float = 10.0,
        idle: float | None = None,
        clock: Any = time,
        keep_going: bool = False,
    ) -> None:
        self.folder, self.keep_going = folder, keep_going
        self.poll, self.idle, self._clock = poll, idle, clock
        self.scan: Scan | None = None
        self._ranks, self._open_scan = Ranks.of(accelerator), open_scan
        self._base = base
        self._due_base: Checkpoint | None = None
        self._main = bool(accelerator.is_main_process)
        self._arrivals, self._tries = Arrivals(), dict[Checkpoint, int]()
        self._failed: list[tuple[int, str, str]] = []

    @property
    def failed(self) -> list[tuple[int, str, str]]:
        """(step, probe or source, why) of everything skipped."""
        return [*self._failed, *(self.scan.failed if self.scan is not None else ())]

    @property
    def stop_reason(self) -> str | None:
        """Why training is to end; ``None`` until an event decides that."""
        return None if self.scan is None else self.scan.progress.stop.reason

    def run(self) -> None:
        """Follow, and close the scan however that ends; Ctrl-C is a way to end."""
        self._say("following %s, checked every %g s; Ctrl-C ends it", self.folder, self.poll)
        try:
            self._follow()
        except KeyboardInterrupt:
            self._say("no longer following %s; run the same command to go on", self.folder)
        finally:
            if self.scan is not None:
                self.scan.close()

    def _follow(self) -> None:
        since = self._clock.monotonic()
        while self.keep_going or self.stop_reason is None:
            poll = self._arrivals.poll(self._found())
            for checkpoint, why in poll.skipped:
                self._skip(checkpoint, why)
            ready = self._due_base or poll.next
            worked = ready is not None and self._try(ready)
            if ready is not None or poll.has_changed:
                since = self._clock.monotonic()
            idle = self._ranks.broadcast(self._clock.monotonic() - since)
            if self.idle is not None and idle >= self.idle:
                self._say("ended: nothing new in %s for %.1f minutes", self.folder, idle / 60)
                return
            if not worked:
                self._clock.sleep(self.poll)
        self._say("ended: a stop was decided at %s", self.stop_reason)

    def _found(self) -> list[Checkpoint]:
        """The checkpoints in the folder, the same on every rank; none where it cannot be listed."""
        found: list[Checkpoint] = []
        if self._main:
            try:
                found = checkpoints_in(self.folder)
            except OSError as error:
                logger.debug("%s cannot be listed: %s", self.folder, error)
        return self._ranks.broadcast(found)

    def _say(self, message: str, *values: object) -> None:
        """Once over all ranks."""
        if self._main:
            logger.info(message, *values)

    # --- one checkpoint -----------------------------------------------------------------------------------------------

    def _try(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint could be scanned, or the scan be opened with it; what fails is tried again."""
        try:
            if self.scan is not None:
                self._look(self.scan, checkpoint)
                return True
            scan = self._open_scan(checkpoint)
        except CheckpointError as error:
            if self.scan is None and not str(error).startswith(checkpoint.source):
                raise  # the base or the baseline cannot be read, and waiting does not help
            self._failed_once_more(checkpoint, str(error))
            return False
        self.scan = scan
        self._begin(scan, checkpoint)
        return True

    def _begin(self, scan: Scan, first: Checkpoint) -> None:
        """Go on from an earlier follower's state, or else with the base, unless the first checkpoint has its step."""
        output = Path(scan.config.output_dir)
        state = self._ranks.broadcast(read_state(output / STATE) if self._main else {})
        changed = what_has_changed(state, self.folder, self._found(), scan) if state else None
        if state and changed is None:
            scan.load_state_dict(state)
            for saved in state["checkpoints"]:
                self._arrivals.done(Checkpoint(*saved))
            self._say("going on after step %s of %s", self._arrivals.last_step, output)
            return
        if changed is not None:
            self._say("%s has changed since the earlier follower; the history is written anew", changed)
        if (self.folder / STOP).exists():
            self._say("%s already exists; a trainer that checks for it ends at once", self.folder / STOP)
        scan.begin()
        if self._base is not None and self._base.step < first.step:
            self._due_base = self._base

    def _look(self, scan: Scan, checkpoint: Checkpoint) -> None:
        """One event, and what follows from it.

        Raises:
            CheckpointError: whatever went wrong with it.
        """
        had_stopped = self.stop_reason is not None
        try:
            scan.look(checkpoint)
        except CheckpointError:
            raise
        except Exception as error:  # out of memory, for one: the trainer may need less in a while
            raise CheckpointError(f"{checkpoint.source}: {error!r}") from error
        self._arrivals.done(checkpoint)
        self._due_base = None
        if not self._main:
            return
        output = Path(scan.config.output_dir)
        with scan.faults.surviving("saving the follower's state", "a restart scans this checkpoint again"):
            settings = {"folder": str(self.folder.resolve()), "settings": settings_of(scan)}
            write_json(output / STATE, settings | scan.state_dict())
            scan.cache.thin(NEWEST)  # the state is enough to go on from
        with scan.faults.surviving("writing the report page", "'memwatch report' writes it at any time"):
            write_page(output)
        if self.stop_reason is not None and not had_stopped:
            with scan.faults.surviving(f"writing {self.folder / STOP}", "the trainer has to be stopped by hand"):
                write_stop(self.folder / STOP, self.stop_reason)

    def _failed_once_more(self, checkpoint: Checkpoint, why: str) -> None:
        self._tries[checkpoint] = tries = self._tries.get(checkpoint, 0) + 1
        if tries >= TRIES:
            self._arrivals.give_up(checkpoint)
            self._due_base = None
            self._skip(checkpoint, f"{why} (tried {tries} times)")

    def _skip(self, checkpoint: Checkpoint, why: str) -> None:
        why = why if checkpoint.source in why else f"{checkpoint.source}: {why}"
        self._failed.append((checkpoint.step, checkpoint.source, why))
        if self._main:
            logger.error("checkpoint %d is skipped: %s", checkpoint.step, why)


# --- files ------------------------------------------------------------------------------------------------------------


def read_state(file: Path) -> dict[str, Any]:
    """What an earlier follower has come to; empty where there was none, or where it cannot be read."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s); the history is written anew", file, error)
        return {}


def what_has_changed(state: Mapping[str, Any], folder: Path, found: Sequence[Checkpoint], scan: Scan) -> str | None:
    """What keeps the history from going on, in words; ``None`` when nothing does. Scanned files may be deleted."""
    if state["folder"] != str(folder.resolve()):
        return "the folder"
    if state["settings"] != settings_of(scan):
        return "a setting or a probe"
    there = {(c.step, c.source): c for c in found}
    scanned = [Checkpoint(*saved) for saved in state["checkpoints"]]
    return next((c.source for c in scanned if there.get((c.step, c.source), c) != c), None)


def settings_of(scan: Scan) -> str:
    """A digest of everything that an event depends on beside its checkpoint."""
    settings = {key: value for key, value in scan.config.to_dict().items() if key not in NO_MATTER}
    settings["alerts"] = {key: value for key, value in settings["alerts"].items() if key != "webhook"}
    return digest(settings, str(scan.pretrained), fingerprints(scan.config, scan.observer.prepared))


def write_stop(file: Path, reason: str) -> None:
    """Ask whoever checks for this file to end the training. An existing file stays as it is."""
    if not file.exists():
        write_whole(file, f"memwatch: {reason}\n")
