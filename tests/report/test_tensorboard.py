"""TensorBoard: what its own reader finds in the event files."""

from __future__ import annotations

import pytest
from support.builders import Loop


def test_tensorboard_reads_back(pretrained, pipeline, images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop = Loop(pretrained, tmp_path, log_with="tensorboard")
    watch = loop.watch(pipeline, controls=images)
    reports = loop.run(watch, 4, each=lambda running: running.accelerator.log({"train_loss": 1.0}, step=running.step))
    loop.accelerator.end_training()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    for report in reports:
        for key, value in report.scalars().items():
            (found,) = [event.value for event in events.Scalars(key) if event.step == report.step]
            assert found == pytest.approx(value, rel=1e-5)
    assert [event.step for event in events.Scalars("memwatch/max_severity")] == [0, 2, 4]
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4]
    for name in ("cat", "poster"):
        shown = events.Images(f"memwatch/heatmap/{name}")
        assert [event.step for event in shown] == [0, 2, 4]
        assert (shown[-1].width, shown[-1].height) == reports[-1].pictures[name].size
    assert {tag for tag in events.Tags()["images"]} == {"memwatch/heatmap/cat", "memwatch/heatmap/poster"}
