"""The HTTP server: routes, headers, errors, the limit on connections, and invalid handshakes."""

import json
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.harness import (
    DEADLINE,
    ROLES,
    UPGRADE,
    Blocked,
    RawClient,
    ServerProcess,
    eventually,
    exchange,
    frame,
    free_port,
    request,
    rows,
    server,
)

from ringolib import __version__
from ringolib.net.frames import MAX_MESSAGE
from ringolib.wire import encode_plain

UUID4 = re.compile(r"[0-9A-F]{8}-[0-9A-F]{4}-4[0-9A-F]{3}-[89AB][0-9A-F]{3}-[0-9A-F]{12}")
OCTETS = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module", params=["publisher", "consumer"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp(request.param)
    with server(directory, "-N", "Ringo the 1st", *ROLES[request.param]) as process:
        process.database = directory / "ringoexp.db"  # type: ignore[attr-defined]
        yield process


def values(running: ServerProcess) -> list[int]:
    return [value for _, _, value in rows(running.database)]  # type: ignore[attr-defined]


def post(headers: str, body: bytes = b"") -> bytes:
    return f"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n".encode() + body


def status(answer: bytes) -> int:
    return int(answer.split()[1])


@pytest.mark.parametrize("path", ["/v1.0/alive", "/v1.0/stats", "/v1.0/alive?now"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_alive_and_stats_send_the_documented_headers(running: ServerProcess, path: str, method: str) -> None:
    ids = set()
    for _ in range(2):
        code, headers, body = request(running.port, method, path)
        assert code == 200
        assert headers["Content-Type"] == "application/json;charset=utf-8"
        assert headers["Server"] == "Ringo the 1st"
        assert headers["Date"].endswith(" GMT")
        assert UUID4.fullmatch(headers["X-Request-Id"])
        ids.add(headers["X-Request-Id"])
        if method == "GET" and "stats" in path:
            assert list(json.loads(body)) == ["info", "options", "stats", "ring", "memStats"]
            assert int(headers["Content-Length"]) == len(body)
        else:
            assert body == b""
    assert len(ids) == 2


def test_server_without_a_name_says_its_version(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running, RawClient(running.port) as client:
        assert running.get("/v1.0/alive")[1]["Server"] == f"ringoexp/{__version__}"
        assert f"Server: ringoexp/{__version__}\r\n" in client.head


def test_stats_count_received_records_and_bytes(running: ServerProcess) -> None:
    before = running.stats()
    assert request(running.port, "POST", "/v1.0/ingest", encode_plain([1, 2, 3]))[0] == 200
    after = running.stats()
    for key, more in [("recordsReceived", 3), ("recordsStored", 3), ("recordsDuplicate", 0), ("bytesReceived", 24)]:
        assert after[key] == before[key] + more, key
    assert 0 < after["ackLatencyP50Ms"] <= after["ackLatencyP99Ms"]


@pytest.mark.parametrize(
    ("method", "path", "expected", "allow"),
    [
        ("GET", "/dashboard.html", 404, None),
        ("PUT", "/", 405, "GET, HEAD"),
        ("GET", "/v1.0/alive/", 404, None),
        ("GET", "/v2.0/alive", 404, None),
        ("POST", "/v1.0/nothing", 404, None),
        ("POST", "/v1.0/alive", 405, "GET, HEAD"),
        ("DELETE", "/v1.0/stats", 405, "GET, HEAD"),
        ("OPTIONS", "/v1.0/stats", 405, "GET, HEAD"),
        ("PUT", "/v1.0/ingest", 405, "GET, HEAD, POST"),
        ("GET", "/v1.0/ingest", 426, None),
        ("HEAD", "/v1.0/ingest", 426, None),
        ("BREW", "/v1.0/alive", 405, "GET, HEAD"),
    ],
)
def test_unknown_path_is_404_and_wrong_method_is_405(
    running: ServerProcess, method: str, path: str, expected: int, allow: str | None
) -> None:
    code, headers, body = request(running.port, method, path)
    assert (code, headers.get("Allow")) == (expected, allow)
    assert UUID4.fullmatch(headers["X-Request-Id"])
    if method != "HEAD":
        assert json.loads(body)["error"]
    if method == "POST" and expected == 405:
        assert json.loads(body)["error"].endswith(" supports only GET, HEAD; use POST with /v1.0/ingest")


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("application/json", 200),
        ("*/*", 200),
        ("application/*;q=0.1", 200),
        ("text/html, application/json;q=0.5", 200),
        ("text/html,application/xhtml+xml,*/*;q=0.8", 200),
        ("text/html", 406),
        ("application/json;q=0", 406),
        ("application/json;q=0, */*", 406),
        ("*/*;q=0", 406),
        ("nonsense", 406),
    ],
)
def test_accept_header_must_include_json(running: ServerProcess, accept: str, expected: int) -> None:
    for path in ("/v1.0/alive", "/v1.0/stats"):
        assert running.get(path, Accept=accept)[0] == expected
    assert request(running.port, "POST", "/v1.0/ingest", bytes(4), {"Accept": accept})[0] == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("application/json", 200), ("Application/JSON; charset=utf-8", 200), ("text/plain", 415), ("image/png", 415)],
)
def test_content_type_of_a_get_must_be_json(running: ServerProcess, kind: str, expected: int) -> None:
    assert running.get("/v1.0/alive", **{"Content-Type": kind})[0] == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (struct.pack(">i", -(2**31)), [-(2**31)]),
        (struct.pack(">q", -(2**63)), [-(2**63)]),
        (encode_plain([2**63 - 1, 0, -1]), [2**63 - 1, 0, -1]),
    ],
)
def test_post_is_answered_after_all_records_are_stored(
    running: ServerProcess, body: bytes, expected: list[int]
) -> None:
    before = len(values(running))
    code, _, answer = request(running.port, "POST", "/v1.0/ingest", body, OCTETS)
    assert (code, json.loads(answer)) == (200, {"stored": len(expected)})
    assert values(running)[before:] == expected


