"""The proof inside an event: an alert is generated once, before the stop is decided, and reported."""

from __future__ import annotations

import numpy as np
import pytest
from support.builders import CONFIG, EAGER, Loop, history, picture

from memwatch import Probe
from memwatch.judge.verdict import Verdict

WATCHING = EAGER | {"stop": {"enabled": False}}
CAT, POSTER = Probe("a photo of a cat", picture(0), name="cat"), Probe("a red poster", name="poster")
pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def generated(monkeypatch) -> list[tuple[str, int]]:
    """Every caption that is generated from, and how often."""
    from memwatch.measure.observer import Observer

    calls, real = [], Observer.generate

    def counting(self, caption, count):
        calls.append((caption, count))
        return real(self, caption, count)

    monkeypatch.setattr(Observer, "generate", counting)
    return calls


def test_an_alert_is_generated_once(generated, pretrained, pipeline, tmp_path):
    """At step 2 both are news; at 4 and 6 they are still memorized, which is none."""
    loop = Loop(pretrained, tmp_path)
    reports = loop.run(loop.watch(pipeline, [CAT, POSTER], **WATCHING), 6)
    assert generated == [("a photo of a cat", CONFIG["proof"]["seeds"])]  # the poster's generations were there
    assert [[f.verdict for f in r.findings] for r in reports] == [[Verdict.MEMORIZED] * 2] * 3
    assert [[f.proof is not None for f in r.findings] for r in reports] == [
        [True, True],
        [False, False],
        [False, False],
    ]
    cat, poster = reports[0].findings
    assert cat.proof.generations.shape == (2, 16, 16, 3)
    assert poster.proof.generations is poster.observation.generations
    assert reports[0].judgement.findings is reports[0].findings
    first, *later = history(tmp_path)[1:]
    assert [f["copied"]["generations"] for f in first["findings"]] == [2, 2]
    assert all(f["copied"] is None for row in later for f in row["findings"])
    assert "memwatch/num_copied" in first["scalars"]
    assert any(key in reports[0].alert_text(cat) for key in ("generations copy", "generations copies", "tell a copy"))


def test_a_probe_that_is_not_news_is_not_generated(generated, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path, lr=0.0)  # nothing changes, so there is no region
    reports = loop.run(loop.watch(pipeline, [CAT, POSTER], **WATCHING), 4)
    assert not any(report.alerts for report in reports)
    assert generated == []


def test_one_key_turns_it_off(generated, pretrained, pipeline, tmp_path):
    loop = Loop(pretrained, tmp_path)
    proof = CONFIG["proof"] | {"enabled": False}
    (report,) = loop.run(loop.watch(pipeline, [CAT, POSTER], **WATCHING, proof=proof), 2)
    assert [f.name for f in report.alerts] == ["cat", "poster"]
    assert generated == []
    assert [f.proof for f in report.findings] == [None, None]
    assert "memwatch/num_copied" not in report.scalars()


def test_a_proof_that_fails_costs_neither_the_event_nor_the_alert(pretrained, pipeline, tmp_path, monkeypatch):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, [CAT], **WATCHING)

    def failing(caption, count):
        raise RuntimeError("no memory")

    monkeypatch.setattr(watch.observer, "generate", failing)
    (report,) = loop.run(watch, 2)
    assert (report.failure, report.errors) == (None, 1)
    assert [f.name for f in report.alerts] == ["cat"]
    assert report.findings[0].proof is None


@pytest.mark.parametrize("copies", [True, False])
def test_a_stop_can_wait_for_a_copy(copies, pretrained, pipeline, images, tmp_path, monkeypatch):
    """Until there is one, the probe is generated from again at every event."""
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, [CAT], controls=images, **EAGER, stop={"require_copy": True})
    with watch.observer.borrowed():
        pictures = watch.observer.pictures()
    made, generated = pictures["cat"] if copies else np.asarray(picture(77)), []

    def generate(caption, count):
        generated.append(caption)
        return np.stack([made] * count)

    monkeypatch.setattr(watch.observer, "generate", generate)
    reports = loop.run(watch, 6)
    assert [report.step for report in reports] == ([2] if copies else [2, 4, 6])
    assert len(generated) == len(reports)
    assert watch.should_stop == copies
    assert ("2 of 2 generations copy this region" in reports[0].alert_text(reports[0].alerts[0])) == copies
