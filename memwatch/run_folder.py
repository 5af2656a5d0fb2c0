"""The folder of a run: locked while the run lives, and never mixed with the files of another run."""

from __future__ import annotations

import gc
import json
import logging
import os
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger("memwatch")

OWNER = "run.json"  # names the run whose files lie beside it
SIGNS = ("history.jsonl", "ledger", "observations")  # without ``OWNER``, any of these is a sign of memwatch's files
PICTURES = ("heatmaps", "overview", "images", "generations")
WEIGHTS = ("snapshots", "last_clean")
OURS = (*SIGNS, *PICTURES, *WEIGHTS, "maps", "decisive", "about.json", "losses.jsonl", "flagged.jsonl", "report.html")


class RunFolder:
    """``output_dir`` of a run, for the main process alone; ``lock`` creates it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: FileLock | None = None

    # --- one live run ------------------------------------------------------------------------------------------------

    def lock(self) -> bool:
        """Keep other live runs out, until ``release``, or until this object or its process is gone.

        Returns whether no other run holds the lock. Where files cannot be locked, it warns and locks nothing.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "memwatch.lock", timeout=0, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                gc.collect()  # a watch that is garbage already holds it no longer
                lock.acquire()
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be locked (%s); make sure that no other run uses it", self.folder, error)
            return True
        self._lock = lock
        return True

    def release(self) -> None:
        """Unlock; safe to call again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # --- one run after the other -------------------------------------------------------------------------------------

    def enter(self, run: str) -> None:
        """Make this the folder of the run with that id. Files of another run move to ``earlier/NNNN``, its own back.

        Raises:
            OSError: the disk refused; nothing is deleted.
        """
        owner = owner_of(self.folder)
        if owner == run:
            return
        if any((self.folder / name).exists() for name in (SIGNS if owner is None else OURS)):
            aside = self._next_aside()
            move(self.folder, aside)
            logger.info("the files of another run in %s were moved to %s", self.folder, aside)
        own = next((place for place in self.asides() if owner_of(place) == run), None)
        if own is not None:
            move(own, self.folder)
            own.rmdir()
            logger.info("the files of the resumed run were moved back from %s", own)
        write_json(self.folder / OWNER, {"run": run})

    def asides(self) -> list[Path]:
        """Folders of earlier runs, oldest first."""
        return sorted(place for place in (self.folder / "earlier").glob("[0-9]*") if place.is_dir())

    def _next_aside(self) -> Path:
        last = max((int(place.name) for place in self.asides() if place.name.isdecimal()), default=0)
        return self.folder / "earlier" / f"{last + 1:04d}"


def move(source: Path, target: Path) -> None:
    """Move memwatch's own files from one folder to another; other files stay."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*OURS, OWNER):
        if (source / name).exists():
            os.replace(source / name, target / name)


def owner_of(folder: Path) -> str | None:
    """The id of the run whose files are in ``folder``; ``None`` where that is not known."""
    try:
        return str(json.loads((folder / OWNER).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stem_of(step: int) -> str:
    """How the names of an event's files and folders begin."""
    return f"step_{step:07d}"


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all; what JSON does not know becomes text."""
    write_whole(path, json.dumps(value, default=str))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
