"""HTTP inputs on which comparable programs have failed: what a server answers to each of them."""

import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.harness import (
    DEADLINE,
    ROLES,
    UPGRADE,
    RawClient,
    ServerProcess,
    connected,
    exchange,
    frame,
    request,
    rows,
    server,
)

TOKEN = "a-token"


@pytest.fixture(scope="module", params=["publisher", "consumer"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp(request.param)
    flags = ("--allow_origin", "https://tools.example", "--allow_host", "numbers.example")
    with server(directory, *flags, *ROLES[request.param]) as process:
        process.database = directory / "ringoexp.db"  # type: ignore[attr-defined]
        yield process


def stored(running: ServerProcess) -> int:
    return len(rows(running.database))  # type: ignore[attr-defined]


def answers(running: ServerProcess, data: bytes, half_close: bool = True) -> tuple[list[int], bytes]:
    """Send `data`, and return the statuses of the answers, and all that came, until the server closes."""
    answer = exchange(running.at, data, half_close)
    return [int(code) for code in re.findall(rb"^HTTP/1\.1 (\d+) ", answer, re.M)], answer


def post(lines: str, body: bytes = bytes(4), host: str = "localhost") -> bytes:
    return f"POST /v1.0/ingest HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body


EVIL = "evil.example:6660"


@pytest.mark.parametrize("path", ["/", "/v1.0/alive", "/v1.0/ready", "/v1.0/stats", "/metrics", "/nothing"])
def test_page_that_resolves_its_name_to_the_server_reads_nothing(running: ServerProcess, path: str) -> None:
    status, _, body = request(running.port, "GET", path, headers={"Host": EVIL})
    assert status == 421 and b"'evil.example'" in body and b"--allow_host" in body


def test_page_that_resolves_its_name_to_the_server_stores_nothing(running: ServerProcess) -> None:
    before = stored(running)
    assert answers(running, post(f"Origin: http://{EVIL}\r\n", host=EVIL))[0] == [421]
    with RawClient(running.port, {"Host": EVIL, "Origin": f"http://{EVIL}"}) as client:
        assert client.status == 421
    absolute = post(f"Origin: http://{EVIL}\r\n").replace(b"/v1.0", f"http://{EVIL}/v1.0".encode(), 1)
    assert answers(running, absolute)[0] == [421], "the target replaces Host"
    assert stored(running) == before


def test_allowed_host_is_answered(running: ServerProcess) -> None:
    assert request(running.port, "GET", "/v1.0/alive", headers={"Host": "Numbers.example:1"})[0] == 200
    assert request(running.port, "GET", "/v1.0/alive", headers={"Host": socket.gethostname()})[0] == 200


@pytest.mark.parametrize(
    "line", ["", "Host: a\r\nHost: a\r\n", "Host: a b\r\n", "Host: x:99999\r\n", "Host: x:\xb2\r\n"]
)
def test_handshake_without_one_valid_host_is_400(running: ServerProcess, line: str) -> None:
    assert answers(running, UPGRADE.replace(b"Host: localhost\r\n", line.encode("latin-1")))[0] == [400]
    get = f"GET /v1.0/alive HTTP/1.1\r\n{line}\r\n".encode("latin-1")
    assert answers(running, get)[0] == [400]


def test_blanks_behind_values_change_nothing(running: ServerProcess) -> None:
    before = stored(running)
    data = post("").replace(b"Content-Length: 4", b"Content-Length: 4 \t")
    assert answers(running, data + post("Connection: close \r\n") + post(""))[0] == [200, 200]
    assert stored(running) == before + 2
    with RawClient(running.port, {"Sec-WebSocket-Version": "13\t"}) as client:
        assert client.status == 101


def test_token_is_accepted_with_blanks_and_with_an_absolute_target(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with server(
        tmp_path, *ROLES["publisher"], "--token_file", "token", "--allow_origin", "https://a.example"
    ) as running:
        lines = f"Authorization: Bearer {TOKEN}\t\r\nConnection: close\r\n\r\n".encode()
        for target in (b"/v1.0/stats", b"http://localhost:%d/v1.0/stats" % running.port):
            data = b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n"
            assert answers(running, data + lines)[0] == [200]
            assert answers(running, data + b"\r\n")[0] == [401]
        large = b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
        assert answers(running, large)[0] == [401], "the body is not asked for"
        ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert request(running.port, "OPTIONS", "/v1.0/ingest", headers=ask)[0] == 204, "preflights carry no token"


@pytest.mark.parametrize("before", [b"\r\n", b"\n", b"\r\n\r\n"])
def test_empty_lines_before_a_request_are_skipped(running: ServerProcess, before: bytes) -> None:
    get = b"GET http://localhost:6660/v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert answers(running, before + get + before + get)[0] == [200, 200]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (b"Content-Length: 99999999", 413),
        (b"Content-Length: 4\r\nContent-Type: text/html", 415),
        (b"Content-Length: 4\r\nContent-Encoding: gzip", 415),
        (b"Content-Length: 4\r\nAccept: text/html", 406),
        (b"Content-Length: 4\r\nOrigin: http://elsewhere.example", 403),
        (b"Transfer-Encoding: gzip", 501),
        (b"Connection: keep-alive", 411),
    ],
)
def test_body_that_would_be_refused_is_not_asked_for(running: ServerProcess, lines: bytes, expected: int) -> None:
    head = b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    assert answers(running, head + lines + b"\r\n\r\n")[0] == [expected]
    elsewhere = head.replace(b"ingest", b"nothing") + b"Content-Length: 4\r\n\r\n"
    assert answers(running, elsewhere)[0] == [404]


def test_body_is_asked_for_once_and_only_if_it_has_not_come(running: ServerProcess) -> None:
    head = post("Expect: 100-continue\r\n", b"\0\0\0\7")
    with connected(running.at) as client:
        client.sendall(head[:-4])
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(head[-4:-2])
        client.sendall(head[-2:])
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert answers(running, head + post("Expect: a-miracle\r\nConnection: close\r\n"))[0] == [200, 417]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "identity, gzip", "GZIP"])
def test_compressed_body_is_not_stored(running: ServerProcess, coding: str) -> None:
    before = stored(running)
    codes, answer = answers(running, post(f"Content-Encoding: {coding}\r\n", bytes(8)))
    assert codes == [415] and b"\r\nAccept-Encoding: identity\r\n" in answer and stored(running) == before


def test_two_content_types_or_origins_are_refused(running: ServerProcess) -> None:
    kind = "Content-Type: application/octet-stream\r\n"
    assert answers(running, post(kind * 2))[0] == [400]
    assert answers(running, post("Content-Type:\r\n"))[0] == [200]
    own = f"Origin: http://localhost:{running.port}\r\n"
    assert answers(running, post(own * 2, host=f"localhost:{running.port}"))[0] == [400]
    handshake = UPGRADE.replace(b"Host: localhost\r\n", f"Host: localhost:{running.port}\r\n{own * 2}".encode())
    assert answers(running, handshake)[0] == [400]


@pytest.mark.parametrize(
    "data",
    [
        b"GET /v1.0/alive HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
        b"GET /v1.0/alive HTTP/1.0\r\nHost: localhost\r\n\r\n",
        b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\nConnection: TE, close\r\n\r\n",
        b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\nConnection: Close\r\n\r\n",
    ],
)
def test_connection_that_is_to_close_is_closed_and_says_so(running: ServerProcess, data: bytes) -> None:
    codes, answer = answers(running, data, half_close=False)
    assert codes == [200] and b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize("lines", [b"Content-Length: 10", b"Content-Length: 010", b"Transfer-Encoding: chunked"])
def test_body_of_a_handshake_is_not_read_as_frames(running: ServerProcess, lines: bytes) -> None:
    before = stored(running)
    head = UPGRADE[:-2] + lines + b"\r\n\r\n"
    assert answers(running, head + frame(2, struct.pack(">i", 5)))[0] == [400]
    assert stored(running) == before


def test_refused_upgrade_says_upgrade_and_close(running: ServerProcess) -> None:
    get = b"GET /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\n"
    for lines in (b"Connection: close\r\n", b"Connection: close, upgrade\r\nUpgrade: websocket\r\n"):
        codes, answer = answers(running, get + lines + b"\r\n", half_close=False)
        assert codes == [426]
        assert b"\r\nUpgrade: websocket\r\n" in answer and b"\r\nConnection: Upgrade, close\r\n" in answer