@pytest.mark.parametrize("size", [0, 1, 3, 5, 12])
def test_post_of_an_invalid_length_is_400(running: ServerProcess, size: int) -> None:
    code, _, answer = request(running.port, "POST", "/v1.0/ingest", bytes(size), OCTETS)
    assert code == 400 and str(size) in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        pytest.param("Connection: close", bytes(4), 411, id="no length"),
        pytest.param("Transfer-Encoding: chunked\r\nContent-Length: 4", bytes(4), 400, id="both"),
        pytest.param("Content-Length: 8", bytes(4), 400, id="fewer bytes than announced"),
        pytest.param("Content-Length: four", bytes(4), 400, id="not a number"),
        pytest.param("Content-Length: -4", bytes(4), 400, id="negative"),
        pytest.param("Content-Length: +4", bytes(4), 400, id="signed"),
        pytest.param("Content-Length: \xb2", bytes(4), 400, id="digit that is not ASCII"),
        pytest.param("Content-Length: 4\r\nContent-Length: 8", bytes(8), 400, id="two lengths"),
        pytest.param(f"Content-Length: {MAX_MESSAGE + 8}", bytes(MAX_MESSAGE + 8), 413, id="too large, all sent"),
        pytest.param(f"Content-Length: {'9' * 20}", bytes(4), 413, id="twenty digits"),
        pytest.param(f"Content-Length: {'9' * 21}", bytes(4), 400, id="more digits than h11 reads"),
        pytest.param("Content-Length: 4\r\nContent-Type: text/html", bytes(4), 415, id="another type"),
        pytest.param("Content-Length: 4\r\nOrigin: http://elsewhere", bytes(4), 403, id="foreign origin"),
        pytest.param("Content-Length: 4\r\nOrigin: null", bytes(4), 403, id="no origin"),
        pytest.param("Content-Length: 4\r\nOrigin: http://[", bytes(4), 403, id="broken origin"),
    ],
)
def test_refused_post_stores_nothing_and_its_body_is_no_request(
    running: ServerProcess, headers: str, body: bytes, expected: int
) -> None:
    before = len(values(running))
    answer = exchange(running.port, post(headers, body), half_close=True)
    assert status(answer) == expected
    assert answer.count(b"HTTP/1.1") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert len(values(running)) == before


def test_unread_body_is_not_parsed_as_a_request(running: ServerProcess) -> None:
    before = len(values(running))
    hidden = post("Content-Length: 4", bytes(4))
    for start in (
        f"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(hidden)}\r\n\r\n",
        f"POST /v1.0/alive HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(hidden)}\r\n\r\n",
    ):
        assert exchange(running.port, start.encode() + hidden).count(b"HTTP/1.1") == 1
    assert len(values(running)) == before


