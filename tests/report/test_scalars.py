"""Any other tracker gets the scalars."""

from __future__ import annotations

from support.builders import Loop
from support.trackers import Recorder


def test_any_other_tracker_gets_the_scalars(pretrained, pipeline, tmp_path):
    recorder = Recorder()
    loop = Loop(pretrained, tmp_path, log_with=recorder)
    reports = loop.run(loop.watch(pipeline), 4)
    loop.accelerator.end_training()
    assert [step for step, _ in recorder.rows] == [0, 2, 4]
    assert recorder.rows[1:] == [(report.step, report.scalars()) for report in reports]
    assert recorder.finished == 1