@pytest.mark.parametrize(
    "line", [b"OPTIONS *", b"CONNECT localhost:6660", b"CONNECT /v1.0/alive", b"TRACE /v1.0/alive"]
)
def test_methods_without_a_path_are_405(running: ServerProcess, line: bytes) -> None:
    codes, answer = answers(running, line + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert codes == [405] and b"\r\nAllow: GET, HEAD\r\n" in answer


def test_page_that_is_allowed_may_write_and_read(running: ServerProcess) -> None:
    origin = {"Origin": "https://tools.example"}
    status, fields, _ = request(running.port, "POST", "/v1.0/ingest", bytes(4), origin)
    assert status == 200 and fields["Access-Control-Allow-Origin"] == "https://tools.example"
    assert fields["Vary"] == "Origin"
    with RawClient(running.port, dict(origin)) as client:
        assert client.status == 101
    ask = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    status, fields, body = request(running.port, "OPTIONS", "/v1.0/ingest", headers=ask)
    assert (status, body) == (204, b"") and "POST" in fields["Access-Control-Allow-Methods"]
    assert "Content-Type" in fields["Access-Control-Allow-Headers"]
    ask["Origin"] = "https://evil.example"
    status, fields, _ = request(running.port, "OPTIONS", "/v1.0/ingest", headers=ask)
    assert status == 403 and "Access-Control-Allow-Origin" not in fields


def test_answers_to_pages_can_be_read_and_are_cached_apart(running: ServerProcess) -> None:
    for lines in ({"Host": EVIL}, {"Accept": "text/html"}):
        lines["Origin"] = "https://tools.example"
        status, fields, _ = request(running.port, "GET", "/v1.0/stats", headers=lines)
        assert status in (421, 406) and fields["Access-Control-Allow-Origin"] == "https://tools.example"
        assert "Link" in fields["Access-Control-Expose-Headers"], "which leads to the next page of records"
    assert request(running.port, "GET", "/")[1]["Vary"] == "Origin", "also if no page asks"


def test_body_with_two_lengths_hides_no_request(running: ServerProcess) -> None:
    get = b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n"
    two = get + b"Transfer-Encoding: chunked\r\nContent-Length: 60\r\n\r\n0\r\n\r\n"
    codes, answer = answers(running, two + get + b"\r\n")
    assert codes == [400] and b"\r\nConnection: close\r\n" in answer


def test_preflight_of_another_site_is_403_without_any_flag(tmp_path: Path) -> None:
    ask = {"Origin": "https://tools.example", "Access-Control-Request-Method": "POST"}
    with server(tmp_path, *ROLES["publisher"]) as running:
        for path in ("/v1.0/ingest", "/v1.0/stats"):
            status, _, body = request(running.port, "OPTIONS", path, headers=ask)
            assert status == 403 and b"--allow_origin https://tools.example" in body
        ask["Origin"] = f"http://localhost:{running.port}"
        assert request(running.port, "OPTIONS", "/v1.0/ingest", headers=ask)[0] == 204, "its own page"
        assert request(running.port, "OPTIONS", "/v1.0/ingest")[0] == 405, "no page"


def test_null_origin_is_warned_of_at_start(tmp_path: Path) -> None:
    for flags, expected in (((), 0), (("--allow_origin", "null"), 1)):
        with server(tmp_path, *ROLES["publisher"], *flags) as running:
            assert running.errors.read_text().count("level=warning event=null_origin") == expected


def test_device_that_invents_an_origin_is_told_what_to_do(running: ServerProcess) -> None:
    status, _, body = request(running.port, "POST", "/v1.0/ingest", bytes(4), {"Origin": "file://"})
    assert status == 403 and b"'file://'" in body and b"--allow_origin" in body


@pytest.mark.slow
def test_idle_connection_outlives_the_limit_of_a_request(tmp_path: Path) -> None:
    """A request has its time from its first byte on; between two requests another limit holds."""
    patch = "web.handler.REQUEST_TIMEOUT_SECONDS = 0.5; web.handler.IDLE_TIMEOUT_SECONDS = 2"
    get = b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server(tmp_path, *ROLES["publisher"], patch=patch) as running, connected(running.at) as client:
        client.settimeout(1)
        client.sendall(get)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.sendall(get)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.settimeout(DEADLINE)
        assert client.recv(1) == b"", "it is closed in the end"
