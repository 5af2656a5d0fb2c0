"""Serve: the report page over HTTP on this machine alone, made anew whenever the run has a new event."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from memwatch.report.history import HISTORY, Run
from memwatch.report.page import render

HOST = "127.0.0.1"
WAITING = (
    '<!doctype html><meta http-equiv="refresh" content="{}"><title>memwatch</title><p>Waiting for the first event.'
)


class LivePage:
    """The page of a run, rendered when its history has changed.

    Args:
        every: seconds between two looks of the open page.
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.folder, self.every, self._lock = folder, every, Lock()
        self._stamp: tuple[int, int] | None = None
        self._page = b""

    def read(self) -> bytes:
        """The page as it is now."""
        with self._lock:
            now = stamp(self.folder)
            if now is None:
                return WAITING.format(self.every).encode()
            if now != self._stamp:
                try:
                    self._page = render(Run.read(self.folder), renew=self.every).encode()
                except ValueError:  # the first line is being written
                    return self._page or WAITING.format(self.every).encode()
                self._stamp = now
            return self._page


class Handler(BaseHTTPRequestHandler):
    """Answers ``GET /`` with the page; requests that were meant for another host are refused (DNS rebinding)."""

    def __init__(self, page: LivePage, *args: Any) -> None:
        self.page = page
        super().__init__(*args)

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if host not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN, "this page is for this machine only")
            return
        if self.path.split("?")[0] not in ("/", "/index.html"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        body = self.page.read()
        self.send_response(HTTPStatus.OK)
        for name, value in (
            ("Content-Type", "text/html; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no news."""


def make_server(folder: Path, port: int, every: float) -> ThreadingHTTPServer:
    """A server that nobody has started yet.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """
    return ThreadingHTTPServer((HOST, port), partial(Handler, LivePage(folder, every)))


def serve(folder: Path, port: int, every: float, ready: Callable[[str], object] = print) -> None:
    """Serve until Ctrl-C.

    Args:
        ready: is told where, as soon as the page can be asked for.

    Raises:
        OSError: the port is taken. FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; allowed: the output_dir of a run or of a scan")
    with make_server(folder, port, every) as server:
        ready(f"report: http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            ready("")


def stamp(folder: Path) -> tuple[int, int] | None:
    """Size and time of a run's history; ``None`` where there is none yet."""
    try:
        state = (folder / HISTORY).stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns
