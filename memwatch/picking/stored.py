"""What is kept of a training set: hashes and groups, files written whole; without them all is done anew."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from memwatch.run_folder import write_json

logger = logging.getLogger("memwatch")

FILE = "hashes.npz"
GROUPS = "groups.json"
VERSION = 1  # of what a record and a group mean; another one is not read
KEY = 16  # bytes


def read_records(folder: Path | None, record: np.dtype[Any]) -> dict[bytes, Any]:
    """Records by key; none where there is no file, or one of another version."""
    file = None if folder is None else folder / FILE
    if file is None or not file.is_file():
        return {}
    try:
        with np.load(file) as stored:
            if int(stored["version"]) != VERSION or stored["records"].dtype != record:
                return {}
            keys, records = stored["keys"], stored["records"]
        return {key.tobytes(): value for key, value in zip(keys, records, strict=True)}
    except Exception as error:  # a broken archive has many ways to say so
        logger.warning("memwatch: %s cannot be read (%r); the images are hashed anew", file, error)
        return {}


def write_records(folder: Path | None, records: Mapping[bytes, Any]) -> None:
    """Keep records for the next pass; where that fails, it is said, and the next pass takes as long as this one."""
    if folder is None or not records:
        return
    part = folder / f"{FILE}.part{os.getpid()}"
    keys = np.frombuffer(b"".join(records), dtype=np.uint8).reshape(-1, KEY)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            np.savez(stream, version=VERSION, keys=keys, records=np.array(list(records.values())))
        os.replace(part, folder / FILE)
    except OSError as error:
        logger.warning("memwatch: the hashes cannot be kept in %s (%s); the next run makes them anew", folder, error)
    finally:
        with suppress(OSError):
            part.unlink()


def read_groups(folder: Path | None, digest: str) -> list[Any] | None:
    """What ``write_groups`` was given for the same digest; ``None`` where it was not."""
    file = None if folder is None else folder / GROUPS
    if file is None or not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        groups: list[Any] = stored["groups"]
        return groups if (stored["version"], stored["digest"]) == (VERSION, digest) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("memwatch: %s cannot be read (%r); the groups are looked for anew", file, error)
        return None


def write_groups(folder: Path | None, digest: str, groups: list[Any]) -> None:
    """Keep the groups that were found in the set of this digest, as JSON takes them; where that fails, it is said."""
    if folder is None:
        return
    try:
        write_json(folder / GROUPS, {"version": VERSION, "digest": digest, "groups": groups})
    except OSError as error:
        logger.warning("memwatch: the groups cannot be kept in %s (%s); the next run looks anew", folder, error)


def write_survey(file: Path, survey: Any) -> None:
    import pickle

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(survey))


def read_survey(file: Path) -> Any:
    import pickle

    return pickle.loads(file.read_bytes()) if file.is_file() else None
