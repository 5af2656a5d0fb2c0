"""A web server on this machine that answers posts as a test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Mapping[str, str]]


@dataclass
class Server:
    """``replies``: status and headers of the first requests; all others get 200. ``hang``: none is answered until set.

    Attributes:
        got: the requests so far: path, headers in lower case, and the body.
    """

    replies: list[Reply] = field(default_factory=list)
    hang: threading.Event | None = None
    url: str = ""
    got: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, _, body in self.got]

    def wait_for(self, count: int) -> None:
        """Until that many requests have come."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.got) >= count, timeout=10), f"{len(self.got)} requests"


@contextmanager
def serving(*replies: Reply, hang: threading.Event | None = None, path: str = "/secret/T0/x1") -> Iterator[Server]:
    server = Server(list(replies), hang)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            with server.changed:
                number = len(server.got)
                server.got.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                server.changed.notify_all()
            if server.hang is not None:
                server.hang.wait(10)
            status, headers = server.replies[number] if number < len(server.replies) else (200, {})
            self.send_response(status)
            for key, value in ({"Content-Length": "0"} | dict(headers)).items():
                self.send_header(key, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_POST()

        def handle(self) -> None:
            with suppress(OSError):  # the other end has given up
                super().handle()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on the console."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: listening.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_port}{path}"
    try:
        yield server
    finally:
        if hang is not None:
            hang.set()
        listening.shutdown()
        listening.server_close()
        thread.join()
