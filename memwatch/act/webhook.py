"""Webhook: alerts as JSON to a URL, from a thread of its own, so that nothing at the other end delays training."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from memwatch.act.alert import Alert
from memwatch.config import require, shown_url
from memwatch.picking.text import counted
from memwatch.report.report import Report

TOKEN = "MEMWATCH_WEBHOOK_TOKEN"  # an environment variable
SLACK, DISCORD = re.compile(r"hooks\.slack(-gov)?\.com"), re.compile(r"(.+\.)?discord(app)?\.com")  # hosts
SLACK_LENGTH, DISCORD_LENGTH = 4000, 2000  # characters; Slack cuts longer texts off, Discord refuses them
THREAD = "memwatch-webhook"
TIMEOUT = 10.0  # seconds, of the connection and of each answer
RETRIES = 3  # further tries after no connection, 429 or 5xx; ``Retry-After`` is respected
BACKOFF = 1.0  # seconds; the wait between tries doubles from there
ROOM = 100  # messages that may wait
FAREWELL = 5.0  # seconds that ``close`` waits at most


class WebhookError(RuntimeError):
    """Alerts were not delivered. The message shows the URL's host alone."""


class WebhookSink:
    """Posts the alerts of a report as one message. A daemon thread, started by the first one, delivers them in order.

    Alerts that cannot be delivered are dropped, and the next ``write``, or ``close``, says so. A server that answers
    late may get a message twice.

    Args:
        url: a URL, or ``$NAME`` for the URL in that environment variable. The token in ``MEMWATCH_WEBHOOK_TOKEN`` is
            sent as a bearer token, but not to Slack and Discord, whose URL is the only secret.
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
            why = f"because {ROOM} messages are waiting"
            self._problems.append(f"{counted(len(alerts), 'alert')} dropped, {why}")
        elif alerts:
            self._queue.put(alerts)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
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

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        codes = (429, *range(500, 600))
        retry = Retry(
            RETRIES, status_forcelist=codes, allowed_methods=["POST"], backoff_factor=BACKOFF, raise_on_status=False
        )
        for name in ("urllib3.connectionpool", "urllib3.util.retry"):  # their messages show the URL
            logging.getLogger(name).addFilter(is_elsewhere)
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            session.auth = authorized  # instead of what ~/.netrc may hold
            while (alerts := self._queue.get()) is not None:
                if problem := self._post(session, alerts):
                    self._problems.append(f"{problem}; {counted(len(alerts), 'alert')} dropped")

    def _post(self, session: requests.Session, alerts: Sequence[Alert]) -> str | None:
        """Deliver one message. Returns what went wrong, in words that cannot hold the URL or the token."""
        try:
            body = body_of(self._url, alerts, self.run)
            status = session.post(self._url, json=body, timeout=TIMEOUT, allow_redirects=False).status_code
        except Exception as error:  # it would end the thread
            reason = getattr(error.args[0], "reason", None) if error.args else None  # of urllib3's MaxRetryError
            return type(reason or error).__name__
        redirected = " (memwatch does not follow redirects)" if 300 <= status < 400 else ""
        return None if status < 300 else f"HTTP {status}{redirected}"


def is_elsewhere(record: logging.LogRecord) -> bool:
    """Whether a log message comes from another thread than the webhook's."""
    return threading.current_thread().name != THREAD


def authorized(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """The request with the bearer token, unless it goes to Slack or Discord."""
    host, token = urlsplit(str(request.url)).hostname or "", os.environ.get(TOKEN, "").strip()
    if token and not SLACK.fullmatch(host) and not DISCORD.fullmatch(host):
        request.headers["Authorization"] = f"Bearer {token}"
    return request


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
