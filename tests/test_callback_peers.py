"""Peers: ordinary training images, measured as controls are, and a second reference for images alone."""

from __future__ import annotations

import pytest
from support.builders import CONFIG, EAGER, Loop, history, picture

from memwatch import Probe, ProbeError

NAMES = ["peer/control0", "peer/control1", "peer/control2"]  # of the files in ``images``


@pytest.mark.parametrize("given", ["argument", "key", "argument goes first"])
def test_peers_come_as_an_argument_or_as_a_key(given, pretrained, pipeline, images, tmp_path):
    key = {"key": str(images), "argument goes first": "nowhere"}.get(given)
    overrides = {"config": CONFIG | {"peers": key}} | ({} if given == "key" else {"peers": images})
    watch = Loop(pretrained, tmp_path).watch(pipeline, controls=[Probe("a dog", picture(5), name="dog")], **overrides)
    assert [p.name for p in watch.observer.probes] == ["cat", "poster", "control/dog", *NAMES]
    assert [p.name for p in watch.observer.probes if p.probe.is_peer] == NAMES
    assert not any(p.probe.is_control for p in watch.observer.probes if p.probe.is_peer)


def test_peers_that_are_not_there_are_refused(pretrained, pipeline, tmp_path):
    with pytest.raises(ProbeError, match="'nowhere' is neither a folder nor a file"):
        Loop(pretrained, tmp_path).watch(pipeline, peers="nowhere")


def test_peers_are_measured_as_controls_are_and_are_no_findings(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, peers=images, controls=[Probe("a dog", picture(5), name="dog")])
    (report,) = loop.run(watch, 2)
    (control,), peers = report.judgement.controls, report.judgement.peers
    assert [f.name for f in peers] == NAMES
    for f in peers:
        assert f.observation.baseline_step == control.observation.baseline_step == 0
        assert f.observation.timesteps == control.observation.timesteps
        assert f.signals.maps().keys() == control.signals.maps().keys()
        assert f.signals.decisive.samples.any()
    assert [f.name for f in report.findings] == ["cat", "poster"]
    assert set(report.controls) == {"control/dog"}
    assert set(watch.state_dict()["states"]) == {"cat", "poster", "control/dog"}  # peers have no memory
    row = history(tmp_path)[-1]
    assert [f["name"] for f in row["findings"]] == ["cat", "poster"]
    assert not any("peer/" in key for key in row["scalars"])
    assert not (tmp_path / "memwatch" / "heatmaps" / "peer").exists()


@pytest.mark.usefixtures("eager")
def test_images_are_compared_with_peers_that_are_images(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, peers=images, **EAGER | {"stop": {"enabled": False}})
    (report,) = loop.run(watch, 2)
    image, prompt = report.findings
    assert (image.regions[0].rank_p_peers, prompt.regions[0].rank_p_peers) != (None, None)
    assert image.regions[0].rank_p_peers in {1 / 4, 2 / 4, 3 / 4, 1.0}
    assert prompt.regions[0].rank_p_peers is None
    told = {f.name: report.alert_text(f) for f in report.alerts}
    assert f"rank p = {image.regions[0].rank_p_peers:.2f} against 3 training images" in told["cat"]
    assert "training images" not in told["poster"]
    row = history(tmp_path)[-1]["findings"]
    assert [f["regions"][0]["rank_p_peers"] for f in row] == [image.regions[0].rank_p_peers, None]
