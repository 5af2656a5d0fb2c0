"""The report of one event: its scalars, its words, and its line in the history."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from support.observations import controls, measured, seen
from support.reports import report_of

from memwatch.judge.findings import Judgement
from memwatch.report.report import level_factors


def test_scalars_say_what_the_findings_hold():
    observations = [seen("cat"), seen("dog", 1.0), seen("new", baseline=None), *controls(20, 1.2, spread=0.2)]
    report = report_of(*observations)
    cat, _, new = report.findings
    scalars = report.scalars()
    assert [str(f.verdict) for f in report.findings] == ["suspicious", "no evidence", "inconclusive"]
    assert 0 < cat.p < 0.01
    expected = {
        "step": 7,
        "max_severity": cat.severity,
        "min_p": cat.p,
        "num_memorized": 0,
        "num_suspicious": 1,
        "num_inconclusive": 1,
        "control_score": report.judgement.standings["reference"].highest,
        "called_from": report.judgement.standings["reference"].called_from,
        "control_severity": max(f.severity for f in report.judgement.controls),
        "seconds": 1.5,
        "errors": 2,
        "stop": 0,
        "severity/cat": cat.severity,
        "severity/dog": 1,
        "p/cat": cat.p,
        "p/dog": 1,
        "area/cat": 0.25,
        "area/new": 0,
        "collapse/cat": float(cat.signals.snapshot.collapse.mean.mean()),
        "score/dog": 0,
        "retained_variance/new": float(new.observation.now.rho.smooth(3).mean.mean()),
    }
    expected = {f"memwatch/{name}": pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    assert scalars | expected == scalars
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    absent = ("p/new", "collapse/new", "collapse_null/cat", "score_null/cat", "loss_log_ratio/cat")
    assert not any(f"memwatch/{name}" in scalars for name in absent)


def test_only_controls_that_were_judged_have_a_severity():
    good, broken, new = controls(13, 1.0)[:11], *controls(13, 1.0)[11:]
    report = report_of(seen("cat"), *good, replace(broken, now=measured(math.nan)), replace(new, baseline=None))
    assert report.controls == {control.name: 1.0 for control in good}
    first = report_of(seen("cat", baseline=None), *(replace(control, baseline=None) for control in good))
    absent = ("min_p", "p/cat", "control_score", "called_from", "control_severity")
    assert not any(f"memwatch/{name}" in first.scalars() for name in absent)


def test_maps_that_exist_are_logged():
    report = report_of(seen("cat", eps=measured(0.5).epsilon + 1, unconditional=measured(0.5)))
    for name in ("collapse", "score", "collapse_null", "score_null", "loss_log_ratio"):
        expected = report.findings[0].signals.maps()[name].mean.mean()
        assert report.scalars()[f"memwatch/{name}/cat"] == pytest.approx(float(expected))
    broken = report_of(seen("cat", now=measured(math.nan)))
    assert broken.scalars()["memwatch/num_inconclusive"] == 1
    assert "memwatch/retained_variance/cat" not in broken.scalars()


def test_an_alert_explains_itself():
    report = report_of(seen("cat"), *controls(20, 1.0, spread=0.3))
    (finding,) = report.alerts
    (region,) = finding.regions
    assert report.alert_text(finding).splitlines() == [
        f"memwatch, step 7: a photo of cat (cat) is suspicious: {finding.reason}.",
        f"score {finding.evidence.z_score:.1f}, p = {finding.p:.2g} ({finding.evidence.lasting_p:.2g} by three events) "
        "against 20 controls",
        f"region (0, 0, 1, 4) px, 25% of the image: {math.exp(region.effect):.1f}x reduction "
        f"(log ratio {region.effect:.2f} ± {region.sem:.2f})",
        "baseline: step 0.",
        "prompt: 'a photo of cat'",
    ]
    report = report_of(seen("cat"))
    assert "score" not in report.alert_text(report.alerts[0])  # there are no controls


@pytest.mark.parametrize(
    ("signals", "parts", "words"),
    [
        ({}, {}, "step 0"),
        ({}, {"baseline_step": 40}, "step 40"),
        ({}, {"unconditional": measured(0.5)}, "step 0 and the model's own unconditional branch"),
        ({"against": "snapshot"}, {"unconditional": measured(0.5)}, "step 0"),
        ({"against": "unconditional"}, {"unconditional": measured(0.5)}, "the model's own unconditional branch"),
        ({"baseline": "base"}, {"baseline_step": None}, "the base model (LoRA off)"),
        ({"baseline": "path:a.safetensors"}, {"baseline_step": None}, "a.safetensors"),
        ({}, {"baseline": None, "baseline_step": None}, "none yet"),
        ({"against": "unconditional"}, {}, "none yet"),
    ],
)
def test_what_a_probe_was_compared_with_in_words(signals, parts, words):
    report = report_of(seen("cat", **parts), settings={"signals": signals})
    assert report.baseline_text(report.findings[0]) == words


def test_the_line_of_the_history_is_plain_and_complete():
    report = report_of(seen("cat"), seen("new", baseline=None), *controls(20, 1.0, spread=0.3))
    line, found = report.to_dict(), report.findings[0]
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    cat, new = line.pop("findings")
    assert line == {
        "step": 7,
        "controls": report.controls,
        "calibrated": True,
        "standing": str(report.judgement.standings["reference"]),
        "scalars": report.scalars(),
        "seconds": 1.5,
        "overhead": None,
        "errors": 2,
        "stop_reason": None,
        "failure": None,
    }
    (region,) = found.regions
    assert region.area == 0.25  # the filter leaves one column of two on a map as small as this
    assert cat == {
        "name": "cat",
        "title": "a photo of cat (cat)",
        "prompt": "a photo of cat",
        "is_reference": True,
        "reason": found.reason,
        "severity": found.severity,
        "p": found.p,
        "lasting_p": found.evidence.lasting_p,
        "z_score": found.evidence.z_score,
        "baseline": "step 0",
        "baseline_step": 0,
        "since": 7,
        "verdict": "suspicious",
        "alert": True,
        "alert_text": report.alert_text(found),
        "timesteps": [61],
        "levels": [pytest.approx(math.exp(found.signals.deciding.mean.max()))],  # a sixteenth of 16 pixels is one
        "regions": [asdict(region) | {"box": [0, 0, 1, 4]}],
        "copied": None,
    }
    assert (new["z_score"], new["p"], new["verdict"]) == (None, None, "inconclusive")
    assert (new["baseline"], new["alert_text"], new["levels"]) == ("none yet", None, [])


def test_a_report_of_a_failed_event_says_so_and_claims_nothing():
    report = report_of(judgement=Judgement(), failure="looking at the model failed: OutOfMemoryError('8 GiB')")
    few = {"memwatch/step": 7, "memwatch/seconds": 1.5, "memwatch/errors": 2, "memwatch/stop": 0}
    assert report.scalars() == few  # no severity of 1, which would say that nothing is stored
    assert (report.to_dict()["failure"], report.to_dict()["findings"], report.alerts) == (report.failure, [], ())


def test_the_curve_of_a_level_is_the_mean_of_its_highest_sixteenth():
    levels = torch.full((2, 8, 8), -1.0)  # what has got worse counts as unchanged
    levels[0, 3, 2:6] = torch.tensor([0.4, 0.6, 0.8, 1.0])  # 4 of 64 pixels
    levels[1, 0, 0] = 2.0
    signals = SimpleNamespace(deciding=SimpleNamespace(mean=levels))
    assert level_factors(signals) == pytest.approx([math.exp(0.7), math.exp(0.5)])
    assert level_factors(None) == level_factors(SimpleNamespace(deciding=None)) == []