@pytest.mark.parametrize(
    "hiding",
    [
        pytest.param(b"Content-Length: 0\r\nContent-Length: %d", id="two lengths"),
        pytest.param(b"Content-Length : %d", id="a blank before the colon"),
        pytest.param(b"no header\r\nContent-Length: %d", id="after a malformed line"),
        pytest.param(b"X: y\r\n Content-Length: %d", id="folded"),
        pytest.param(b"X: y\rContent-Length: %d", id="after a lone CR"),
        pytest.param(b"X: y\0\r\nContent-Length: %d", id="after a NUL"),
    ],
)
def test_ambiguous_headers_do_not_smuggle_a_request(running: ServerProcess, hiding: bytes) -> None:
    """A proxy in front of the server may interpret these headers differently (RFC 9112 section 11.2)."""
    hidden = b"GET /v1.0/stats HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"GET /v1.0/alive HTTP/1.1\r\nHost: x\r\n" + hiding.replace(b"%d", b"%d" % len(hidden)) + b"\r\n\r\n"
    answer = exchange(running.port, head + hidden)
    assert answer.count(b"HTTP/1.1") == 1 and b"startTime" not in answer
    if b"\r\nContent-Length: 0" not in head:
        assert status(answer) == 400 and b"malformed header line" in answer


def test_pages_of_the_server_itself_may_write(running: ServerProcess) -> None:
    own = f"localhost:{running.port}"
    assert request(running.port, "POST", "/v1.0/ingest", bytes(4), {"Origin": f"http://{own}"})[0] == 200
    with RawClient(running.port, {"Host": own, "Origin": f"http://{own.upper()}"}) as client:
        assert client.status == 101


def test_pipelined_requests_are_answered_in_order(running: ServerProcess) -> None:
    before = len(values(running))
    data = post("Content-Length: 4", b"\0\0\0\1") + post("Content-Length: 5", b"POST ")
    data += post("Content-Length: 4", b"\0\0\0\2") + post("Content-Length: 4\r\nConnection: close", b"\0\0\0\3")
    answer = exchange(running.port, data)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"400", b"200", b"200"]
    assert values(running)[before:] == [1, 2, 3]


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET /v1.0/alive HTTP/9.9\r\n\r\n",
        b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_malformed_request_gets_an_error(running: ServerProcess, data: bytes) -> None:
    answer = exchange(running.port, data)
    assert b'{"error": ' in answer
    assert running.get("/v1.0/alive")[0] == 200


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param({"Sec-WebSocket-Key": None}, 400, id="no key"),
        pytest.param({"Sec-WebSocket-Key": "AAAA"}, 400, id="short key"),
        pytest.param({"Sec-WebSocket-Key": "?" * 24}, 400, id="key not base64"),
        pytest.param({"Sec-WebSocket-Version": None}, 426, id="no version"),
        pytest.param({"Sec-WebSocket-Version": "8"}, 426, id="old version"),
        pytest.param({"Upgrade": None}, 426, id="no upgrade"),
        pytest.param({"Upgrade": "h2c"}, 426, id="another upgrade"),
        pytest.param({"Connection": "keep-alive"}, 426, id="connection without upgrade"),
        pytest.param({"Host": None}, 400, id="no host"),
        pytest.param({"Origin": "http://elsewhere.example"}, 403, id="foreign origin"),
        pytest.param({"Origin": "http://localhost:1"}, 403, id="another port"),
        pytest.param({"Origin": "null"}, 403, id="no origin"),
        pytest.param({"Sec-WebSocket-Protocol": "\0"}, 400, id="garbled subprotocol"),
        pytest.param({"Content-Length": "5"}, 400, id="body"),
        pytest.param({"Transfer-Encoding": "chunked"}, 400, id="chunked body"),
    ],
)
def test_invalid_handshake_gets_an_http_error(
    running: ServerProcess, changed: dict[str, str | None], expected: int
) -> None:
    with RawClient(running.port, changed) as client:
        assert client.status == expected
        assert ("Sec-WebSocket-Version: 13" in client.head) == ("Sec-WebSocket-Version" in changed)
        assert "Content-Type: application/json;charset=utf-8" in client.head


def test_valid_handshake_is_answered_101(running: ServerProcess) -> None:
    with RawClient(running.port, {"Connection": "keep-alive, Upgrade", "Upgrade": "WebSocket"}) as client:
        assert client.status == 101
        lines = dict(line.split(": ", 1) for line in client.head.split("\r\n")[1:])
        lines = {name.lower(): value for name, value in lines.items()}
        assert lines["sec-websocket-accept"] == "ICX+Yqv66kxgM0FcWaLWlFLwTAI="
        assert UUID4.fullmatch(lines["x-request-id"])


