"""Record: what a follower has come to, on disk, so that the next one goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memwatch.measure.measurement import digest, fingerprints
from memwatch.run_folder import write_json
from memwatch.scan.checkpoint_store import Checkpoint, from_list
from memwatch.scan.scan import OBSERVATIONS, Scan

logger = logging.getLogger("memwatch")

RECORD = Path(OBSERVATIONS, "followed.json")  # in the output folder
NO_MATTER = ("output_dir", "strict", "stop", "heatmap", "rollback")  # settings that no earlier event depends on


def write_record(file: Path, folder: Path, scan: Scan) -> None:
    """Write it, whole or not at all.

    Args:
        folder: that is followed.
    """
    write_json(file, {"folder": str(folder.resolve()), "settings": settings_of(scan)} | scan.state_dict())


def read_record(file: Path) -> dict[str, Any]:
    """What an earlier follower has come to; empty where there was none, or where it cannot be read."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("memwatch: %s cannot be read (%s); the history is written anew", file, error)
        return {}


def what_is_other(record: Mapping[str, Any], folder: Path, found: Sequence[Checkpoint], scan: Scan) -> str | None:
    """What keeps the history from going on, in words; ``None`` when nothing does. Files may be gone by now.

    Args:
        folder: that is followed. found: what lies there.
    """
    if record["folder"] != str(folder.resolve()):
        return "the folder"
    if record["settings"] != settings_of(scan):
        return "a setting or a probe"
    there = {(c.step, c.source): c for c in found}
    changed = next((c for c in from_list(record["seen"]) if there.get((c.step, c.source), c) != c), None)
    return None if changed is None else changed.source


def settings_of(scan: Scan) -> str:
    """Everything that an event depends on beside its checkpoint, in a few letters."""
    settings = {key: value for key, value in scan.config.to_dict().items() if key not in NO_MATTER}
    settings["alerts"] = {key: value for key, value in settings["alerts"].items() if key != "webhook"}
    return digest(settings, str(scan.pretrained), fingerprints(scan.config, scan.observer.prepared))
