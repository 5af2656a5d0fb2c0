"""Hooks: every alert reaches every function, whatever another one does."""

from __future__ import annotations

import pytest
from support.alerting import alerting

from memwatch.act.alert import Alert
from memwatch.act.hooks import HookSink, as_hooks
from memwatch.config import ConfigError


def test_a_hook_is_called_once_per_alert():
    told: list[Alert] = []
    report = alerting("cat", "dog")
    for one in (report, alerting()):  # the second one has no news
        HookSink(told.append).write(one)
    assert told == [Alert.of(report, finding) for finding in report.alerts]
    assert [(alert.probe, alert.step, alert.verdict) for alert in told] == [
        ("cat", 7, "suspicious"),
        ("dog", 7, "suspicious"),
    ]


def test_an_alert_that_fails_keeps_none_from_being_told():
    told = []

    def hook(alert):
        told.append(alert.probe)
        if alert.probe != "dog":
            raise OSError(f"no line for {alert.probe}")

    with pytest.raises(OSError, match="no line for cat"):
        HookSink(hook).write(alerting("cat", "dog", "fox"))
    assert told == ["cat", "dog", "fox"]


def test_what_is_a_hook():
    assert as_hooks(None) == as_hooks([]) == []
    assert [sink.name for sink in as_hooks(print)] == ["on_alert"]
    assert [sink.name for sink in as_hooks((print, print))] == ["on_alert[0]", "on_alert[1]"]


@pytest.mark.parametrize("wrong", ["notify", [print, None]])
def test_anything_else_is_an_error_that_names_the_argument(wrong):
    with pytest.raises(ConfigError, match="'on_alert'.*a function that takes an Alert"):
        as_hooks(wrong)
