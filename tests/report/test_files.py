"""The files hold everything of an event, agree with one another, and are rewound with the run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.builders import EAGER, SMALL, Loop, history, maps, picture

from memwatch import Probe
from memwatch.measure.probes import MIN_CONTROLS
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
                assert (found[f"{finding.name}/{key}"] == value.mean.float()).all()
                assert (found[f"{finding.name}/{key}.sem"] == value.sem.float()).all()
                levels = len(finding.observation.timesteps)
                assert found[f"{finding.name}/{key}"].shape == ((8, 8) if key == "decisive" else (levels, 8, 8))
            mean = float(found[f"{finding.name}/collapse"].mean())
            assert row["scalars"][f"memwatch/collapse/{finding.name}"] == pytest.approx(mean, abs=1e-4)
            saved = Image.open(tmp_path / "memwatch" / "heatmaps" / finding.name / f"step_{report.step:07d}.jpg")
            assert_alike(saved, report.pictures[finding.name])
    assert len(found) == 2 * sum(len(finding.signals.maps()) for finding in report.findings)
    assert not list((tmp_path / "memwatch").rglob("*.part*"))


def test_a_line_cut_off_by_a_crash_is_forgotten_on_rewinding(tmp_path):
    sink = FileSink(tmp_path)
    sink.rewind(3)  # nothing there yet
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"step": 3}\n{"step": 6}\n{"ste', encoding="utf-8")
    sink.rewind(3)
    assert (tmp_path / "history.jsonl").read_text(encoding="utf-8") == '{"step": 0}\n{"step": 3}\n'


def assert_alike(saved, picture):
    """The same but for what JPEG loses, in grey values of 255."""
    lost = np.abs(np.asarray(saved, float) - np.asarray(picture, float))
    assert lost.mean() < 8  # random pixels lose the most; two of them differ by 85


def images_below(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*"))


def test_what_was_looked_at_lies_there_once_for_images_and_per_event_for_prompts(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL)
    reports = [watch.begin(), *loop.run(watch, 2)]
    folder = tmp_path / "memwatch" / "images"
    assert images_below(folder) == ["cat.png", "poster/step_0000000.jpg", "poster/step_0000002.jpg"]
    for report in reports:
        cat, poster = (finding.observation.image for finding in report.findings)
        assert np.array_equal(np.asarray(Image.open(folder / "cat.png")), cat)
        assert_alike(Image.open(folder / "poster" / f"step_{report.step:07d}.jpg"), poster)


@pytest.mark.usefixtures("eager")
def test_a_proofs_generations_lie_side_by_side(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=3e-2)
    watch = loop.watch(pipeline, config=SMALL, controls=images, **EAGER | {"stop": {"enabled": False}})
    (report,) = loop.run(watch, 2)
    proofs = {finding.name: finding.proof for finding in report.findings if finding.proof is not None}
    assert "cat" in proofs
    folder = tmp_path / "memwatch" / "generations"
    assert images_below(folder) == [f"{name}/step_0000002.jpg" for name in sorted(proofs)]
    for name, proof in proofs.items():
        saved = Image.open(folder / name / "step_0000002.jpg")
        assert saved.size == (16 * len(proof.generations), 16)
        assert_alike(saved, np.concatenate(list(proof.generations), 1))


def test_about_is_written_again_only_when_it_has_changed(pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, config=SMALL)
    sink, report = FileSink(tmp_path / "files"), watch.begin()
    sink.write(report)
    file = tmp_path / "files" / "about.json"
    file.write_text("{}", encoding="utf-8")
    sink.write(report)
    assert file.read_text(encoding="utf-8") == "{}"
    sink.write(replace(report, about=replace(report.about, training_rows=7)))
    assert json.loads(file.read_text(encoding="utf-8"))["training_rows"] == 7
    assert len((tmp_path / "files" / "history.jsonl").read_text(encoding="utf-8").splitlines()) == 3
