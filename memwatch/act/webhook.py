"""Webhook: alerts as JSON to a URL, from a thread of its own, so that nothing at the other end delays training."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
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

KEY, TOKEN = "alerts.webhook", "MEMWATCH_WEBHOOK_TOKEN"  # the config key; an environment variable
SLACK, DISCORD = re.compile(r"hooks\.slack(-gov)?\.com"), re.compile(r"(.+\.)?discord(app)?\.com")  # host names
SLACK_LENGTH, DISCORD_LENGTH = 4000, 2000  # characters; Slack cuts longer texts off, Discord refuses them
STATUSES = (429, *range(500, 600))  # a further try may help
THREAD = "memwatch-webhook"


class WebhookError(RuntimeError):
    """Alerts were not delivered. The message shows the URL's host alone."""


class WebhookSink:
    """Posts the alerts of a report as one message. A daemon thread, started by the first one, delivers them in order.

    Alerts that cannot be delivered are dropped, and the next ``write``, or ``close``, says so once. A server that
    answers late may get a message twice.

    Args:
        url: a URL, or ``$NAME`` for the URL in that environment variable. Where ``MEMWATCH_WEBHOOK_TOKEN`` is set, it is
            sent as a bearer token, but not to Slack and Discord, whose URL is the only secret.
        run: its name, for people. Of a path only the last part is shown.
        timeout: of the connection and of each answer, in seconds.
        retries: further tries after no connection, 429 or 5xx. ``Retry-After`` is respected.
        backoff: seconds; the wait between tries doubles from there.
        room: messages that may wait.
        farewell: seconds that ``close`` waits at most.

    Raises:
        ConfigError: no usable URL.
    """

    name = "webhook"

    def __init__(
        self,
        url: str,
        run: str = "",
        *,
        timeout: float = 10.0,
        retries: int = 3,
        backoff: float = 1.0,
        room: int = 100,
        farewell: float = 5.0,
    ) -> None:
        self._url, self.run = resolved(url), Path(run).name
        self.timeout, self.room, self.farewell = timeout, room, farewell
        self._retry = Retry(
            retries, status_forcelist=STATUSES, allowed_methods=("POST",), backoff_factor=backoff, raise_on_status=False
        )
        self._queue: Queue[list[Alert] | None] = Queue()  # ``None`` ends the thread
        self._problems: deque[str] = deque()
        self._thread: threading.Thread | None = None

    def write(self, report: Report) -> None:
        """Queue the alerts of a report.

        Raises:
            WebhookError: earlier alerts were not delivered, or too many messages are waiting.
        """
        alerts, problems = [Alert.of(report, finding) for finding in report.alerts], self._take_problems()
        if alerts and self._queue.qsize() >= self.room:
            problems.append(f"{counted(len(alerts), 'alert')} dropped, because {self.room} messages are waiting")
        elif alerts:
            self._queue.put(alerts)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
                self._thread.start()
        self._raise(problems)

    def close(self) -> None:
        """Wait for what is queued, for at most ``farewell`` seconds.

        Raises:
            WebhookError: alerts were not delivered.
        """
        late = []
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(self.farewell)
            late = ["the last alerts were not delivered before the run ended"] if self._thread.is_alive() else []
        self._raise(self._take_problems() + late)

    def _take_problems(self) -> list[str]:
        return [self._problems.popleft() for _ in range(len(self._problems))]

    def _raise(self, problems: Sequence[str]) -> None:
        if problems:
            raise WebhookError(f"{shown_url(self._url)}: {'; '.join(problems)}")

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        for name in ("urllib3.connectionpool", "urllib3.util.retry"):  # their messages show the URL
            logging.getLogger(name).addFilter(is_elsewhere)
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=self._retry))
            session.mount("https://", HTTPAdapter(max_retries=self._retry))
            session.auth = authorized  # instead of what ~/.netrc may hold
            while (alerts := self._queue.get()) is not None:
                if problem := self._post(session, alerts):
                    self._problems.append(f"{problem}; {counted(len(alerts), 'alert')} dropped")

    def _post(self, session: requests.Session, alerts: Sequence[Alert]) -> str | None:
        """Deliver one message. Returns what went wrong, in words that cannot hold the URL or the token."""
        try:
            body = body_of(self._url, alerts, self.run)
            status = session.post(self._url, json=body, timeout=self.timeout, allow_redirects=False).status_code
        except Exception as error:  # it would end the thread
            cause = getattr(error.args[0], "reason", None) if error.args else None  # of urllib3's MaxRetryError
            return f"{type(cause or error).__name__}"
        if 300 <= status < 400:
            return f"HTTP {status} (memwatch does not follow redirects)"
        return None if status < 300 else f"HTTP {status}"


def is_elsewhere(record: logging.LogRecord) -> bool:
    """Whether a log message comes from another thread than the webhook's."""
    return threading.current_thread().name != THREAD


def authorized(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """The request with the bearer token, unless it goes to Slack or Discord."""
    host, token = urlsplit(request.url or "").hostname or "", os.environ.get(TOKEN, "").strip()
    request.headers["User-Agent"] = "memwatch"
    if token and not SLACK.fullmatch(str(host)) and not DISCORD.fullmatch(str(host)):
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def body_of(url: str, alerts: Sequence[Alert], run: str) -> dict[str, Any]:
    """JSON that the host of ``url`` takes: ``text`` for Slack, ``content`` for Discord, both and all fields elsewhere."""
    host, of_run = urlsplit(url).hostname or "", f"run {run}: " if run else ""
    lines = [alert.text.partition("\n")[0].removeprefix("memwatch, ") for alert in alerts]
    text = of_run + (alerts[0].text if len(alerts) == 1 else "\n".join([f"{len(alerts)} alerts of memwatch", *lines]))
    length = SLACK_LENGTH if SLACK.fullmatch(host) else DISCORD_LENGTH
    text = text if len(text) <= length else text[: length - 3] + "..."
    if SLACK.fullmatch(host):  # no mentions, no links
        return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
    if DISCORD.fullmatch(host):
        return {"content": text, "allowed_mentions": {"parse": []}}
    return {"text": text, "content": text, "alerts": [alert.to_dict() for alert in alerts], "run": run}


def resolved(url: str) -> str:
    """The URL of a value of ``alerts.webhook``.

    Raises:
        ConfigError: the environment variable is not set, or there is no URL; the message shows the host at most.
    """
    name = url[1:] if url.startswith("$") else None
    found = url if name is None else os.environ.get(name, "").strip()
    require(bool(found), KEY, url, f"an environment variable that holds a URL; {name} is not set or is empty")
    shown, usable = url if name is not None else "...", False
    with suppress(ValueError):
        parts = urlsplit(found)
        shown = shown if name is not None else shown_url(found)
        usable = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
        usable = usable and "@" not in parts.netloc and re.fullmatch(r"[!-~]+", found) is not None
    where = "" if name is None else f" in the environment variable {name}"
    require(usable, KEY, shown, f"https://... or http://...{where}, ASCII, without a space or a user name")
    return found
