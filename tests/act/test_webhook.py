"""The webhook against a web server on this machine."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from email.utils import formatdate

import pytest
from support.alerting import alerting
from support.webhooks import serving

from memwatch.act.alert import Alert
from memwatch.act.posting import body_of, is_chat, seconds_of, text_of
from memwatch.act.webhook import WebhookError, WebhookSink
from memwatch.config import ConfigError
from memwatch.faults import Faults

SECRET = "secret"  # in the path of every URL here
FAST = {"every": 0.0, "backoff": 0.01, "timeout": 5.0}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MEMWATCH_WEBHOOK_TOKEN", raising=False)


def alerts(*names: str) -> list[Alert]:
    report = alerting(*names)
    return [Alert.of(report, finding) for finding in report.alerts]


# --- what arrives ----------------------------------------------------------------------------------------------------


def test_an_alert_arrives_with_all_that_it_says():
    report = alerting("cat")
    with serving() as server:
        sink = WebhookSink(server.url, "/home/someone/my-run", **FAST)
        sink.write(report)
        sink.close()
    ((path, headers, body),) = server.got
    (alert,) = (Alert.of(report, finding) for finding in report.alerts)
    assert path == "/secret/T0/x1"
    assert headers["content-type"] == "application/json"
    assert "authorization" not in headers
    assert body["alerts"] == [alert.to_dict() | {"box": list(alert.box)}]
    assert body["run"] == "my-run"
    assert body["text"] == body["content"] == f"run my-run: {alert.text}"


def test_a_report_without_news_posts_nothing():
    with serving() as server:
        sink = WebhookSink(server.url, **FAST)
        sink.write(alerting())
        sink.close()
    assert server.got == []


def test_the_alerts_of_a_report_are_one_message_with_a_line_each():
    with serving() as server:
        sink = WebhookSink(server.url, **FAST)
        sink.write(alerting("cat", "dog"))
        sink.close()
    (body,) = server.bodies
    first, cat, dog = body["text"].splitlines()
    assert "2 alerts" in first
    assert cat.startswith("step 7: a photo of cat (cat) is suspicious")
    assert dog.startswith("step 7: a photo of dog (dog) is suspicious")
    assert [alert["probe"] for alert in body["alerts"]] == ["cat", "dog"]


def test_what_gathers_while_a_message_waits_is_merged():
    with serving() as server:
        sink = WebhookSink(server.url, **FAST | {"every": 60.0})
        sink.write(alerting("cat"))
        server.wait_for(1)
        sink.write(alerting("dog", step=8))
        sink.write(alerting("fox", step=9))
        time.sleep(0.1)
        assert len(server.got) == 1
        sink.close()
    assert [[alert["probe"] for alert in body["alerts"]] for body in server.bodies] == [["cat"], ["dog", "fox"]]


def test_a_token_comes_from_the_environment_alone(monkeypatch):
    monkeypatch.setenv("MEMWATCH_WEBHOOK_TOKEN", "t0ken\n")
    with serving() as server:
        sink = WebhookSink(server.url, **FAST)
        sink.write(alerting("cat"))
        sink.close()
    assert server.got[0][1]["authorization"] == "Bearer t0ken"
    assert WebhookSink("https://hooks.slack.com/services/x")._token is None


def test_slack_gets_text_that_mentions_nobody():
    alert = replace(alerts("cat")[0], text="<!channel> cat & dog")
    assert body_of("https://hooks.slack.com/services/x", [alert], "") == b'{"text": "&lt;!channel&gt; cat &amp; dog"}'


@pytest.mark.parametrize("host", ["discord.com", "discordapp.com", "ptb.discord.com"])
def test_discord_gets_content_that_fits(host):
    alert = replace(alerts("cat")[0], text="@everyone " + "x" * 3000)
    body = body_of(f"https://{host}/api/webhooks/1/x", [alert], "")
    assert b'"allowed_mentions": {"parse": []}' in body
    assert b'"text"' not in body
    assert len(text_of([alert], "run", 2000)) == 2000
    many = [replace(alert, text=f"memwatch, step {i}: {'x' * 90}\nmore") for i in range(100)]
    text = text_of(many, "run", 2000)
    told = text.count("step")
    assert len(text) <= 2000
    assert text.endswith(f"and {100 - told} more")
    assert "memwatch, step" not in text


def test_hosts_that_only_look_like_them_are_others():
    assert is_chat("https://hooks.slack.com/x")
    assert not is_chat("https://notdiscord.com/x")
    assert not is_chat("https://example.com/hooks.slack.com")


def test_a_number_that_is_not_finite_is_null():
    alert = replace(alerts("cat")[0], severity=float("inf"))
    assert b'"severity": null' in body_of("https://example.com", [alert], "")


def test_the_folder_of_a_baseline_stays_here(tmp_path):
    file = tmp_path / "private" / "weights.safetensors"
    report = alerting("cat", baseline=f"path:{file}")
    finding = report.judgement.findings[0]
    observation = replace(finding.observation, baseline_step=None)
    judgement = replace(report.judgement, findings=(replace(finding, observation=observation),))
    with serving() as server:
        sink = WebhookSink(server.url, **FAST)
        sink.write(replace(report, judgement=judgement))
        sink.close()
    (body,) = server.bodies
    assert "baseline: weights.safetensors" in body["text"]
    assert "private" not in str(body)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_webhook_that_hangs_delays_nothing():
    with serving(hang=threading.Event()) as server:
        sink = WebhookSink(server.url, **FAST, farewell=0.05)
        for step in range(20):
            sink.write(alerting("cat", step=step))
        server.wait_for(1)
        assert len(server.got) == 1  # and nothing has been answered
        with pytest.raises(WebhookError, match=r"20 alert\(s\) were not delivered before the run ended"):
            sink.close()


def test_no_answer_is_a_failure_that_says_how_long_it_waited():
    with serving(hang=threading.Event()) as server:
        sink = WebhookSink(server.url, **FAST | {"timeout": 0.05}, retries=0)
        sink.write(alerting("cat"))
        with pytest.raises(WebhookError, match=r"no answer within 0.05 s; 1 alert"):
            sink.close()


def test_a_server_error_is_tried_again():
    with serving((500, {}), (502, {})) as server:
        sink = WebhookSink(server.url, **FAST)
        sink.write(alerting("cat"))
        sink.close()
    assert len(server.got) == 3
    assert server.bodies[0] == server.bodies[2]


@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_that_the_server_asks_for_is_kept_within_bounds(status, monkeypatch):
    waits = []
    monkeypatch.setattr("memwatch.act.webhook.time.sleep", waits.append)
    with serving((status, {"Retry-After": "7"}), (status, {"Retry-After": "9999"}), (status, {})) as server:
        sink = WebhookSink(server.url, **FAST | {"backoff": 1.0}, longest_wait=30)
        sink.write(alerting("cat"))
        sink.close()
    assert len(server.got) == 4
    assert waits == [7, 30, 4]


@pytest.mark.parametrize("status", [400, 401, 404, 410])
def test_a_refusal_is_not_tried_again(status):
    with serving((status, {"Retry-After": "1"})) as server:
        sink = WebhookSink(server.url, **FAST)
        sink.write(alerting("cat"))
        with pytest.raises(WebhookError, match=rf"HTTP {status}; 1 alert\(s\) are lost"):
            sink.close()
    assert len(server.got) == 1


def test_what_did_not_arrive_goes_with_the_next_event_and_is_counted_once(caplog):
    faults = Faults()
    with serving((500, {}), (500, {})) as server:
        sink = WebhookSink(server.url, **FAST, retries=1)
        sink.write(alerting("cat"))
        server.wait_for(2)
        while sink._sending:
            time.sleep(0.01)
        with caplog.at_level(logging.WARNING), faults.surviving("the sink 'webhook'"):
            sink.write(alerting("dog", step=8))
        server.wait_for(3)
        sink.write(alerting(step=9))
        sink.close()
    assert faults.count == 1
    assert "http://127.0.0.1/...: HTTP 500 (2 tries); 1 alert(s) wait for the next event" in caplog.text
    assert [alert["probe"] for alert in server.bodies[2]["alerts"]] == ["cat", "dog"]


def test_a_refused_connection_costs_no_event():
    with serving() as server:
        url = server.url
    sink = WebhookSink(url, **FAST, retries=1)
    sink.write(alerting("cat"))
    with pytest.raises(WebhookError, match=r"ConnectionRefusedError.*\(2 tries\)"):
        sink.close()


def test_when_too_many_wait_the_oldest_go():
    gate = threading.Event()
    with serving(hang=gate) as server:
        sink = WebhookSink(server.url, **FAST, room=2)
        sink.write(alerting("a"))
        server.wait_for(1)
        sink.write(alerting("b", "c"))
        with pytest.raises(WebhookError, match=r"1 alert\(s\) were dropped, the oldest, because 2 are waiting"):
            sink.write(alerting("d"))
        sink.write(alerting())  # it was said
        gate.set()
        sink.close()
    assert [[alert["probe"] for alert in body["alerts"]] for body in server.bodies] == [["a"], ["c", "d"]]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_is_not_followed(status):
    with serving() as other, serving((status, {"Location": other.url})) as server:
        sink = WebhookSink(server.url, **FAST)
        sink.write(alerting("cat"))
        with pytest.raises(WebhookError, match=rf"HTTP {status}: a redirect to elsewhere"):
            sink.close()
    assert len(server.got) == 1
    assert other.got == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_within_the_host_gets_the_same_message(status, monkeypatch):
    monkeypatch.setenv("MEMWATCH_WEBHOOK_TOKEN", "t0ken")
    with serving((status, {"Location": "/moved"})) as server:
        sink = WebhookSink(server.url, **FAST)
        sink.write(alerting("cat"))
        sink.close()
    (_, _, before), (path, headers, after) = server.got
    assert path == "/moved"
    assert before == after
    assert headers["authorization"] == "Bearer t0ken"


@pytest.mark.parametrize("reply", [(500, {}), (404, {}), (302, {"Location": "http://example.com/secret"}), (700, {})])
def test_the_url_and_the_token_are_never_said(reply, caplog, monkeypatch):
    monkeypatch.setenv("MEMWATCH_WEBHOOK_TOKEN", "secret-token")
    with caplog.at_level(logging.DEBUG), serving(reply) as server:
        sink = WebhookSink(server.url, **FAST, retries=0)
        sink.write(alerting("cat"))
        with pytest.raises(WebhookError) as caught:
            sink.close()
    assert server.got
    assert SECRET not in str(caught.value) + repr(caught.value) + caplog.text + repr(sink)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_a_token_that_no_header_takes_is_not_said(monkeypatch):
    monkeypatch.setenv("MEMWATCH_WEBHOOK_TOKEN", "secret\r\nX: 1")
    with serving() as server:
        sink = WebhookSink(server.url, **FAST)
        sink.write(alerting("cat"))
        with pytest.raises(WebhookError) as caught:
            sink.close()
    assert server.got == []
    assert SECRET not in str(caught.value)


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_url_of_an_environment_variable(monkeypatch):
    with serving() as server:
        monkeypatch.setenv("MY_HOOK", f"{server.url}\n")
        sink = WebhookSink("$MY_HOOK", **FAST)
        sink.write(alerting("cat"))
        sink.close()
    assert len(server.got) == 1


def test_an_environment_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("MY_HOOK", raising=False)
    with pytest.raises(ConfigError, match="'alerts.webhook'.*MY_HOOK is not set"):
        WebhookSink("$MY_HOOK")


@pytest.mark.parametrize(
    "wrong",
    [
        "secret",
        "ftp://example.com/secret",
        "file:///secret",
        "https:///secret",
        "https://example.com/a secret",
        "https://user:secret@example.com/x",
        "https://example.com:secret/x",
        "https://[secret/x",
        "https://example.com/secret\N{LATIN SMALL LETTER E WITH ACUTE}",
    ],
)
def test_what_is_no_url_is_an_error_that_does_not_show_it(wrong, monkeypatch):
    monkeypatch.setenv("MY_HOOK", wrong)
    for given in (wrong, "$MY_HOOK"):
        with pytest.raises(ConfigError, match="'alerts.webhook'") as caught:
            WebhookSink(given)
        assert SECRET not in str(caught.value)


def test_retry_after_is_seconds_or_a_date():
    assert seconds_of("12") == 12
    assert seconds_of("-3") == 0
    assert seconds_of(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=3)
    assert [seconds_of(value) for value in (None, "", "soon", "inf", "nan")] == [None] * 5
