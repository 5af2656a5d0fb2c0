"""A tracker that records, and what W&B has written, read back."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

from accelerate.tracking import GeneralTracker


class Recorder(GeneralTracker):
    """A tracker of another make, that fails at the steps ``fails_at``.

    ``rows`` is what it was given, ``tried`` the steps at which memwatch called it.
    """

    name = "recorder"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, fails_at: Container[int] = ()):
        super().__init__()
        self.rows, self.tried, self.fails_at, self.finished = [], [], fails_at, 0

    @property
    def tracker(self):
        return self

    def start(self): ...

    def store_init_configuration(self, values): ...

    def log(self, values, step=None, **kwargs):
        if "memwatch/step" in values:
            self.tried.append(step)
        if step in self.fails_at and "memwatch/step" in values:
            raise ConnectionError("the server is gone")
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


def wandb_records(path: Path) -> list:
    """Records of a ``.wandb`` file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, held, at = path.read_bytes(), [], b"", 7
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(held)
            records.append(record)
            held = b""
    return records


def wandb_rows(folder: Path) -> list[dict]:
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    rows = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                inner = row
                for key in outer:
                    inner = inner.setdefault(key, {})
                inner[last] = json.loads(item.value_json)
            rows.append(row)
    return rows
