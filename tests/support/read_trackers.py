"""What trackers have written on this machine, read back by their own libraries where these can read.

Every reader takes the folder that the run was in, and returns the scalars and the pixels of the pictures by key and
step, and the texts.
"""

from __future__ import annotations

import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Written = tuple[dict[tuple[str, int], float], dict[tuple[str, int], np.ndarray], set[str]]


def pixels(picture: Any) -> np.ndarray:
    """RGB uint8 ``(h, w, 3)`` of a picture, a file, or the bytes of a file."""
    opened = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    return np.asarray((opened if isinstance(opened, Image.Image) else Image.open(opened)).convert("RGB"))


def read_tensorboard(folder: Any) -> Any:
    """TensorBoard's own reader, with everything that the folder holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = dict.fromkeys(("images", "histograms", "tensors", "scalars"), 0)
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def layout_of(events: Any) -> dict[str, Any]:
    """The charts of the tab "Custom Scalars" by title."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    (found,) = events.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(found.tensor_proto.string_val[0]).category
    return {chart.title: chart for chart in category.chart}


def read_mlflow(folder: Path) -> Written:
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    run_id, metrics = run.info.run_id, run.data.metrics
    assert run.data.tags["mlflow.loggedImages"] == "True"  # its page shows them beside the metrics
    scalars = {(key, m.step): m.value for key in metrics for m in client.get_metric_history(run_id, key)}
    artifacts = Path(client.download_artifacts(run_id, ""))
    images = {}
    for file in (artifacts / "images").glob("*.png"):
        name, _, step, *_ = file.name.replace("%", "+").split("+")
        images[name.replace("~", "/").replace("#", "/"), int(step)] = pixels(file)
    texts = {file.read_text(encoding="utf-8") for file in (artifacts / "memwatch" / "alert").rglob("*.txt")}
    return scalars, images, texts


def read_swanlab(folder: Path) -> Written:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (file,) = folder.glob("run-*/run-*.swanlab")
    reader = DataStoreReader()
    reader.open(file)
    scalars, images, texts = {}, {}, set()
    for data in reader:
        record = Record.FromString(data)
        if record.HasField("scalar"):
            scalars[record.scalar.key, record.scalar.step] = record.scalar.value.number
        elif record.HasField("media"):
            (item,) = record.media.value.items
            if (image := file.parent / "media" / "image" / item.filename).is_file():
                images[record.media.key, record.media.step] = pixels(image)
            else:
                texts.add((file.parent / "media" / "text" / item.filename).read_text(encoding="utf-8"))
    reader.close()
    return scalars, images, texts


def read_trackio(folder: Path) -> Written:
    database = sqlite3.connect(folder / "run.db")
    scalars, images = {}, {}
    for step, row in database.execute("select step, metrics from metrics"):
        for key, value in json.loads(row).items():
            if isinstance(value, dict):
                assert value["_type"] == "trackio.image"
                images[key, step] = pixels(folder / "media" / value["file_path"])
            else:
                scalars[key, step] = value
    texts = {text for (text,) in database.execute("select text from alerts")}
    database.close()
    return scalars, images, texts
