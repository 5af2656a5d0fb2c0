"""The served page: for this machine alone, and made anew whenever the run has a new event."""

from __future__ import annotations

import http.client
from threading import Thread

import pytest
from support.runs import memorized, write_run

import memwatch.report.serve
from memwatch.report.serve import HOST, make_server, serve


@pytest.fixture
def ask(tmp_path):
    """Asks a running server; the address it listens at is ``ask.address``."""
    with make_server(tmp_path, 0, 5.0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        host, port = server.server_address

        def of(path="/", **headers):
            connection = http.client.HTTPConnection(host, port, timeout=10)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            connection.close()
            return answer.status, text

        of.address = host
        yield of
        server.shutdown()
        thread.join()


def test_it_listens_on_this_machine_only(ask):
    assert ask.address == HOST == "127.0.0.1"


def test_the_page_follows_the_run(ask, tmp_path):
    status, text = ask()
    assert status == 200
    assert "Waiting for the first event" in text
    write_run(tmp_path, [{"name": "cat"}], [{"step": 0}])
    assert "No evidence of anything stored" in ask()[1]
    write_run(tmp_path, [{"name": "cat"}], [{"step": 0}, {"step": 100, "rows": {"cat": memorized()}}])
    status, text = ask()
    assert "1 of 1 probes is memorized" in text
    assert 'data-renew="5.0"' in text


def test_it_is_rendered_only_when_something_is_new(ask, tmp_path, monkeypatch):
    write_run(tmp_path, [{"name": "cat"}], [{"step": 0}])
    first = ask()[1]

    def never(*args, **options):
        raise AssertionError("rendered again")

    monkeypatch.setattr(memwatch.report.serve, "render", never)
    assert ask()[1] == first


def test_a_history_of_half_a_line_waits(ask, tmp_path):
    (tmp_path / "history.jsonl").write_text('{"st', encoding="utf-8")
    assert "Waiting for the first event" in ask()[1]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"Host": "evil.example"}, 403),
        ("/", {"Host": "evil.example:80"}, 403),
        ("/", {"Host": "localhost:6007"}, 200),
        ("/", {"Host": "127.0.0.1"}, 200),
        ("/history.jsonl", {}, 404),
        ("/../../etc/passwd", {}, 404),
        ("/?again", {}, 200),
    ],
)
def test_nothing_but_the_page_and_nobody_but_this_machine(path, headers, status, ask):
    assert ask(path, **headers)[0] == status


def test_it_goes_on_until_it_is_interrupted(tmp_path, monkeypatch):
    from http.server import ThreadingHTTPServer

    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    said = []
    serve(tmp_path, 0, 5.0, said.append)
    assert said[0].startswith("report: http://127.0.0.1:")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        serve(tmp_path / "missing", 0, 5.0)