@pytest.mark.parametrize("header", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_handshake_with_a_body_is_told_which_header_to_omit(running: ServerProcess, header: str) -> None:
    """No 100 Continue invites the body, even if the client asks for it."""
    lines = f"\r\nExpect: 100-continue\r\n{header}\r\n\r\n".encode()
    answer = exchange(running.port, UPGRADE.replace(b"\r\n\r\n", lines) + b"12345", half_close=True)
    assert [int(code) for code in re.findall(rb"HTTP/1.1 (\d+)", answer)] == [400]
    assert header.partition(":")[0].encode() in answer.partition(b"400 ")[2]


@pytest.mark.parametrize(
    ("headers", "before"),
    [
        pytest.param({"Content-Length": "0"}, b"", id="empty body"),
        pytest.param({"Expect": "100-continue"}, b"", id="expect"),
        pytest.param({"Connection": "close, Upgrade"}, b"", id="close"),
        pytest.param({}, b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n", id="behind another request"),
        pytest.param({}, post("Content-Length: 4", bytes(4)), id="behind a body"),
    ],
)
def test_only_the_loop_uses_the_socket_after_the_handshake(
    running: ServerProcess, headers: dict[str, str], before: bytes
) -> None:
    """The thread that has answered 101 may neither read input nor end the output."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
    head = UPGRADE.replace(b"Connection: Upgrade\r\n", b"") if "Connection" in headers else UPGRADE
    with socket.create_connection(("localhost", running.port), DEADLINE) as client:
        client.sendall(before + head[:-2] + lines + b"\r\n" + frame(2, bytes(4)))
        received = b""
        for count in range(1, 4):
            while not received.endswith(struct.pack(">Q", count)):
                data = client.recv(65536)
                assert data, received
                received += data
            client.sendall(frame(2, bytes(4)))
        assert b"HTTP/1.1 101 " in received


def test_thread_leaves_the_socket_alone_after_the_handshake(tmp_path: Path) -> None:
    """Even if it believes that a body follows, which it would discard before the close."""
    patch = "web.handler.WebHandler.lingering = True"
    with server(tmp_path, *ROLES["publisher"], patch=patch) as running:
        with RawClient(running.port) as client:
            assert client.status == 101
            for count in range(1, 4):
                client.send(frame(2, bytes(4)))
                client.acked(count)
        assert running.stop() == 0


def test_request_behind_the_handshake_is_not_answered(running: ServerProcess) -> None:
    with RawClient(running.port, behind=b"GET /v1.0/stats HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        assert client.status == 101
        assert client.closed()[0] == 1002


def test_client_that_does_not_read_the_101_is_given_up(tmp_path: Path) -> None:
    """It may have requested so much before that no response fits into the buffers."""
    patch = "web.handler.REQUEST_TIMEOUT_SECONDS = 0.5;"
    patch += "wsserver.accept_upgrade = lambda sock, *unused: sock.sendall(bytes(1 << 26))"
    with server(tmp_path, *ROLES["publisher"], "-n", "1", patch=patch) as running:
        with socket.create_connection(("localhost", running.port), DEADLINE) as client:
            client.sendall(UPGRADE)
            assert client.recv(1)
            eventually(lambda: request(running.port, "POST", "/v1.0/ingest", bytes(4))[0] == 200, "its place is free")
            assert running.stop() == 0


def test_handshake_in_http_1_0_is_refused(running: ServerProcess) -> None:
    assert status(exchange(running.port, UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0"))) == 400


def test_connection_beyond_the_limit_gets_503_but_alive_and_stats(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "2") as running:
        with RawClient(running.port) as first, RawClient(running.port) as second:
            with RawClient(running.port) as third:
                assert third.status == 503 and "Retry-After: " in third.head
            assert running.get("/v1.0/alive")[0] == 200
            assert request(running.port, "POST", "/v1.0/ingest", bytes(4))[0] == 503
            assert running.stats()["refusedConnections"] == 2
            for client in (first, second):
                client.send(frame(2, bytes(4)))
                client.acked(1)
        eventually(lambda: running.stats()["connections"] <= 1)
        with RawClient(running.port) as fourth:
            assert fourth.status == 101


@pytest.mark.slow
def test_post_not_stored_in_time_reports_the_accepted_records(tmp_path: Path) -> None:
    port = free_port()
    with server(
        tmp_path, "-p", "0", "-T", str(port), "-r", "10", patch="wsserver.INGEST_TIMEOUT_SECONDS = 1"
    ) as running:
        code, headers, body = request(running.port, "POST", "/v1.0/ingest", encode_plain(range(15)))
        answer = json.loads(body)
        assert (code, answer["accepted"]) == (503, 10)
        assert answer["error"].startswith(
            "10 of 15 records were accepted: send only the other 5 again later; the ring "
        )
        assert "Connection refused" in answer["error"], "the reason that the server knows"
        assert int(headers["Retry-After"]) > 0
        assert running.stats()["recordsRefused"] == 5
        with server(tmp_path, "-I", "false", "-p", str(port), "-D", "c.db"):
            eventually(lambda: [row[2] for row in rows(tmp_path / "c.db")] == list(range(10)))


@pytest.mark.parametrize(("count", "them"), [(1, "1 record was it"), (3, "3 records were them")])
def test_post_accepted_as_a_whole_says_not_to_send_it_again(tmp_path: Path, count: int, them: str) -> None:
    patch = "wsserver.INGEST_TIMEOUT_SECONDS = 0.5"
    with server(tmp_path, "-p", "0", "-T", str(free_port()), patch=patch) as running:
        body = json.loads(request(running.port, "POST", "/v1.0/ingest", encode_plain(range(count)))[2])
    start, _, pronoun = them.rpartition(" ")
    assert body["error"].startswith(f"{start} accepted and will be stored later: do not send {pronoun} again; not ")
    assert body["accepted"] == count and "Connection refused" in body["error"]


@pytest.mark.slow
def test_refused_connections_are_bounded_and_time_out_soon(tmp_path: Path) -> None:
    with server(
        tmp_path,
        *ROLES["publisher"],
        "-n",
        "1",
        patch="web.table.MAX_REFUSED = 5; web.handler.REFUSED_TIMEOUT_SECONDS = 0.2",
    ) as running:
        with RawClient(running.port), ExitStack() as idle:
            for _ in range(50):
                idle.enter_context(socket.create_connection(("localhost", running.port)))
            tasks = Path(f"/proc/{running.process.pid}/task")
            eventually(lambda: len(list(tasks.iterdir())) >= 5)
            assert len(list(tasks.iterdir())) < 15
            assert running.get("/v1.0/alive")[0] == 200, "idle connections beyond the limit are closed soon"
            stopping = Blocked(running.stop)
            assert stopping.result() == 0


def test_slowly_sent_request_is_ended_at_its_deadline(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", patch="web.handler.REQUEST_TIMEOUT_SECONDS = 0.5") as running:
        with socket.create_connection(("localhost", running.port), DEADLINE) as client:

            def ended() -> bool:
                try:
                    client.sendall(b"G")
                    client.settimeout(0.05)
                    return client.recv(100) == b""
                except TimeoutError:
                    return False
                except OSError:
                    return True

            eventually(ended, deadline=10)


def test_content_length_may_have_leading_zeros(running: ServerProcess) -> None:
    body = encode_plain([12345])
    zeros = post(f"Content-Length: {'0' * 19}8", body)
    answer = exchange(running.port, zeros + b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n", half_close=True)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200"]
    assert values(running)[-1] == 12345


@pytest.mark.parametrize("size", [8, 2_000_000])
def test_curl_stores_a_file(running: ServerProcess, tmp_path: Path, size: int) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    (tmp_path / "numbers.bin").write_bytes(bytes(size))
    octets = ["--data-binary", "@numbers.bin", "-H", "Content-Type: application/octet-stream"]
    command = ["curl", "-s", *octets, f"http://localhost:{running.port}/v1.0/ingest"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=DEADLINE)
    assert json.loads(done.stdout) == {"stored": size // 8}


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/1.1 x\r\n\r\n", 400),
        (b"GET /v1.0/alive\r\n\r\n", 400),
    ],
)
def test_response_to_a_malformed_request_has_a_status_line(tmp_path: Path, data: bytes, status: int) -> None:
    with server(tmp_path, *ROLES["publisher"]) as running:
        answer = exchange(running.port, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"Content-Type: application/json" in head
    assert json.loads(body)["error"]
