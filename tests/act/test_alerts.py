"""Alerts: every one reaches every hook, and the webhook, against a web server on this machine."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from support.alerting import alerting
from support.webhooks import serving

import memwatch.act.alerts
from memwatch.act.alerts import Alert, HookSink, WebhookError, WebhookSink, as_hooks, body_of
from memwatch.config import ConfigError

SECRET = "secret"  # in the path of every URL here


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(memwatch.act.alerts, "PAUSES", (0.0,) * 4)


def post(url, *reports, run=""):
    sink = WebhookSink(url, run)
    for report in reports or [alerting("cat")]:
        sink.write(report)
    sink.close()


def alert(text: str) -> Alert:
    report = alerting("cat")
    return replace(Alert.of(report, report.alerts[0]), text=text)


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_every_alert_is_told_once_and_one_that_fails_keeps_none_from_being_told():
    told: list[Alert] = []

    def hook(alert):
        told.append(alert)
        if alert.probe != "dog":
            raise OSError(f"no line for {alert.probe}")

    report = alerting("cat", "dog", "fox")
    with pytest.raises(OSError, match="no line for cat"):
        HookSink(hook).write(report)
    HookSink(hook).write(alerting())  # which has no news
    assert told == [Alert.of(report, finding) for finding in report.alerts]
    assert [(alert.probe, alert.step, alert.verdict) for alert in told] == [
        (name, 7, "suspicious") for name in ("cat", "dog", "fox")
    ]


def test_what_is_a_hook():
    assert as_hooks(None) == as_hooks([]) == []
    assert [sink.name for sink in as_hooks(print)] == ["on_alert"]
    assert [sink.name for sink in as_hooks((print, print))] == ["on_alert[0]", "on_alert[1]"]
    for wrong in ("notify", [print, None]):
        with pytest.raises(ConfigError, match="'on_alert'.*a function that takes an Alert"):
            as_hooks(wrong)


# --- what arrives at a webhook ---------------------------------------------------------------------------------------


def test_an_alert_arrives_with_all_that_it_says():
    report = alerting("cat")
    with serving() as server:
        post(server.url, report, alerting(), run="/home/someone/my-run")  # the second one has no news
    ((path, headers, body),) = server.got
    (expected,) = (Alert.of(report, finding) for finding in report.alerts)
    assert (path, headers["content-type"]) == ("/secret/T0/x1", "application/json")
    assert body["alerts"] == [expected.to_dict() | {"box": list(expected.box)}]
    assert body["run"] == "my-run"
    assert body["text"] == body["content"] == f"run my-run: {expected.text}"


def test_the_alerts_of_a_report_are_one_message_with_a_line_each():
    with serving() as server:
        post(server.url, alerting("cat", "dog"), alerting("fox", step=8))
    assert [[one["probe"] for one in body["alerts"]] for body in server.bodies] == [["cat", "dog"], ["fox"]]
    first, cat, dog = server.bodies[0]["text"].splitlines()
    assert "2 alerts" in first
    assert cat.startswith("step 7: a photo of cat (cat) is suspicious")
    assert dog.startswith("step 7: a photo of dog (dog) is suspicious")


def test_each_host_gets_what_it_takes():
    body = body_of("https://hooks.slack.com/services/x", [alert("<!channel> cat & dog")], "")
    assert body == {"text": "&lt;!channel&gt; cat &amp; dog"}
    for host in ("discord.com", "discordapp.com", "ptb.discord.com"):
        body = body_of(f"https://{host}/api/webhooks/1/x", [alert("@everyone " + "x" * 3000)], "run")
        assert body == {"content": body["content"], "allowed_mentions": {"parse": []}}
        assert len(body["content"]) == 2000
    body = body_of("https://notdiscord.com/x", [replace(alert(""), severity=float("inf"))], "")
    assert body["alerts"][0]["severity"] is None


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_webhook_that_hangs_delays_nothing(monkeypatch):
    monkeypatch.setattr(memwatch.act.alerts, "ROOM", 2)
    monkeypatch.setattr(memwatch.act.alerts, "FAREWELL", 0.05)
    with serving(hang=threading.Event()) as server:
        sink = WebhookSink(server.url)
        sink.write(alerting("cat"))
        server.wait_for(1)  # and nothing has been answered
        sink.write(alerting("dog"))
        sink.write(alerting("fox"))
        with pytest.raises(WebhookError, match="1 alert dropped, because 2 messages are waiting"):
            sink.write(alerting("owl"))
        sink.write(alerting())  # it was said
        with pytest.raises(WebhookError, match="the last alerts were not delivered before the run ended"):
            sink.close()


def test_a_failure_that_may_pass_is_tried_again():
    with serving((500, {}), (429, {}), (502, {})) as server:
        post(server.url)
    assert len(server.got) == 4
    assert server.bodies[0] == server.bodies[3]


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([(404, {})], "HTTP 404; 1 alert dropped"),
        ([(302, {"Location": "/secret"})], "HTTP 302"),
        ([(503, {})] * 4, "HTTP 503; 1 alert dropped"),
    ],
)
def test_a_refusal_is_said_once_by_the_host_alone(replies, said, caplog):
    with caplog.at_level("INFO"), serving(*replies) as server, pytest.raises(WebhookError, match=said) as caught:
        post(server.url)
    assert len(server.got) == len(replies)
    assert str(caught.value).startswith("http://127.0.0.1/...: ")
    assert SECRET not in str(caught.value) + caplog.text


def test_a_server_that_is_gone_is_said_without_the_url(caplog):
    with serving() as server:
        url = server.url
    with caplog.at_level("INFO"), pytest.raises(WebhookError, match="ConnectionError") as caught:
        post(url)
    assert SECRET not in str(caught.value) + caplog.text


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_url_of_an_environment_variable(monkeypatch):
    with serving() as server:
        monkeypatch.setenv("MY_HOOK", f"{server.url}\n")
        post("$MY_HOOK")
    assert len(server.got) == 1
    monkeypatch.delenv("MY_HOOK")
    with pytest.raises(ConfigError, match="'alerts.webhook'.*in the environment variable MY_HOOK"):
        WebhookSink("$MY_HOOK")


WRONG = ["secret", "ftp://a.b/secret", "https:///secret", "https://a.b/a secret", "https://user:secret@a.b/x"]
WRONG += ["https://a.b:secret/x", "https://[secret/x", "https://a.b/secret\N{LATIN SMALL LETTER E WITH ACUTE}"]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_url_is_an_error_that_does_not_show_it(wrong, monkeypatch):
    monkeypatch.setenv("MY_HOOK", wrong)
    for given in (wrong, "$MY_HOOK"):
        with pytest.raises(ConfigError, match="'alerts.webhook'") as caught:
            WebhookSink(given)
        assert SECRET not in str(caught.value)
