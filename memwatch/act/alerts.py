"""Alerts: a new verdict on one probe, for the user's own functions, and as JSON for a webhook."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import urlsplit

import requests

from memwatch.config import require, shown_url
from memwatch.judge.findings import Finding
from memwatch.messages import counted
from memwatch.report.report import Report

SLACK, DISCORD = re.compile(r"hooks\.slack(-gov)?\.com"), re.compile(r"(.+\.)?discord(app)?\.com")  # hosts
SLACK_LENGTH, DISCORD_LENGTH = 4000, 2000  # characters; Slack cuts longer texts off, Discord refuses them
TIMEOUT = 10.0  # seconds, of the connection and of each answer
PAUSES = (0.0, 1.0, 2.0, 4.0)  # seconds before each try; the later ones follow on no connection, 429 or 5xx
LONGEST = 60.0  # seconds before a try, where the server asks for a wait
ROOM = 100  # messages that may wait
FAREWELL = 5.0  # seconds that ``close`` waits at most


@dataclass(frozen=True)
class Alert:
    """A verdict that is news, with what a person or a program needs to act on it.

    Attributes:
        step: optimizer step of the event.
        probe: its name.
        verdict: ``memorized``, ``suspicious``, or ``inconclusive`` where the model's output is no longer finite.
        severity: reduction factor, 1 is none.
        p: p-value against the controls; ``None`` without enough of them.
        box: of the strongest region, ``(left, top, right, bottom)`` in pixels of the probe's image, or ``None``.
        area: share of the image inside that region, in [0, 1].
        copied: how many of its generations copy the region; ``None`` where nothing was generated.
        row: of the training set that the probe was picked from; ``None`` where it came otherwise.
        text: the alert in words, as the dashboards show it.
    """

    step: int
    probe: str
    verdict: str
    severity: float
    p: float | None
    box: tuple[int, int, int, int] | None
    area: float
    copied: int | None
    row: int | None
    text: str

    @classmethod
    def of(cls, report: Report, finding: Finding) -> Alert:
        """The alert of one of ``report.alerts``."""
        region = finding.regions[0] if finding.regions else None
        return cls(
            step=report.step,
            probe=finding.name,
            verdict=str(finding.verdict),
            severity=finding.severity,
            p=finding.p,
            box=None if region is None else region.box,
            area=0.0 if region is None else region.area,
            copied=None if finding.proof is None else finding.proof.copied,
            row=finding.observation.probe.row,
            text=report.alert_text(finding),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them: a number that is not finite becomes ``None``."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


# --- hooks -----------------------------------------------------------------------------------------------------------


class HookSink:
    """Calls a function with every ``Alert``, in the training loop: slow work belongs in a thread of its own."""

    def __init__(self, hook: Callable[[Alert], object], name: str = "on_alert") -> None:
        self.hook, self.name = hook, name

    def write(self, report: Report) -> None:
        """Call the hook with every alert, also with those after one at which it failed; then raise its first error."""
        errors: list[Exception] = []
        for finding in report.alerts:
            try:
                self.hook(Alert.of(report, finding))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Nothing is kept open."""


def as_hooks(on_alert: Any) -> list[HookSink]:
    """One sink per function, each with its own name, so that one that fails does not switch off another.

    Raises:
        ConfigError: ``on_alert`` is no function that takes an ``Alert``, no list or tuple of them, and not ``None``.
    """
    hooks = [] if on_alert is None else on_alert if isinstance(on_alert, list | tuple) else [on_alert]
    for hook in hooks:
        require(callable(hook), "on_alert", hook, "a function that takes an Alert, a list of them, or None")
    return [HookSink(hook, f"on_alert[{i}]" if len(hooks) > 1 else "on_alert") for i, hook in enumerate(hooks)]


# --- webhook ---------------------------------------------------------------------------------------------------------


class WebhookError(RuntimeError):
    """Alerts were not delivered. The message shows the URL's host alone."""


class WebhookSink:
    """Posts the alerts of a report as one message, from a daemon thread, so that no server delays training.

    Alerts that cannot be delivered are dropped, and the next ``write``, or ``close``, says so as a ``WebhookError``. A
    server that answers late may get a message twice.

    Args:
        url: see ``resolved``. run: its name, for people. Of a path only the last part is shown.
    """

    name = "webhook"

    def __init__(self, url: str, run: str = "") -> None:
        self._url, self.run = resolved(url), Path(run).name
        self._queue: Queue[list[Alert] | None] = Queue()  # ``None`` ends the thread
        self._problems: deque[str] = deque()
        self._thread: threading.Thread | None = None

    def write(self, report: Report) -> None:
        """Queue the alerts of a report, unless too many messages are waiting."""
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
        """Wait for what is queued, for at most ``FAREWELL`` seconds."""
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
        problem, asked, body = None, "", body_of(self._url, alerts, self.run)
        for pause in PAUSES:  # not by urllib3's Retry, which logs the secret part of the URL
            time.sleep(min(float(asked), LONGEST) if asked.isdecimal() else pause)
            how: dict[str, Any] = {"auth": lambda request: request, "allow_redirects": False}  # not by ~/.netrc
            try:
                answer = requests.post(self._url, json=body, timeout=TIMEOUT, **how)
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
    """The URL, of ``$NAME`` that in the environment variable; a ``ConfigError`` does not show what cannot be used."""
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
