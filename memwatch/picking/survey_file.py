"""A survey as one file: what was found need not be looked for again, and every process can have it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from memwatch.picking.survey import Group, GroupKind, Survey
from memwatch.run_folder import write_whole

logger = logging.getLogger("memwatch")

VERSION = 1  # of the file, and of what is found by what rules; another one is not read


def write_survey(file: Path, survey: Survey) -> None:
    """Write a file, whole or not at all; 0.06 kB per row, and 0.1 kB more for each group that a row is in.

    Raises:
        OSError: it cannot be written.
    """
    fields = asdict(survey) | {"bits": survey.bits.tobytes().hex(), "strangeness": survey.strangeness.tolist()}
    write_whole(file, json.dumps({"version": VERSION, "survey": fields}))


def read_survey(file: Path) -> Survey | None:
    """What ``write_survey`` has written; ``None`` where there is no file, or none that this version can read."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return _survey(saved["survey"]) if saved["version"] == VERSION else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("memwatch: %s cannot be read (%r); the training set is surveyed anew", file, error)
        return None


def _survey(saved: dict[str, Any]) -> Survey:
    size = saved["size"]
    groups = tuple(
        Group(GroupKind(g["kind"]), tuple(g["rows"]), tuple(map(tuple, g["boxes"])), tuple(g["best"]))
        for g in saved["groups"]
    )
    return Survey(
        size=size,
        unreadable={int(row): why for row, why in saved["unreadable"].items()},
        groups=groups,
        captions=tuple(map(tuple, saved["captions"])),
        rare_captions=tuple(saved["rare_captions"]),
        strangeness=np.array(saved["strangeness"], dtype=np.float64).reshape(size),
        bits=np.frombuffer(bytes.fromhex(saved["bits"]), dtype=np.uint8).reshape(size, 8),
        sampled=saved["sampled"],
    )
