"""The report of one event: its scalars, its words, and its line in the history."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.observations import controls, measured, peers, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import Judgement, judge_event
from memwatch.judge.verdict import Verdict
from memwatch.report.report import Report, level_factors


def report_of(observations, step: int = 7, **signals) -> Report:
    """What the callback would make of them."""
    config = load_config({"signals": signals})
    calibrated = any(o.probe.is_control for o in observations)
    return Report(step, config, judge_event(observations, {}, step, config), calibrated, 1.5, 2, None)


def test_scalars_say_what_the_findings_hold():
    observations = [seen("cat"), seen("dog", 1.0), seen("new", baseline=None), *controls(20, 1.2, spread=0.2)]
    report = report_of(observations)
    cat, dog, new = report.findings
    scalars = report.scalars()
    assert [f.verdict for f in report.findings] == [Verdict.SUSPICIOUS, Verdict.NO_EVIDENCE, Verdict.INCONCLUSIVE]
    assert 0 < cat.p < 0.01
    assert len(report.controls) == 20
    for name, value in {
        "step": 7,
        "max_severity": cat.severity,
        "min_p": cat.p,
        "num_memorized": 0,
        "num_suspicious": 1,
        "num_inconclusive": 1,
        "controls_called": 0,
        "false_alarms_at_most": 1 - 0.05 ** (1 / 20),
        "control_severity": max(f.severity for f in report.judgement.controls),
        "seconds": 1.5,
        "errors": 2,
        "stop": 0,
        "severity/cat": cat.severity,
        "severity/dog": 1,
        "p/cat": cat.p,
        "p/dog": 1,
        "area/cat": 0.5,
        "area/new": 0,
        "collapse/cat": float(cat.signals.snapshot.collapse.mean.mean()),
        "score/dog": 0,
        "retained_variance/new": float(new.observation.now.rho.smooth(3).mean.mean()),
    }.items():
        assert scalars[f"memwatch/{name}"] == pytest.approx(value, abs=1e-6), name
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    absent = ("p/new", "collapse/new", "collapse_null/cat", "score_null/cat", "loss_log_ratio/cat")
    assert not any(f"memwatch/{name}" in scalars for name in absent)
    assert dog.p == 1
    assert scalars["memwatch/control_severity"] > 1.2  # half of them have fallen by more


def test_only_controls_that_were_judged_have_a_severity():
    broken, new = (
        replace(c, **parts)
        for c, parts in zip(controls(2, 1.0), ({"now": measured(math.nan)}, {"baseline": None}), strict=True)
    )
    report = report_of(
        [
            seen("cat"),
            broken,
            new,
            *(replace(c, probe=replace(c.probe, name=f"{c.name}/good")) for c in controls(10, 1.0)),
        ]
    )
    assert set(report.controls) == {f"control/{i}/good" for i in range(10)}
    assert set(report.controls.values()) == {1.0}


def test_a_first_event_claims_nothing_of_what_it_could_not_compare():
    everything = [seen("cat"), *controls(20, 1.0)]
    report = report_of([replace(o, baseline=None, baseline_step=None) for o in everything])
    absent = ("min_p", "p/cat", "controls_called", "false_alarms_at_most", "control_severity")
    assert not any(f"memwatch/{name}" in report.scalars() for name in absent)


def test_maps_that_exist_are_logged():
    eps = measured(0.5).epsilon + 1
    report = report_of([seen("cat", eps=eps, unconditional=measured(0.5))])
    scalars = report.scalars()
    for name in ("collapse", "score", "collapse_null", "score_null", "loss_log_ratio"):
        expected = report.findings[0].signals.maps()[name].mean.mean()
        assert scalars[f"memwatch/{name}/cat"] == pytest.approx(float(expected))


def test_output_that_is_not_finite_has_no_maps_and_no_holes():
    report = report_of([seen("cat", now=measured(math.nan))])
    assert report.scalars()["memwatch/num_inconclusive"] == 1
    assert "memwatch/retained_variance/cat" not in report.scalars()
    assert report.to_dict()["findings"][0]["z_score"] is None


def test_an_alert_explains_itself():
    report = report_of([seen("cat"), *controls(20, 1.0, spread=0.3)])
    (finding,) = report.alerts
    (region,) = finding.regions
    p = f"p = {finding.p:.2g}"
    assert 1e-9 < finding.p < 0.01
    assert report.alert_text(finding).splitlines() == [
        f"memwatch, step 7: a photo of cat (cat) is suspicious: {finding.reason}.",
        f"region (0, 0, 2, 4) px, 50% of the image: {math.exp(region.effect):.1f}x less freedom "
        f"(log ratio {region.effect:.2f} ± {region.sem:.2f}), {p} against 20 controls",
        "baseline: step 0.",
        "prompt: 'a photo of cat'",
    ]
    report = report_of([seen("cat")])
    assert ", no controls\n" in report.alert_text(report.alerts[0])


def test_an_alert_names_the_second_reference_as_well():
    report = report_of([seen("cat"), *peers(12, 1.0), *controls(20, 1.0, spread=0.3)])
    (finding,) = report.alerts
    assert " against 20 controls, rank p = 0.08 against 12 training images\n" in report.alert_text(finding)


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
    report = report_of([seen("cat", **parts)], **signals)
    assert report.baseline_text(report.findings[0]) == words


def test_the_line_of_the_history_is_plain_and_complete():
    report = report_of([seen("cat"), seen("new", baseline=None), *controls(20, 1.0, spread=0.3)])
    row = report.to_dict()
    assert json.loads(json.dumps(row, allow_nan=False)) == row | {"findings": json.loads(json.dumps(row["findings"]))}
    keys = {"step", "findings", "controls", "calibrated", "audit", "scalars", "seconds", "overhead", "errors"}
    keys |= {"stop_reason", "failure"}
    assert set(row) == keys
    assert row["audit"] == str(report.judgement.audit)
    assert (row["scalars"], row["controls"]) == (report.scalars(), report.controls)
    cat, new = row["findings"]
    found = report.findings[0]
    (region,) = found.regions
    assert cat == {
        "name": "cat",
        "title": "a photo of cat (cat)",
        "prompt": "a photo of cat",
        "is_reference": True,
        "reason": found.reason,
        "severity": found.severity,
        "severity_low": found.evidence.severity_low,
        "p": found.p,
        "z_score": found.evidence.z_score,
        "baseline": "step 0",
        "baseline_step": 0,
        "since": 7,
        "verdict": "suspicious",
        "alert": True,
        "alert_text": report.alert_text(found),
        "timesteps": [61],
        "levels": [pytest.approx(math.exp(found.signals.deciding.mean.max()))],  # a sixteenth of 16 pixels is one
        "regions": [
            {
                "box": [0, 0, 2, 4],
                "area": 0.5,
                "mean": region.mean,
                "effect": region.effect,
                "sem": region.sem,
                "low": region.low,
                "z_score": found.evidence.z_score,
                "p": found.p,
                "rank_p_peers": None,
            }
        ],
        "copied": None,
    }
    assert (new["z_score"], new["p"], new["verdict"]) == (None, None, "inconclusive")
    assert (new["baseline"], new["alert_text"], new["levels"]) == ("none yet", None, [])
    assert row["calibrated"] is True


def test_a_report_of_a_failed_event_says_so_and_claims_nothing():
    config, failure = load_config(None), "looking at the model failed: OutOfMemoryError('8 GiB')"
    report = Report(8, config, Judgement(), True, 0.25, 1, None, failure=failure)
    assert report.scalars() == {
        "memwatch/step": 8,
        "memwatch/seconds": 0.25,
        "memwatch/errors": 1,
        "memwatch/stop": 0,
    }  # no severity of 1, which would say that nothing is stored
    row = json.loads(json.dumps(report.to_dict()))
    assert (row["step"], row["errors"], row["failure"], row["findings"]) == (8, 1, failure, [])
    assert (report.alerts, report.pictures) == ((), {})


def test_the_curve_of_a_level_is_the_mean_of_its_highest_sixteenth():
    levels = torch.full((2, 8, 8), -1.0)  # more freedom than before counts as none lost
    levels[0, 3, 2:6] = torch.tensor([0.4, 0.6, 0.8, 1.0])  # 4 of 64 pixels
    levels[1, 0, 0] = 2.0
    signals = SimpleNamespace(deciding=SimpleNamespace(mean=levels))
    assert level_factors(signals) == pytest.approx([math.exp(0.7), math.exp(0.5)])
    assert level_factors(None) == level_factors(SimpleNamespace(deciding=None)) == []
