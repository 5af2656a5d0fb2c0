"""The survey of a training set as a file: made once per machine; other processes wait for it, later runs read it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from memwatch.picking.parts import has_opencv
from memwatch.picking.survey import Group, GroupKind, Survey, survey
from memwatch.picking.training_set import RowError, TrainingSet, content_key
from memwatch.run_folder import write_whole

logger = logging.getLogger("memwatch")

VERSION = 3  # of the file, and of what is found by what rules; another one is not read
KEPT = 32  # surveys in the cache; the oldest are removed
PATIENCE = 30.0  # seconds after which a process that waits says so


def shared_survey(rows: TrainingSet) -> Survey:
    """The survey of a training set, from the cache, or made now by one process while the others wait for its file.

    Nobody waits in a collective. Where files cannot be written or locked, every process makes its own, which is the
    same. A ``ProbeError`` where no row can be read.
    """
    folder = cache_folder()
    if folder is None:
        return survey(rows)
    file = folder / f"{digest_of(rows)}.json"
    with _locked(file.with_suffix(".lock"), len(rows)):
        if (known := read_survey(file)) is not None:
            return known
        found = survey(rows)
        try:
            write_survey(file, found)
            for old in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
                old.unlink(missing_ok=True)
                old.with_suffix(".lock").unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the survey cannot be kept in %s (%s); every process makes its own", folder, error)
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
def _locked(file: Path, num_rows: int) -> Iterator[None]:
    """Lock out the other processes of this machine. The lock of a process that dies is free."""
    lock = FileLock(file)
    try:
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            logger.warning("another process surveys these %d rows; this one waits for it", num_rows)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s), so every process makes its own survey", file, error)
    try:
        yield
    finally:
        lock.release()


def digest_of(rows: TrainingSet) -> str:
    """A hash of a training set: names, sizes and times of files, content of what is in memory, and captions.

    The fingerprint of a ``datasets.Dataset`` does the same without reading the rows.
    """
    digest = hashlib.blake2b(f"{len(rows)} {rows.prompt} {has_opencv()}".encode(), digest_size=20)
    fingerprint: Any = getattr(rows.source, "_fingerprint", None)
    if fingerprint is not None:
        digest.update(f"{fingerprint} {rows.image_column} {rows.caption_column}".encode())
        return digest.hexdigest()
    for row in range(len(rows)):
        try:
            key = rows.raw(row)
            if isinstance(key, Path):
                key = f"{key.absolute()}|{key.stat().st_size}|{key.stat().st_mtime_ns}"
            else:
                key = content_key(key)
        except (RowError, OSError, ValueError):
            key = "unreadable"
        digest.update(f"{key} {rows.caption(row)}\0".encode())
    return digest.hexdigest()


def write_survey(file: Path, survey: Survey) -> None:
    """Write a file, whole or not at all; 0.06 kB per row, and 0.1 kB more for each group that a row is in."""
    fields = asdict(survey) | {"bits": survey.bits.tobytes().hex(), "strangeness": survey.strangeness.tolist()}
    write_whole(file, json.dumps({"version": VERSION, "survey": fields}))


def read_survey(file: Path) -> Survey | None:
    """What ``write_survey`` has written; ``None`` where there is no file, or none that this version can read."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return _as_survey(**saved["survey"]) if saved["version"] == VERSION else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%r); the training set is surveyed anew", file, error)
        return None


def _as_survey(size: int, **saved: Any) -> Survey:
    groups = [
        Group(GroupKind(g["kind"]), tuple(g["rows"]), tuple(map(tuple, g["boxes"])), tuple(g["best"]))
        for g in saved["groups"]
    ]
    return Survey(
        size=size,
        unreadable={int(row): why for row, why in saved["unreadable"].items()},
        groups=tuple(groups),
        captions=tuple(map(tuple, saved["captions"])),
        rare_captions=tuple(saved["rare_captions"]),
        strangeness=np.array(saved["strangeness"], dtype=np.float64).reshape(size),
        bits=np.frombuffer(bytes.fromhex(saved["bits"]), dtype=np.uint8).reshape(size, 8),
        notes=tuple(saved["notes"]),
    )
