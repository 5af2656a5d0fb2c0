"""Webhook: alerts as JSON to a URL, from a thread of its own, so that nothing at the other end delays training."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import urlsplit

import requests

from memwatch.act.alert import Alert
from memwatch.config import require, shown_url
from memwatch.picking.text import counted
from memwatch.report.report import Report

SLACK, DISCORD = re.compile(r"hooks\.slack(-gov)?\.com"), re.compile(r"(.+\.)?discord(app)?\.com")  # hosts
SLACK_LENGTH, DISCORD_LENGTH = 4000, 2000  # characters; Slack cuts longer texts off, Discord refuses them
TIMEOUT = 10.0  # seconds, of the connection and of each answer
PAUSES = (0.0, 1.0, 2.0, 4.0)  # seconds before each try; the later ones follow on no connection, 429 or 5xx
LONGEST = 60.0  # seconds before a try, where the server asks for a wait
ROOM = 100  # messages that may wait
FAREWELL = 5.0  # seconds that ``close`` waits at most


class WebhookError(RuntimeError):
    """Alerts were not delivered. The message shows the URL's host alone."""


class WebhookSink:
    """Posts the alerts of a report as one message. A daemon thread, started by the first one, delivers them in order.

    Alerts that cannot be delivered are dropped, and the next ``write``, or ``close``, says so. A server that answers
    late may get a message twice.

    Args:
        url: a URL, or ``$NAME`` for the URL in that environment variable.
        run: its name, for people. Of a path only the last part is shown.

    Raises:
        ConfigError: no usable URL.
    """

    name = "webhook"

    def __init__(self, url: str, run: str = "") -> None:
        self._url, self.run = resolved(url), Path(run).name
        self._queue: Queue[list[Alert] | None] = Queue()  # ``None`` ends the thread
        self._problems: deque[str] = deque()
        self._thread: threading.Thread | None = None

    def write(self, report: Report) -> None:
        """Queue the alerts of a report.

        Raises:
            WebhookError: earlier alerts were not delivered, or too many messages are waiting.
        """
        alerts = [Alert.of(report, finding) for finding in report.alerts]
        if alerts and self._queue.qsize() >= ROOM:
            self._problems.append(f"{counted(len(alerts), 'alert')} dropped, because {ROOM} messages are waiting")
        elif alerts:
            self._queue.put(alerts)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="memwatch-webhook", daemon=True)
                self._thread.start()
        self._raise_problems()

    def close(self) -> None:
        """Wait for what is queued, for at most ``FAREWELL`` seconds.

        Raises:
            WebhookError: alerts were not delivered.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(FAREWELL)
            if self._thread.is_alive():
                self._problems.append("the last alerts were not delivered before the run ended")
        self._raise_problems()

    def _raise_problems(self) -> None:
        if problems := [self._problems.popleft() for _ in range(len(self._problems))]:
            raise WebhookError(f"{shown_url(self._url)}: {'; '.join(problems)}")

    def _work(self) -> None:
        while (alerts := self._queue.get()) is not None:
            if problem := self._post(alerts):
                self._problems.append(f"{problem}; {counted(len(alerts), 'alert')} dropped")

    def _post(self, alerts: Sequence[Alert]) -> str | None:
        """Deliver one message. Returns what went wrong, in words that cannot hold the URL."""
        problem, asked = None, ""
        for pause in PAUSES:  # not by urllib3's Retry, which logs the secret part of the URL
            time.sleep(min(float(asked), LONGEST) if asked.isdecimal() else pause)
            try:
                answer = requests.post(
                    self._url,
                    json=body_of(self._url, alerts, self.run),
                    timeout=TIMEOUT,
                    allow_redirects=False,
                    auth=lambda request: request,  # instead of what ~/.netrc may hold
                )
            except Exception as error:  # it would end the thread
                problem, asked = type(error).__name__, ""
                continue
            problem = f"HTTP {answer.status_code}" if answer.status_code >= 300 else None
            if answer.status_code != 429 and answer.status_code < 500:
                break
            asked = answer.headers.get("Retry-After", "")
        return problem


def body_of(url: str, alerts: Sequence[Alert], run: str) -> dict[str, Any]:
    """JSON that the host of ``url`` takes: ``text`` for Slack, ``content`` for Discord, all fields elsewhere."""
    host, text = urlsplit(url).hostname or "", alerts[0].text
    if len(alerts) > 1:
        lines = [alert.text.partition("\n")[0].removeprefix("memwatch, ") for alert in alerts]
        text = "\n".join([f"{len(alerts)} alerts of memwatch", *lines])
    text, length = f"run {run}: {text}" if run else text, SLACK_LENGTH if SLACK.fullmatch(host) else DISCORD_LENGTH
    text = text if len(text) <= length else text[: length - 3] + "..."
    if SLACK.fullmatch(host):  # no mentions, no links
        return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
    if DISCORD.fullmatch(host):
        return {"content": text, "allowed_mentions": {"parse": []}}
    return {"text": text, "content": text, "alerts": [alert.to_dict() for alert in alerts], "run": run}


def resolved(url: str) -> str:
    """The URL of a value of ``alerts.webhook``.

    Raises:
        ConfigError: there is none; the message does not show what is there.
    """
    name = url[1:] if url.startswith("$") else ""
    found, where = (os.environ.get(name, "").strip(), f" in the environment variable {name}") if name else (url, "")
    try:
        parts = urlsplit(found)
        usable = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    usable = usable and "@" not in parts.netloc and re.fullmatch(r"[!-~]+", found) is not None
    allowed = f"https://... or http://...{where}, ASCII, without a space or a user name"
    require(usable, "alerts.webhook", url if name else "...", allowed)
    return found
