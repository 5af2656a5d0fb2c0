"""Webhook: alerts as JSON to a URL, from a thread of its own, so that nothing at the other end delays training."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from memwatch.act.alert import Alert
from memwatch.act.posting import Answer, body_of, is_chat, post
from memwatch.config import require, shown_url
from memwatch.report.report import Report

KEY, TOKEN = "alerts.webhook", "MEMWATCH_WEBHOOK_TOKEN"  # the config key; an environment variable


class WebhookError(RuntimeError):
    """Alerts did not arrive. The message holds the URL's host alone."""


class WebhookSink:
    """Posts the alerts of a report. ``write`` queues them; a daemon thread, started by the first one, delivers them.

    Alerts that gather while the thread waits become one message. What could not be delivered now waits for the next
    event, and the next ``write`` says so. A server that answers late may get a message twice.

    Args:
        url: as in ``alerts.webhook``: a URL, or ``$NAME`` for the URL in that environment variable. Where
            ``MEMWATCH_WEBHOOK_TOKEN`` is set, it goes along as a bearer token, but not to Slack and Discord.
        run: its name, for people. Of a path only the last part is told.
        timeout: of a connection's single operations, in seconds.
        retries: further tries of a message after a failure that may pass: no connection, 429, 5xx.
        every: seconds between two messages, at least.
        backoff: seconds before the first of those tries; each further one waits twice as long.
        longest_wait: seconds that memwatch waits at most where the server asks for a wait.
        room: alerts that may wait; when there are more the oldest go.
        farewell: seconds that ``close`` waits for what is still to be delivered.

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
        every: float = 10.0,
        backoff: float = 1.0,
        longest_wait: float = 60.0,
        room: int = 100,
        farewell: float = 5.0,
    ) -> None:
        self._url, self.run = resolved(url), Path(run).name
        self._token = None if is_chat(self._url) else os.environ.get(TOKEN, "").strip() or None
        self.timeout, self.retries, self.every, self.backoff = timeout, retries, every, backoff
        self.longest_wait, self.room, self.farewell = longest_wait, room, farewell
        self._waiting: deque[Alert] = deque()
        self._changed = threading.Condition()  # guards all that follows, and the queue
        self._sending, self._is_due, self._is_closing = 0, False, False
        self._problems: list[str] = []
        self._thread: threading.Thread | None = None

    def write(self, report: Report) -> None:
        """Queue the alerts of a report, and wake the thread, also for those that could not be delivered before.

        Raises:
            WebhookError: something earlier did not arrive, or alerts had to go because too many are waiting.
        """
        found = [_without_path(Alert.of(report, finding), report) for finding in report.alerts]
        with self._changed:
            self._waiting.extend(found)
            self._drop_oldest()
            problems = self._take_problems()  # before the thread can add what becomes of these alerts
            self._is_due = bool(self._waiting)
            if self._is_due and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="memwatch-webhook", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        self._raise(problems)

    def close(self) -> None:
        """Wait for what is queued, for ``farewell`` seconds.

        Raises:
            WebhookError: something did not arrive.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self.farewell)
        with self._changed:
            if missing := len(self._waiting) + self._sending:
                self._problems.append(f"{missing} alert(s) were not delivered before the run ended")
            problems = self._take_problems()
        self._raise(problems)

    def _take_problems(self) -> list[str]:
        """Each is said once. Called while the lock is held."""
        problems, self._problems = list(dict.fromkeys(self._problems)), []
        return problems

    def _raise(self, problems: Sequence[str]) -> None:
        if problems:
            raise WebhookError(f"{shown_url(self._url)}: {'; '.join(problems)}")

    def _drop_oldest(self) -> None:
        """Called while the lock is held."""
        if (surplus := len(self._waiting) - self.room) > 0:
            for _ in range(surplus):
                self._waiting.popleft()
            self._problems.append(f"{surplus} alert(s) were dropped, the oldest, because {self.room} are waiting")

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Deliver until the sink is closed and there is nothing left, or what is left cannot be delivered."""
        while alerts := self._take():
            answer, tries = self._deliver(alerts)
            with self._changed:
                self._sending = 0
                if answer.problem is not None:
                    self._keep(alerts, answer, tries)
                    if self._is_closing:
                        return
                self._changed.wait_for(lambda: self._is_closing, timeout=self.every)

    def _take(self) -> list[Alert]:
        """Everything that waits, as soon as a report has come; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_due or self._is_closing)
            alerts, self._is_due = list(self._waiting), False
            self._waiting.clear()
            self._sending = len(alerts)
            return alerts

    def _deliver(self, alerts: Sequence[Alert]) -> tuple[Answer, int]:
        """The last answer to one message, and how many tries it took."""
        try:
            body = body_of(self._url, alerts, self.run)
        except Exception as error:  # it would end the thread
            return Answer(f"{type(error).__name__} while writing the message"), 1
        for tries in range(self.retries + 1):
            answer = post(self._url, body, self.timeout, self._token)
            if answer.problem is None or not answer.may_help or tries == self.retries:
                break
            asked = answer.wait if answer.wait is not None else self.backoff * 2**tries
            time.sleep(min(asked, self.longest_wait))
        return answer, tries + 1

    def _keep(self, alerts: Sequence[Alert], answer: Answer, tries: int) -> None:
        """Note what failed; alerts that may still arrive wait for the next event. Called while the lock is held."""
        times = f" ({tries} tries)" if tries > 1 else ""
        then = "wait for the next event" if answer.may_help else "are lost to the webhook"
        self._problems.append(f"{answer.problem}{times}; {len(alerts)} alert(s) {then}")
        if answer.may_help:
            self._waiting.extendleft(reversed(alerts))
            self._drop_oldest()


def resolved(url: str) -> str:
    """The URL of a value of ``alerts.webhook``.

    Raises:
        ConfigError: the environment variable is not set, or what is there is no URL; it shows the host at most.
    """
    shown, found = _shown(url), url
    if url.startswith("$"):
        found = os.environ.get(url[1:], "").strip()
        require(bool(found), KEY, url, f"an environment variable that holds a URL; {url[1:]} is not set or is empty")
    where = f" in the environment variable {url[1:]}" if url.startswith("$") else ""
    require(_is_usable(found), KEY, shown, f"https://... or http://...{where}, ASCII, without a space or a user name")
    return found


def _shown(url: str) -> str:
    try:
        return shown_url(url)
    except ValueError:
        return "..."


def _is_usable(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return known and "@" not in parts.netloc and re.fullmatch(r"[!-~]+", url) is not None


def _without_path(alert: Alert, report: Report) -> Alert:
    """A baseline may be a file anywhere on this machine: its folder is nobody else's business."""
    kind, argument = report.config.signals.baseline_parts
    if kind != "path":
        return alert
    return replace(alert, text=alert.text.replace(argument, Path(argument).name))
