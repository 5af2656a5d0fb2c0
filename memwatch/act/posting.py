"""Posting: one message to one URL, in words that Slack, Discord and programs take. The URL is a secret all along."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from memwatch.act.alert import Alert

SLACK, DISCORD = ("hooks.slack.com", "hooks.slack-gov.com"), ("discord.com", "discordapp.com")
SLACK_LENGTH, DISCORD_LENGTH = 4000, 2000  # characters; Slack cuts longer texts off, Discord refuses them
DEFAULT_PORTS = {"http": 80, "https": 443}
TOO_MANY, UNAVAILABLE = 429, 503


@dataclass(frozen=True)
class Answer:
    """What became of one try.

    Attributes:
        problem: in words, without the URL; ``None`` when it was delivered.
        may_help: whether another try may.
        wait: seconds that the server asks to wait; ``None`` where it does not.
    """

    problem: str | None = None
    may_help: bool = False
    wait: float | None = None


def is_chat(url: str) -> bool:
    """Whether the host is Slack's or Discord's: their URL is the only secret that they take."""
    host = urlsplit(url).hostname or ""
    return host in SLACK or _is_discord(host)


def _is_discord(host: str) -> bool:
    return host in DISCORD or host.endswith(tuple(f".{name}" for name in DISCORD))


def body_of(url: str, alerts: Sequence[Alert], run: str) -> bytes:
    """JSON that the host of ``url`` takes: ``text`` for Slack, ``content`` for Discord, both and all fields elsewhere.

    Args:
        alerts: at least one. Several become one line each.
        run: its name; empty where it has none.
    """
    host = urlsplit(url).hostname or ""
    data: dict[str, Any]
    if host in SLACK:
        text = text_of(alerts, run, SLACK_LENGTH)
        data = {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}  # no mentions, no links
    elif _is_discord(host):
        data = {"content": text_of(alerts, run, DISCORD_LENGTH), "allowed_mentions": {"parse": []}}
    else:
        text = text_of(alerts, run, DISCORD_LENGTH)
        data = {"text": text, "content": text, "alerts": [_finite(alert.to_dict()) for alert in alerts], "run": run}
    return json.dumps(data, allow_nan=False).encode()


def text_of(alerts: Sequence[Alert], run: str, length: int) -> str:
    """The alerts for people, in at most ``length`` characters: one in full, several with their first line each."""
    of_run = f"run {run}: " if run else ""
    if len(alerts) == 1:
        return _cut(of_run + alerts[0].text, length)
    lines = [f"{of_run}{len(alerts)} alerts of memwatch"]
    for i, alert in enumerate(alerts):
        line = alert.text.partition("\n")[0].removeprefix("memwatch, ")
        more = f"and {len(alerts) - i} more"
        if len("\n".join([*lines, line, more])) > length:
            lines.append(more)
            break
        lines.append(line)
    return _cut("\n".join(lines), length)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities: what is not finite becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def post(url: str, body: bytes, timeout: float, token: str | None) -> Answer:
    """One try. It raises nothing, because what urllib raises may hold the URL.

    Args:
        timeout: of every single operation of the connection, in seconds.
        token: sent as a bearer token.
    """
    # Discord refuses urllib's own name
    headers = {"Content-Type": "application/json", "User-Agent": "memwatch"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    try:
        request = Request(url, body, headers, method="POST")
        with build_opener(SameHost).open(request, timeout=timeout):
            return Answer()
    except HTTPError as error:
        error.close()
        return _refused(error)
    except Exception as error:
        return Answer(_said(error, timeout), may_help=isinstance(error, OSError | HTTPException))


def _refused(error: HTTPError) -> Answer:
    code = error.code
    if 300 <= code < 400:
        return Answer(f"HTTP {code}: a redirect to elsewhere, which memwatch does not follow")
    wait = seconds_of(error.headers.get("Retry-After")) if code in (TOO_MANY, UNAVAILABLE) else None
    return Answer(f"HTTP {code}", may_help=code == TOO_MANY or code >= 500, wait=wait)


def _said(error: Exception, timeout: float) -> str:
    """An error in words that cannot hold the URL, its path or a token."""
    reason = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout:g} s"
    words = reason.strerror if isinstance(reason, OSError) else None
    return f"{type(reason).__name__}: {words}" if words else type(reason).__name__


def seconds_of(retry_after: str | None) -> float | None:
    """The header ``Retry-After``, seconds or a date, in seconds, at least 0; ``None`` where it says neither.

    >>> seconds_of("1.5")
    1.5
    """
    try:
        seconds = float(retry_after or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


class SameHost(HTTPRedirectHandler):
    """Follows a redirect only within the same host, or from there to its https, and posts the same message again."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """``None`` lets the redirect be an error. 303 asks for another message, so that it is one, too."""
        same = _origin(newurl) == _origin(req.full_url)
        to_https = _origin(newurl) == ("https", _origin(req.full_url)[1], 443)
        if code == 303 or not (same or (to_https and _origin(req.full_url)[2] == 80)):
            return None
        return Request(newurl, req.data, req.headers, method="POST")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or DEFAULT_PORTS.get(parts.scheme)
