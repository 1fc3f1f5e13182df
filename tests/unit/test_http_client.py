"""The HTTP client that all answers pass through: interim answers, large heads, slow answers, reuse of a connection."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from time import monotonic

import pytest
from support.scripted_server import Script, ScriptedServer

from ringolib.net.addresses import Endpoint
from ringolib.net.http_client import MAX_BODY_BYTES, MAX_HEAD_BYTES, Head, HTTPConnection, HTTPError, open_stream
from ringolib.timing import deadline_after

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"
HOST = {"Host": "localhost"}


@contextmanager
def connected(*scripts: Script | list[Script]) -> Iterator[tuple[HTTPConnection, ScriptedServer]]:
    """Connect to a server that answers with this script."""
    with ScriptedServer(*scripts) as server:
        endpoint = Endpoint("127.0.0.1", server.port, "127.0.0.1")
        with closing(open_stream(endpoint, None, deadline_after(5))) as sock:
            yield HTTPConnection(sock), server


def get(connection: HTTPConnection, seconds: float = 5) -> tuple[Head, bytes]:
    deadline = deadline_after(seconds)
    connection.send("GET", "/", HOST, deadline)
    return connection.read_head(deadline), connection.read_body(deadline)


@pytest.mark.parametrize(
    "interim",
    [
        HINTS,
        HINTS * 3,
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n" + HINTS,
        b"HTTP/1.1 199 \r\nX: y\r\n\r\n",
        HINTS[:-2] + b"Link: </%b>\r\n\r\n" % (b"x" * 100_000),
    ],
)
def test_interim_answers_are_skipped(interim: bytes) -> None:
    with connected([interim + OK, [interim, OK]]) as (connection, _):
        for _ in range(2):
            head, body = get(connection)
            assert (head.status, head.values("Link"), body) == (200, [], b"ok")


@pytest.mark.parametrize(
    "headers",
    [
        b"X-ClickHouse-Progress: {}\r\n" * 5000,
        b"X-Long: %b\r\n" % (b"x" * 500_000),
        b"X-Folded: a\r\n b\r\n" * 150,
        b"".join(b"X-%d: y\r\n" % number for number in range(101)),
    ],
)
def test_number_of_headers_and_length_of_one_do_not_matter(headers: bytes) -> None:
    with connected(OK[:17] + headers + OK[17:]) as (connection, _):
        assert get(connection)[1] == b"ok"


def test_head_beyond_the_limit_is_refused() -> None:
    with connected(OK[:17] + b"X: %b" % (b"x" * 2 * MAX_HEAD_BYTES)) as (connection, _):
        with pytest.raises(HTTPError, match=f"the head of the answer has more than {MAX_HEAD_BYTES} bytes"):
            get(connection)


def test_body_beyond_the_limit_is_refused() -> None:
    with connected(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(MAX_BODY_BYTES + 1)) as (connection, _):
        with pytest.raises(HTTPError, match=f"the answer has more than {MAX_BODY_BYTES} bytes"):
            get(connection)


@pytest.mark.parametrize(
    "pieces",
    [
        [OK[i : i + 1] for i in range(len(OK))],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", *[b"x"] * 99],
        [HINTS] * 100,
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 100],
        [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x"] * 100],
    ],
    ids=["head", "body", "interim answers", "chunks", "body without a length"],
)
def test_answer_that_dribbles_does_not_outlast_the_deadline(pieces: list[bytes]) -> None:
    with connected(tuple(pieces)) as (connection, _):
        started = monotonic()
        with pytest.raises(TimeoutError):
            get(connection, 0.3)
        assert 0.25 < monotonic() - started < 1


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b"", ConnectionResetError, "closed the connection before it answered"),
        (HINTS, ConnectionResetError, "closed the connection before it answered"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", HTTPError, "ends within its head: b'SSH-2.0-OpenSSH_9.2"),
        (b"\x15\x03\x01\x00\x02\x02\x16", HTTPError, "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nabc", HTTPError, "received 3 bytes, expected 30"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", HTTPError, "Content-Length"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", HTTPError, "not valid"),
    ],
)
def test_answer_that_is_cut_short_or_is_not_http_is_an_error(
    answer: bytes, error: type[Exception], message: str
) -> None:
    with connected(answer) as (connection, _):
        with pytest.raises(error, match=message):
            get(connection)
        assert not connection.reusable


@pytest.mark.parametrize(
    ("answer", "reusable"),
    [
        (OK, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: y\r\n\r\n", True),
        (OK[:17] + b"Connection: Close\r\n" + OK[17:], False),
        (OK[:17] + b"Connection: TE, close\r\n" + OK[17:], False),
        (OK.replace(b"1.1", b"1.0"), False),
        (b"HTTP/1.1 200 OK\r\n\r\nok", False),
        (OK + b"HTTP/1.1 200 OK", False),
    ],
)
def test_connection_is_reused_only_if_the_server_keeps_it(answer: bytes, reusable: bool) -> None:
    with connected(answer) as (connection, _):
        get(connection)
        assert connection.reusable is reusable


def test_body_is_sent_with_its_length() -> None:
    with connected([OK, OK]) as (connection, server):
        for body in (memoryview(b"a body"), b""):
            deadline = deadline_after(5)
            connection.send("POST", "/x", {**HOST, "Content-Length": str(len(body))}, deadline, body)
            connection.read_head(deadline)
            connection.read_body(deadline)
    assert server.requests[0].endswith(b"\r\n\r\na body") and server.requests[1].endswith(b"\r\n\r\n")


def test_request_with_an_impossible_header_is_an_error() -> None:
    with connected() as (connection, _), pytest.raises(HTTPError, match="the request is not valid HTTP"):
        connection.send("GET", "/", {"Host": "a\nb"}, deadline_after(5))
