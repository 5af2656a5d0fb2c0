"""``memwatch scan --follow``: a trainer's folder of checkpoints, each scanned as it appears.

It works beside every trainer that saves: it reads what the trainer writes, and adds only the file ``STOP``. The same
command goes on after it was ended: ``observations/followed.json`` holds what the follower has come to.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memwatch.measure.measurement import digest, fingerprints
from memwatch.ranks import Ranks
from memwatch.report.page import write_page
from memwatch.report.retention import NEWEST
from memwatch.run_folder import write_json, write_whole
from memwatch.scan.scan import OBSERVATIONS, Scan
from memwatch.scan.trainer_folder import Arrivals, Checkpoint, checkpoints_in
from memwatch.scan.weight_files import CheckpointError

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
        folder: where the trainer saves. It need not exist yet.
        open_scan: makes the scan, once the first checkpoint is there. A ``CheckpointError`` is tried again; other
            errors are wrong settings, and end the follower.
        base: what the training began with, as step 0 of the history, unless the trainer has saved a step 0 itself.
        poll: seconds between two polls of the folder.
        idle: seconds without anything new after which it ends; ``None`` waits until Ctrl-C.
        keep_going: whether to go on after a stop was decided.
    """

    def __init__(
        self,
        accelerator: Any,
        folder: Path,
        open_scan: Callable[[Checkpoint], Scan],
        *,
        base: Checkpoint,
        poll: float = 10.0,
        idle: float | None = None,
        clock: Any = time,
        keep_going: bool = False,
    ) -> None:
        self.folder, self.keep_going = folder, keep_going
        self.poll, self.idle, self._clock = poll, idle, clock
        self.scan: Scan | None = None
        self._ranks, self._open_scan, self._base = Ranks.of(accelerator), open_scan, base
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
        since, before = self._clock.monotonic(), list[Checkpoint]()
        while self.keep_going or self.stop_reason is None:
            found = self._found()
            ready, skipped = self._arrivals.poll(found)
            for checkpoint, why in skipped:
                self._skip(checkpoint, why)
            worked = ready is not None and self._try(ready)
            if ready is not None or found != before:
                since, before = self._clock.monotonic(), found
            idle = self._ranks.broadcast(self._clock.monotonic() - since)
            if self.idle is not None and idle >= self.idle:
                self._say("ended: nothing new in %s for %.1f minutes", self.folder, idle / 60)
                return
            if not worked:
                self._clock.sleep(self.poll)
        self._say("ended: a stop was decided at %s", self.stop_reason)

    def _found(self) -> list[Checkpoint]:
        """The checkpoints in the folder, the same on every rank; none where it cannot be listed.

        Once the scan is open, which takes a first checkpoint, the base comes before them until it was scanned.
        """
        found: list[Checkpoint] = []
        if self._main:
            try:
                found = checkpoints_in(self.folder)
            except OSError as error:
                logger.debug("%s cannot be listed: %s", self.folder, error)
        found, base = self._ranks.broadcast(found), self._base
        due = self.scan is not None and self._arrivals.last_step is None
        return [base, *found] if due and all(c.step > base.step for c in found) else found

    def _say(self, message: str, *values: object) -> None:
        """Once over all ranks."""
        if self._main:
            logger.info(message, *values)

    def _try(self, checkpoint: Checkpoint) -> bool:
        """Scan a checkpoint, or open the scan with it. Returns whether that worked; what fails is tried again."""
        had_stopped, scan = self.stop_reason is not None, self.scan
        try:
            if scan is None:
                self.scan = self._open_scan(checkpoint)
            else:
                scan.look(checkpoint)
        except Exception as error:  # out of memory, for one: the trainer may need less in a while
            is_known, why = isinstance(error, CheckpointError), str(error)
            if scan is None and not (is_known and why.startswith(checkpoint.source)):
                raise  # the base or the baseline cannot be read, and waiting does not help
            self._tries[checkpoint] = tries = self._tries.get(checkpoint, 0) + 1
            if tries >= TRIES:
                self._arrivals.give_up(checkpoint)
                self._skip(checkpoint, f"{why if is_known else repr(error)} (tried {tries} times)")
            return False
        if scan is None:
            self._begin()
        else:
            self._arrivals.done(checkpoint)
            if self._main:
                self._write(scan, had_stopped)
        return True

    def _begin(self) -> None:
        """Go on from an earlier follower's state, or else begin the history anew."""
        assert self.scan is not None
        scan, output = self.scan, Path(self.scan.config.output_dir)
        state: dict[str, Any] = {}
        if self._main and (output / STATE).exists():
            try:
                state = json.loads((output / STATE).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                logger.warning("%s cannot be read (%s); the history is written anew", output / STATE, error)
        state = self._ranks.broadcast(state)
        changed = self._what_has_changed(state, scan) if state else None
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

    def _what_has_changed(self, state: Mapping[str, Any], scan: Scan) -> str | None:
        """What keeps the history from going on, in words; ``None`` when nothing does. Scanned files may be deleted."""
        if state["folder"] != str(self.folder.resolve()):
            return "the folder"
        if state["settings"] != settings_of(scan):
            return "a setting or a probe"
        there = {(c.step, c.source): c for c in self._found()}
        scanned = [Checkpoint(*saved) for saved in state["checkpoints"]]
        return next((c.source for c in scanned if there.get((c.step, c.source), c) != c), None)

    def _write(self, scan: Scan, had_stopped: bool) -> None:
        """What follows from an event: the state to go on from, the page, and ``STOP``; an existing one stays."""
        output, stop = Path(scan.config.output_dir), self.folder / STOP
        with scan.faults.surviving("saving the follower's state", "a restart scans this checkpoint again"):
            settings = {"folder": str(self.folder.resolve()), "settings": settings_of(scan)}
            write_json(output / STATE, settings | scan.state_dict())
            scan.cache.thin(NEWEST)  # the state is enough to go on from
        with scan.faults.surviving("writing the report page", "'memwatch report' writes it at any time"):
            write_page(output)
        if self.stop_reason is not None and not had_stopped and not stop.exists():
            with scan.faults.surviving(f"writing {stop}", "the trainer has to be stopped by hand"):
                write_whole(stop, f"memwatch: {self.stop_reason}\n")

    def _skip(self, checkpoint: Checkpoint, why: str) -> None:
        why = why if checkpoint.source in why else f"{checkpoint.source}: {why}"
        self._failed.append((checkpoint.step, checkpoint.source, why))
        if self._main:
            logger.error("checkpoint %d is skipped: %s", checkpoint.step, why)


def settings_of(scan: Scan) -> str:
    """A digest of everything that an event depends on beside its checkpoint."""
    settings = {key: value for key, value in scan.config.to_dict().items() if key not in NO_MATTER}
    settings["alerts"] = {key: value for key, value in settings["alerts"].items() if key != "webhook"}
    return digest(settings, str(scan.pretrained), fingerprints(scan.config, scan.observer.prepared))
