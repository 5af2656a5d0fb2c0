"""Stored hashes: one file, written whole; whatever is wrong with it, the images are hashed anew."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger("memwatch")

FILE = "hashes.npz"
VERSION = 1  # of what a record means; another one is not read
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
