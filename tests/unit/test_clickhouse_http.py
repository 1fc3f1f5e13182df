"""The ClickHouse HTTP client against scripted responses: which ones are errors, and of which kind."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import pytest
from support.harness import eventually
from support.scripted_server import Script, ScriptedServer

from ringolib.storage.clickhouse.http import PermanentError, RetryableError, Server
from ringolib.storage.clickhouse.schema import inspect_tables
from ringolib.storage.clickhouse.url import parse_url
from ringolib.timing import deadline_after

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n1\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


@contextmanager
def client(*scripts: Script | list[Script]) -> Iterator[tuple[Server, ScriptedServer]]:
    """Yield a client of a server that answers with this script."""
    with ScriptedServer(*scripts) as scripted:
        target = parse_url(f"clickhouse://127.0.0.1:{scripted.port}/d")
        server = Server(target, *target.hosts[0])
        try:
            yield server, scripted
        finally:
            server.close()


@pytest.mark.parametrize(
    ("response", "kind", "message"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nCode: 241. DB::Exception: no!\n",
            RetryableError,
            r"no! \(code 241\)",
        ),
        (
            b"HTTP/1.1 200 OK\r\nX-ClickHouse-Exception-Code: 62\r\nContent-Length: 0\r\n\r\n",
            PermanentError,
            r"code 62",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n", RetryableError, "received 0 bytes, expected 30"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", RetryableError, "incomplete chunked read"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", RetryableError, "answered 503: busy"),
        (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", PermanentError, "answered 403"),
        (
            b"HTTP/1.1 404 No\r\nContent-Length: 35\r\n\r\nCode: 999, e.displayText() = keeper",
            RetryableError,
            "keeper .code 999",
        ),
        (
            b"HTTP/1.1 500 x\r\n" + b"X-ClickHouse-Exception-Code: 62\r\n" * 2 + b"Content-Length: 0\r\n\r\n",
            PermanentError,
            r"code 62\)",
        ),
        (
            b"HTTP/1.1 500 x\r\nX-ClickHouse-Exception-Code: \xb2\r\nContent-Length: 0\r\n\r\n",
            RetryableError,
            "answered 500",
        ),
        (
            b"HTTP/1.1 500 x\r\nX-ClickHouse-Exception-Code: %b\r\nContent-Length: 0\r\n\r\n" % (b"9" * 5000),
            RetryableError,
            "answered 500",
        ),
        (
            b"HTTP/1.1 200 x\r\nContent-Length: 5008\r\n\r\nCode: %b. " % (b"9" * 5000),
            RetryableError,
            "answered 200: Code: 999",
        ),
        (b"HTTP/1.1 425 Too Early\r\nContent-Length: 0\r\n\r\n", RetryableError, "answered 425"),
        (b"SSH-2.0\r\n", RetryableError, "SSH"),
        (b"", RetryableError, "closed"),
    ],
)
def test_incomplete_or_failed_response_raises(response: bytes, kind: type[Exception], message: str) -> None:
    with client(response) as (server, _):
        with pytest.raises(kind, match=message) as error:
            server.post("INSERT", b"", 5)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "before",
    [
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 x\r\n\r\n" * 3,
    ],
)
def test_interim_answers_are_no_answer_of_clickhouse(before: bytes) -> None:
    with client([before + OK, [before, OK]]) as (server, _):
        assert server.query("SELECT 1", 5) == server.query("SELECT 1", 5) == [["1"]]


def test_no_content_is_the_success_of_an_insert() -> None:
    """A proxy may send it for a 200 without a body. Any other status may mean that nothing was inserted yet."""
    with client([NO_CONTENT, NO_CONTENT], b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n") as (server, scripted):
        assert server.post("INSERT", b"rows", 5) == server.post("INSERT", b"rows", 5) == b""
        server.close()
        with pytest.raises(RetryableError, match="answered 202"):
            server.post("INSERT", b"rows", 5)
    assert [request.endswith(b"\r\n\r\nrows") for request in scripted.requests] == [True] * 3


@pytest.mark.parametrize(
    "headers",
    [
        b'X-ClickHouse-Progress: {"read_rows":"1"}\r\n' * 101,
        b'X-ClickHouse-Progress: {"read_rows":"1"}\r\n' * 10_000,
        b"X-ClickHouse-Summary: %b\r\n" % (b"x" * 70_000),
    ],
)
def test_many_or_long_headers_do_not_hide_an_answer(headers: bytes) -> None:
    with client(OK[:17] + headers + OK[17:]) as (server, _):
        assert server.query("SELECT 1", 5) == [["1"]]


def test_progress_headers_are_declined() -> None:
    with client(OK) as (server, scripted):
        server.query("SELECT 1", 5)
    assert b"&send_progress_in_http_headers=0" in scripted.requests[0]


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 500,
        [b"HTTP/1.1 200 OK\r\n", *[b"X-ClickHouse-Progress: {}\r\n"] * 500],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", *[b" "] * 500],
    ],
    ids=["interim answers", "headers", "body"],
)
def test_answer_that_dribbles_ends_at_the_timeout(pieces: list[bytes]) -> None:
    with client(tuple(pieces)) as (server, _):
        started = monotonic()
        with pytest.raises(RetryableError, match="no complete answer within 0.3 s"):
            server.post("INSERT", b"", 0.3)
        assert monotonic() - started < 2


def test_deadline_limits_several_requests_together() -> None:
    slow = (b"", *[b"HTTP/1.1 100 Continue\r\n\r\n"] * 10, OK)
    with client([slow] * 5) as (server, _):
        server.deadline = deadline_after(0.5)
        started = monotonic()
        with pytest.raises(RetryableError, match="no complete answer"):
            for _ in range(5):
                server.query("SELECT 1", 5)
        assert monotonic() - started < 2


@pytest.mark.parametrize(("host", "header"), [("[::1]", b"[::1]"), ("[fe80::1%25lo]", b"[fe80::1]"), ("a.b", b"a.b")])
def test_host_header_has_no_zone(host: str, header: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with client(OK) as (server, scripted):
        name = parse_url(f"clickhouse://{host}:8123/d").hosts[0][0]
        server._endpoint = server._endpoint._replace(name=name)
        server.query("SELECT 1", 5)
    assert b"\r\nHost: %b:%d\r\n" % (header, scripted.port) in scripted.requests[0]


def test_connection_is_used_again_until_the_server_closes_it() -> None:
    closing = OK[:17] + b"Connection: close\r\n" + OK[17:]
    with client([OK, OK, closing], OK) as (server, scripted):
        for _ in range(4):
            assert server.query("SELECT 1", 5) == [["1"]]
    assert len(scripted.requests) == 4


def test_answer_without_a_request_does_not_confirm_the_next_insert() -> None:
    """The rows of an insert that no server has read would be acked."""
    with client([[NO_CONTENT, NO_CONTENT], OK], NO_CONTENT) as (server, scripted):
        assert server.post("INSERT", b"first", 5) == b""
        connection = server._connection
        assert connection
        eventually(lambda: not connection.is_reusable())
        assert server.post("INSERT", b"second", 5) == b""
    assert [request.rpartition(b"\r\n")[2] for request in scripted.requests] == [b"first", b"second"]


def test_server_that_is_no_clickhouse_is_named() -> None:
    page = b"<html>\n<p>It works!</p>\n</html>\n"
    response = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(page) + page
    with client(response) as (server, _), pytest.raises(PermanentError, match="is not a ClickHouse server"):
        inspect_tables(server, "d", None)
