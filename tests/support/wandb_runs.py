"""What W&B has written offline, read back by W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

STAGED = "wandb-run-incremental-table"  # artifacts that hold the new rows of a table


@dataclass(frozen=True)
class OfflineRun:
    """One ``offline-run-*`` folder. ``records`` are ``{"type": kind, kind: {...}}``, in their order."""

    folder: Path
    records: list[dict[str, Any]]

    @classmethod
    def all(cls, folder: Path) -> list[OfflineRun]:
        """Those below ``folder``, oldest first."""
        logs = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)
        return [cls(log.parent, wandb_records(log)) for log in logs]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The history; what is nested has dots in its key."""
        return [plain(record["item"]) for record in self.of_type("history")]

    @cached_property
    def ours(self) -> list[dict[str, Any]]:
        """Our rows of the history."""
        return [row for row in self.rows if "memwatch/step" in row]

    @cached_property
    def summary(self) -> dict[str, Any]:
        return {key: value for record in self.of_type("summary") for key, value in plain(record["update"]).items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the run began with, and what came later."""
        records = [*(run["config"] for run in self.of_type("run")), *self.of_type("config")]
        return {key: value for record in records for key, value in plain(record["update"]).items()}

    def media(self, row: dict[str, Any], key: str) -> Path:
        """The file that ``row`` names under ``key``."""
        return self.folder / "files" / row[f"{key}.path"]

    def table(self) -> list[dict[str, Any]]:
        """The rows of the run's one table; a picture is W&B's own dict with the path of its file as ``file``."""
        rows = []
        for record in self.of_type("artifact"):
            if record["type"] != STAGED:
                continue
            files = {entry["path"]: Path(entry["local_path"]) for entry in record["manifest"]["contents"]}
            (path,) = (local for name, local in files.items() if name.endswith(".table.json"))
            saved = json.loads(path.read_text(encoding="utf-8"))
            for values in saved["data"]:
                cells = dict(zip(saved["columns"], values, strict=True))
                for cell in cells.values():
                    if isinstance(cell, dict):
                        cell["file"] = files[cell["path"]]
                rows.append(cells)
        return rows


def wandb_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``.wandb`` file, by ``wandb leet inspect``, or by the ``DataStore`` of W&B before 0.30."""
    try:
        from wandb.sdk.internal.datastore import DataStore
    except ImportError:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [json.loads(line) for line in printed.splitlines()]
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import Record

    store, found = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found.append({"type": kind} | MessageToDict(record, preserving_proto_field_name=True))
    return found


def plain(items: Any) -> dict[str, Any]:
    """Values by key, of either reader."""
    if isinstance(items, dict):
        return items
    return {".".join(item.get("nested_key") or [item["key"]]): json.loads(item["value_json"]) for item in items}
