"""``memwatch scan --follow``: a trainer's folder of checkpoints, each looked at as it appears.

It works beside every trainer that saves: it reads what the trainer writes, and writes nothing among it but ``STOP``. A
follower that was ended goes on where it was: what it has come to lies in ``observations/followed.json``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memwatch.ranks import Ranks
from memwatch.report.page import write_page
from memwatch.report.retention import NEWEST
from memwatch.run_folder import write_whole
from memwatch.scan.arrivals import Arrivals
from memwatch.scan.checkpoint_store import Checkpoint, from_list
from memwatch.scan.checkpoints import CheckpointError, found_in, is_complete
from memwatch.scan.follow_state import RECORD, read_record, what_is_other, write_record
from memwatch.scan.scan import Scan

logger = logging.getLogger("memwatch")

STOP = "STOP"
OURS = "memwatch: "  # how that file begins
TRIES = 3  # polls at which a checkpoint that cannot be read is tried


@dataclass(frozen=True)
class Waits:
    """How a follower waits.

    Attributes:
        poll: seconds between two looks at the folder.
        idle: seconds without anything new after which it ends; ``None`` waits until Ctrl-C.
        clock: seconds that pass. sleep: waits so many of them.
    """

    poll: float = 10.0
    idle: float | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep


class Follow:
    """Looks at every new checkpoint of a folder in order of step, until an event decides to stop or nothing comes.

    A checkpoint is taken when it is complete and its files have been the same at two polls. One that cannot be read is
    tried at three polls, and then named and passed over; so is one that is gone before its turn.

    Args:
        accelerator: see ``Scan``.
        folder: where the trainer saves. It need not be there yet.
        open_scan: makes the scan, once the first checkpoint is there. A ``CheckpointError`` is tried again; other
            errors are wrong settings, and end the follower.
        base: what the training began with, as step 0 of the history; ``None`` makes the first checkpoint the first
            baseline.
        waits: how long.
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
        waits: Waits,
        keep_going: bool = False,
    ) -> None:
        self.folder, self.waits, self.keep_going = folder, waits, keep_going
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
        """Why training is to end; ``None`` while nothing says so."""
        return None if self.scan is None else self.scan.progress.stop.reason

    def run(self) -> None:
        """Follow, and close the scan however that ends; Ctrl-C is a way to end."""
        self._say("memwatch follows %s, with a look every %g s; Ctrl-C ends it", self.folder, self.waits.poll)
        try:
            self._follow()
        except KeyboardInterrupt:
            self._say("memwatch follows %s no longer; the same command goes on", self.folder)
        finally:
            if self.scan is not None:
                self.scan.close()

    def _follow(self) -> None:
        since = self.waits.clock()
        while self.keep_going or self.stop_reason is None:
            poll = self._arrivals.poll(self._found())
            for checkpoint in poll.gone:
                self._skip(checkpoint, "was deleted before it could be read")
            for checkpoint in poll.late:
                self._skip(checkpoint, f"came after step {self._arrivals.last_step} had been looked at")
            ready = self._due_base or poll.next
            worked = ready is not None and self._try(ready)
            if ready is not None or poll.has_changed:
                since = self.waits.clock()
            idle = self._ranks.broadcast(self.waits.clock() - since)
            if self.waits.idle is not None and idle >= self.waits.idle:
                self._say("memwatch ends: nothing new in %s for %.1f minutes", self.folder, idle / 60)
                return
            if not worked:
                self.waits.sleep(self.waits.poll)
        self._say("memwatch ends: a stop was decided at %s", self.stop_reason)

    def _found(self) -> list[Checkpoint]:
        """What lies in the folder, the same on every rank; nothing where it cannot be listed."""
        found: list[Checkpoint] = []
        if self._main:
            try:
                found = [Checkpoint.of(step, path) for step, path in found_in(self.folder)]
            except OSError as error:
                logger.debug("memwatch: %s cannot be listed: %s", self.folder, error)
        return self._ranks.broadcast(found)

    # --- one checkpoint -----------------------------------------------------------------------------------------------

    def _try(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint could be looked at, or the scan be opened with it; what fails is tried again."""
        try:
            is_base = checkpoint is self._due_base
            if not self._ranks.broadcast(is_base or (self._main and is_complete(Path(checkpoint.source)))):
                raise CheckpointError(f"{checkpoint.source}: is not written to its end")
            if self.scan is None:
                scan = self._open_scan(checkpoint)
            else:
                self._look(self.scan, checkpoint)
                return True
        except CheckpointError as error:
            if self.scan is None and not str(error).startswith(checkpoint.source):
                raise  # the base or the baseline cannot be read, and waiting helps nobody
            self._failed_once_more(checkpoint, str(error))
            return False
        self.scan = scan
        self._begin(scan, checkpoint)
        return True

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
        with scan.faults.surviving("noting what was looked at", "a restart looks at it again"):
            write_record(Path(scan.config.output_dir) / RECORD, self.folder, scan)
            scan.kept.thin(NEWEST)  # the record is enough to go on from
        with scan.faults.surviving("writing the report page", "'memwatch report' writes it at any time"):
            write_page(Path(scan.config.output_dir))
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
            logger.error("memwatch: checkpoint %d is skipped: %s", checkpoint.step, why)

    # --- going on -----------------------------------------------------------------------------------------------------

    def _begin(self, scan: Scan, first: Checkpoint) -> None:
        """Where an earlier follower left off, or else with the base, unless the first checkpoint is of its step."""
        output = Path(scan.config.output_dir)
        record = self._ranks.broadcast(read_record(output / RECORD) if self._main else {})
        other = what_is_other(record, self.folder, self._found(), scan) if record else None
        if record and other is None:
            scan.load_state_dict(record)
            for checkpoint in from_list(record["seen"]):
                self._arrivals.done(checkpoint)
            self._say("memwatch goes on after step %s of %s", self._arrivals.last_step, output)
            return
        if other is not None:
            self._say("memwatch: %s is not that of the earlier follower; the history is written anew", other)
        if (self.folder / STOP).exists():
            self._say("memwatch: %s is there already; a trainer that looks for it ends at once", self.folder / STOP)
        scan.begin()
        if self._base is not None and self._base.step < first.step:
            self._due_base = self._base

    def _say(self, message: str, *values: object) -> None:
        """Once over all ranks."""
        if self._main:
            logger.info(message, *values)


def write_stop(file: Path, reason: str) -> None:
    """Ask whoever looks for this file to end the training. One that is there stays as it is."""
    if not file.exists():
        return write_whole(file, f"{OURS}{reason}\n")
    with file.open(encoding="utf-8", errors="replace") as opened:
        if opened.read(len(OURS)) != OURS:
            logger.warning("memwatch: %s is not memwatch's, and is left as it is; it would say: %s", file, reason)
