"""Shared: a training set is surveyed once per machine; other processes wait for the file, and later runs read it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from memwatch.picking.survey import Survey, survey
from memwatch.picking.survey_file import read_survey, write_survey
from memwatch.picking.training_set import RowError, TrainingSet, content_key

logger = logging.getLogger("memwatch")

KEPT = 32  # surveys in the cache; the oldest go
PATIENCE = 30.0  # seconds between two lines of a process that waits
LARGE = 20_000  # rows from which on a survey takes minutes


def shared_survey(rows: TrainingSet) -> Survey:
    """The survey of a training set, from the cache, or made now by one process while the others wait for its file.

    Nobody waits in a collective. Where files cannot be written or locked, every process surveys for itself; the answer
    is the same.

    Raises:
        ProbeError: no row can be read.
    """
    folder = cache_folder()
    if folder is None:
        return survey(rows)
    file = folder / f"{digest_of(rows)}.json"
    if (known := read_survey(file)) is not None:
        return known
    with waiting(file.with_suffix(".lock"), len(rows)):
        if (known := read_survey(file)) is not None:
            return known
        if len(rows) >= LARGE:
            how = "'memwatch pick TRAIN --out WATCH', or memwatch.pick in a script of its own, does it ahead of time"
            logger.warning("memwatch: %d rows are surveyed now, once; that takes minutes. %s", len(rows), how)
        found = survey(rows)
        try:
            write_survey(file, found)
            forget_oldest(folder)
        except OSError as error:
            logger.warning("memwatch: the survey cannot be kept in %s (%s); every process makes its own", folder, error)
    return found


def cache_folder() -> Path | None:
    """``memwatch`` in the user's cache folder; ``None`` where there can be none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memwatch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError):  # a user without a home
        return None


@contextmanager
def waiting(lock: Path, num_rows: int) -> Iterator[None]:
    """Inside, no other process of this machine is; one that waits says so. A process that dies lets the next one in."""
    held, waited = FileLock(lock, timeout=PATIENCE), 0.0
    try:
        while True:
            try:
                held.acquire()
                break
            except Timeout:
                waited += PATIENCE
                what = "another process surveys these %d rows; this one waits for it, %.0f s so far"
                logger.warning(f"memwatch: {what}", num_rows, waited)
    except (OSError, NotImplementedError) as error:
        logger.warning("memwatch: %s cannot be locked (%s), so that every process surveys for itself", lock, error)
    try:
        yield
    finally:
        held.release()


def forget_oldest(folder: Path) -> None:
    """Leave the newest ``KEPT`` surveys."""
    for file in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
        for gone in (file, file.with_suffix(".lock")):
            with suppress(OSError):
                gone.unlink(missing_ok=True)


def digest_of(rows: TrainingSet) -> str:
    """What a training set hashes to: names, sizes and times of files, content of what is in memory, and captions.

    A ``datasets.Dataset`` has a fingerprint of its own that does the same without reading the rows.
    """
    digest = hashlib.blake2b(f"{len(rows)} {rows.prompt}".encode(), digest_size=20)
    mark: Any = getattr(rows.source, "_fingerprint", None)
    if mark is not None:
        digest.update(f"{mark} {rows.columns}".encode())
        return digest.hexdigest()
    for row in range(len(rows)):
        digest.update(f"{_mark(rows, row)} {rows.caption(row)}\0".encode())
    return digest.hexdigest()


def _mark(rows: TrainingSet, row: int) -> str:
    """What tells the image of a row from others."""
    try:
        raw = rows.raw(row)
        if not isinstance(raw, Path):
            return content_key(raw)
        stat = raw.stat()
        return f"{raw.absolute()}|{stat.st_size}|{stat.st_mtime_ns}"
    except (RowError, OSError, ValueError):
        return "unreadable"
