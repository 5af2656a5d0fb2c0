"""The files hold everything of an event, agree with one another, and are rewound with the run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from support.builders import Loop, history, maps, picture

from memwatch import Probe
from memwatch.judge.calibration import MIN_CONTROLS
from memwatch.report.files import FileSink


def test_files_hold_everything_and_agree(pretrained, pipeline, tmp_path):
    loop, held_out = Loop(pretrained, tmp_path), [Probe(f"a dog {i}", picture(20 + i)) for i in range(MIN_CONTROLS)]
    reports = loop.run(loop.watch(pipeline, controls=held_out), 4)
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4]
    for report, row in zip(reports, rows[1:], strict=True):
        assert row == json.loads(json.dumps(report.to_dict()))
        keys = {"memwatch/max_severity", "memwatch/min_p", "memwatch/collapse/cat", "memwatch/seconds"}
        assert keys <= row["scalars"].keys()
        found = maps(tmp_path, report.step)
        for finding in report.findings:
            for key, value in finding.signals.maps().items():
                assert (found[f"{finding.name}/{key}"] == value.mean).all()
                assert (found[f"{finding.name}/{key}.sem"] == value.sem).all()
                levels = len(finding.observation.timesteps)
                assert found[f"{finding.name}/{key}"].shape == ((8, 8) if key == "decisive" else (levels, 8, 8))
            mean = float(found[f"{finding.name}/collapse"].mean())
            assert row["scalars"][f"memwatch/collapse/{finding.name}"] == pytest.approx(mean, abs=1e-6)
            png = Image.open(tmp_path / "memwatch" / "heatmaps" / finding.name / f"step_{report.step:07d}.png")
            assert np.array_equal(np.asarray(png), np.asarray(report.pictures[finding.name]))
    assert len(found) == 2 * sum(len(finding.signals.maps()) for finding in report.findings)
    assert not list((tmp_path / "memwatch").rglob("*.part*"))


def test_a_line_cut_off_by_a_crash_is_forgotten_on_rewinding(tmp_path):
    sink = FileSink(tmp_path)
    sink.rewind(3)  # nothing there yet
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"step": 3}\n{"step": 6}\n{"ste', encoding="utf-8")
    sink.rewind(3)
    assert (tmp_path / "history.jsonl").read_text(encoding="utf-8") == '{"step": 0}\n{"step": 3}\n'
