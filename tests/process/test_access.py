"""Who may come in: the token on every route, in every way it may be shown, and never in a log."""

import http.client
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from support.harness import (
    DEADLINE,
    ROOT,
    RawClient,
    ServerProcess,
    eventually,
    free_port,
    not_ready,
    request,
    rows,
    server,
)
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from ringolib.client.producer import Producer, ProducerError
from ringolib.net.credentials import MAX_TOKEN, CredentialError, CredentialFiles, Credentials, read_token

TOKEN = "t0k-en._~+/x=="
FRAME = b"\x82\x84\x00\x00\x00\x00\x00\x00\x00\x2a"
"""42, as a client's frame."""


def log_of(running: ServerProcess) -> str:
    return running.errors.read_text()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "the token"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture
def credentials(token_file: Path) -> Credentials:
    return Credentials(CredentialFiles(token=str(token_file)))


# The token.


@pytest.mark.parametrize(
    ("authorization", "subprotocols", "admitted"),
    [
        ([f"Bearer {TOKEN}"], [], True),
        ([f"bearer  {TOKEN} "], [], True),
        (["Bearer "], [], False),
        ([f"Basic {TOKEN}"], [], False),
        ([TOKEN], [], False),
        ([f"Bearer {TOKEN[:-1]}"], [], False),
        ([f"Bearer {TOKEN}x"], [], False),
        ([f"Bearer {TOKEN}, Bearer x"], [], False),
        ([f"Bearer {TOKEN}", "Bearer x"], [], False),
        (["Bearer caf\xe9"], [], False),
        ([], [], False),
        ([], ["ringoexp.plain.v1", "bearer.t0k-en._~%2B%2Fx%3D%3D"], True),
        ([], ["bearer.t0k-en._~+%2fx%3d%3d"], True),
        ([], ["bearer.x"], False),
        ([], ["Bearer.t0k-en._~%2B%2Fx%3D%3D"], False),
        (["Bearer x"], ["bearer.t0k-en._~%2B%2Fx%3D%3D"], True),
    ],
)
def test_who_is_admitted(
    access: Credentials, authorization: list[str], subprotocols: list[str], admitted: bool
) -> None:
    assert credentials.accepts(authorization, subprotocols) is admitted


def test_without_a_token_all_are_admitted() -> None:
    assert Credentials().accepts([]) and Credentials().accepts(["Bearer x"], ["bearer.y"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"a b\n", "not a token: at most"),
        (b"a\nb\n", "not a token: at most"),
        (b"caf\xc3\xa9", "not a token"),
        (b"x=y", "not a token"),
        (b"x" * (MAX_TOKEN + 1), "not a token"),
        (b"\0", "not a token"),
    ],
)
def test_a_token_file_that_holds_none_is_refused_in_one_line_that_does_not_tell_it(
    content: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(CredentialError) as refused:
        read_token(str(path))
    text = str(refused.value)
    assert text.startswith(f"--token_file {path}: ") and said in text and "\n" not in text
    assert len(content) < 3 or content.decode("latin-1").strip() not in text


def test_a_token_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CredentialError, match="No such file"):
        read_token(str(tmp_path / "absent"))
    with pytest.raises(CredentialError, match="Is a directory"):
        read_token(str(tmp_path))


def test_the_file_comes_before_the_variable_which_must_not_be_empty(
    token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_token(None) is None
    monkeypatch.setenv("RINGOEXP_TOKEN", "other")
    assert read_token(None) == "other" and read_token(str(token_file)) == TOKEN
    monkeypatch.setenv("RINGOEXP_TOKEN", "")
    with pytest.raises(CredentialError, match="RINGOEXP_TOKEN: it is empty"):
        read_token(None)


def test_reload_keeps_the_old_token_if_the_new_one_is_none(credentials: Credentials, token_file: Path) -> None:
    token_file.write_text("")
    with pytest.raises(CredentialError):
        credentials.reload()
    assert credentials.accepts([f"Bearer {TOKEN}"])
    token_file.write_text("new")
    credentials.reload()
    assert credentials.accepts(["Bearer new"]) and not credentials.accepts([f"Bearer {TOKEN}"])


# Servers.


def test_every_route_but_alive_and_ready_wants_the_token(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        for method, path, body in (
            ("GET", "/", None),
            ("HEAD", "/", None),
            ("GET", "/v1.0/stats", None),
            ("HEAD", "/v1.0/stats", None),
            ("GET", "/metrics", None),
            ("GET", "/v1.0/ingest", None),
            ("POST", "/v1.0/ingest", b"\0\0\0\1"),
            ("GET", "/no/such/path", None),
            ("BREW", "/", None),
        ):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic dTpw"}):
                status, answered, content = request(running.port, method, path, body, headers)
                assert status == 401 and answered["WWW-Authenticate"].startswith('Bearer realm="ringoexp"'), path
                assert b"42" not in content or path == "/"
        for path in ("/v1.0/alive", "/v1.0/ready"):
            for authorization in ({}, {"Authorization": "Bearer wrong"}):
                assert running.get(path, **authorization)[0] == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        for path in ("/", "/v1.0/stats", "/metrics"):
            assert running.get(path, **right)[0] == 200
        assert running.get("/v1.0/ingest", **right)[0] == 426
        assert request(running.port, "POST", "/v1.0/ingest", b"\0\0\0\1", right)[0] == 200
        stats = json.loads(running.get("/v1.0/stats", **right)[2])["stats"]
        assert stats["recordsAcked"] == 1 and stats["recordsReceived"] == 1
        assert stats["unauthorizedRequests"] >= 7 * 3
        metrics = running.get("/metrics", **right)[2].decode()
        assert f"ringoexp_requests_unauthorized_total {stats['unauthorizedRequests']}\n" in metrics


def test_a_wrong_token_is_told_from_none(tmp_path: Path, token_file: Path) -> None:
    """RFC 6750 section 3.1."""
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        assert 'error="invalid_token"' not in running.get("/v1.0/stats")[1]["WWW-Authenticate"]
        answered = running.get("/v1.0/stats", Authorization="Bearer x")[1]
        assert 'error="invalid_token"' in answered["WWW-Authenticate"]


def test_ready_tells_a_publisher_whether_its_token_will_do(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        for authorization, right in (({}, False), ({"Authorization": f"Bearer {TOKEN}"}, True)):
            said = json.loads(running.get("/v1.0/ready", **authorization)[2])
            assert (said["ready"], said["authorized"]) == (True, right)


def test_why_a_server_is_not_ready_is_told_in_detail_to_who_has_the_token(tmp_path: Path, token_file: Path) -> None:
    flags = ["-p", "0", "-U", "127.0.0.1", "-T", str(free_port()), "--token_file", str(token_file)]
    with server(tmp_path, *flags) as running:
        for authorization, told in (({}, False), ({"Authorization": f"Bearer {TOKEN}"}, True)):
            status, _, body = running.get("/v1.0/ready", **authorization)
            (reason,) = json.loads(body)["reasons"]
            assert status == 503 and reason["code"] == "consumer_unreachable"
            assert ("127.0.0.1" in reason["detail"]) is told and reason["detail"]


def test_a_websocket_shows_the_token_in_a_header_or_a_subprotocol(tmp_path: Path, token_file: Path) -> None:
    bearer = Subprotocol("bearer.t0k-en._~%2B%2Fx%3D%3D")
    plain, batch = Subprotocol("ringoexp.plain.v1"), Subprotocol("ringoexp.batch.v1")
    with server(tmp_path, "-p", "0", "-T", "0", "-D", "a.db", "--token_file", str(token_file)) as running:
        for offered in (None, [plain], [batch], [Subprotocol("bearer.wrong")]):
            with pytest.raises(InvalidStatus) as refused, connect(running.url, subprotocols=offered):
                pass
            assert refused.value.response.status_code == 401
        with connect(running.url, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as ws:
            assert ws.subprotocol is None
            ws.send(struct.pack(">i", 1))
            ws.recv()
        for offered, selected in (([plain, bearer], plain), ([bearer, plain], plain), ([bearer], bearer)):
            with connect(running.url, subprotocols=offered) as ws:
                assert ws.subprotocol == selected
                ws.send(struct.pack(">i", 1))
                assert ws.recv() == struct.pack(">Q", 1)
        with connect(running.url, subprotocols=[bearer, batch]) as ws:
            assert ws.subprotocol == batch
            ws.send(struct.pack(">I16sQIq", 1, uuid.uuid4().bytes, 0, 1, 1))
            assert ws.recv() == struct.pack(">Q", 1)
        assert running.stop() == 0
    assert [value for _, _, value in rows(tmp_path / "a.db")] == [1] * 5


def test_the_token_in_a_url_does_not_count(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        assert running.get(f"/v1.0/stats?token={TOKEN}&access_token={TOKEN}")[0] == 401


def test_the_token_is_in_no_log_line_and_no_stats(tmp_path: Path, token_file: Path) -> None:
    """Right or wrong, in a header, a subprotocol or a URL, in the finest log."""
    wrong = "wrong-one"
    with server(tmp_path, "-d", "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        for token in (TOKEN, wrong):
            running.get("/v1.0/stats", Authorization=f"Bearer {token}")
            running.get(f"/v1.0/stats?token={token}")
            running.get(f"/v1.0/{'x' * 10}", Authorization=f"Basic {token}")
            for more in ("", ", x\x0by", ", \x7f", ",\r\n x", ", \xe9"):
                with RawClient(
                    running.port, {"Sec-WebSocket-Protocol": f"ringoexp.plain.v1, bearer.{token}{more}"}
                ) as it:
                    assert it.status in (400, 401) or token == TOKEN and not more
        told = running.get("/v1.0/stats", Authorization=f"Bearer {TOKEN}")[2].decode()
        assert "the token" in told, "the file's name is"
        assert running.stop() == 0
        for text in (log_of(running), told, running.tally):
            assert TOKEN not in text and wrong not in text
        assert log_of(running).count("event=refused") >= 6


def test_refusals_are_limited_in_the_log(tmp_path: Path, token_file: Path) -> None:
    with server(
        tmp_path,
        "-p",
        "0",
        "-T",
        "0",
        "--token_file",
        str(token_file),
        patch="status.logs.LIMIT_SECONDS = 600",
    ) as running:
        for _ in range(50):
            assert running.get("/v1.0/stats")[0] == 401
        assert running.stop() == 0
        assert log_of(running).count("status=401") <= 2 and "count=49" in log_of(running)


def test_a_refused_request_with_a_body_ends_the_connection_and_is_answered(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        status, headers, _ = request(running.port, "POST", "/v1.0/ingest", bytes(8_000_000))
        assert status == 401 and headers["Connection"] == "close"
        connection = http.client.HTTPConnection("localhost", running.port, timeout=DEADLINE)
        for _ in range(3):  # without one it goes on
            connection.request("GET", "/v1.0/stats")
            assert connection.getresponse().read() and connection.sock
        connection.close()


def test_publisher_and_send_show_the_token(tmp_path: Path, token_file: Path) -> None:
    token = ["--token_file", str(token_file)]
    with server(tmp_path, "-p", "0", "-I", "false", "-D", "c.db", *token) as consumer:
        link = ["-p", "0", "-T", str(consumer.port)]
        with server(tmp_path, *link, *token) as publisher:
            assert json.loads(publisher.get("/v1.0/ready")[2])["ready"] is True
            command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", publisher.url]
            for extra, env in ((token, {}), ([], {"RINGOEXP_TOKEN": TOKEN})):
                done = subprocess.run(
                    [*command, *extra], input=b"1\n2\n", capture_output=True, timeout=DEADLINE, env=env, cwd=tmp_path
                )
                assert done.returncode == 0, done.stderr
            done = subprocess.run(command, input=b"1\n", capture_output=True, timeout=DEADLINE, text=False, env={})
            assert done.returncode == 1 and b"401: it wants a token" in done.stderr
            assert publisher.stop() == 0
        with server(tmp_path, *link, env={"RINGOEXP_TOKEN": "wrong"}) as publisher:
            assert not json.loads(publisher.get("/v1.0/ready")[2])["ready"], "before any record"
            with RawClient(publisher.port, {"Authorization": "Bearer wrong"}) as client:
                client.send(FRAME)
                eventually(lambda: "event=link_down" in log_of(publisher))
                assert "401: it wants a token, or another one" in log_of(publisher)
                publisher.kill()
        with server(tmp_path, *link) as publisher:  # has none to show
            assert not_ready(publisher) == ["consumer_unreachable"]
    assert [value for _, _, value in rows(tmp_path / "c.db")] == [1, 2, 1, 2]


def test_a_producer_with_a_wrong_token_gives_up(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        with pytest.raises(ProducerError, match="401"), Producer(running.url, token="wrong") as producer:
            producer.send([1])
        with Producer(running.url, token=TOKEN) as producer:
            producer.send([1])


def test_sighup_takes_a_new_token(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        token_file.write_text("new\n")
        assert running.get("/v1.0/stats", Authorization="Bearer new")[0] == 401
        running.send_signal(signal.SIGHUP)
        eventually(lambda: running.get("/v1.0/stats", Authorization="Bearer new")[0] == 200)
        assert running.get("/v1.0/stats", Authorization=f"Bearer {TOKEN}")[0] == 401
        token_file.unlink()
        running.send_signal(signal.SIGHUP)
        eventually(lambda: "event=not_reloaded" in log_of(running))
        assert running.get("/v1.0/stats", Authorization="Bearer new")[0] == 200
        assert running.stop() == 0


def test_many_sighups_during_traffic_end_nothing(tmp_path: Path, token_file: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", str(port), "-T", str(port), "-D", "a.db", "--token_file", str(token_file)) as running:
        with Producer(running.url, token=TOKEN) as producer:
            for start in range(0, 50_000, 1000):
                producer.send(range(start, start + 1000))
                running.send_signal(signal.SIGHUP)
        assert producer.reconnects == 0
        assert running.stop() == 0 and running.tally.endswith("50000 stored, 0 unstored")


def test_a_signal_to_stop_is_heard_among_any_number_of_sighups(tmp_path: Path, token_file: Path) -> None:
    """They fill the buffer that wakes the main thread, while that is busy with the first."""
    patch = "net.credentials.Access.reload = lambda self: __import__('time').sleep(1)"
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file), patch=patch) as running:
        until = time.monotonic() + 0.8
        while time.monotonic() < until:
            running.send_signal(signal.SIGHUP)
        assert running.stop(deadline=15) == 0
        assert len(log_of(running).splitlines()) < 10


@pytest.mark.parametrize("variable", [None, ""])
def test_a_server_with_a_bad_token_does_not_start(tmp_path: Path, variable: str | None) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    flags = ["--token_file", str(empty)] if variable is None else []
    done = subprocess.run(
        [sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "-T", "0", *flags],
        cwd=tmp_path,
        env={} if variable is None else {"RINGOEXP_TOKEN": variable},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "it is empty: it has to hold a token, or not be given" in done.stderr


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["-H", "127.0.0.1"], False),
        (["-H", "localhost"], False),
        (["-H", "0.0.0.0"], True),
        (["-H", "::"], True),
        (["-H", "0.0.0.0", "--token_file", "the token"], False),
        (["-H", "unix:sock", "-U", "unix:sock"], False),
    ],
)
def test_who_listens_beyond_loopback_without_a_token_says_so_once(
    tmp_path: Path, token_file: Path, flags: list[str], warned: bool
) -> None:
    with server(tmp_path, "-I", "false", "-p", "0", *flags) as running:
        assert running.stop() == 0
        lines = [line for line in log_of(running).splitlines() if "event=no_token" in line]
        assert len(lines) == warned and all("level=warning" in line and "--token_file" in line for line in lines)


def test_the_profilers_port_wants_the_token_too(tmp_path: Path, token_file: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", "0", "-L", str(port), "--token_file", str(token_file)):
        path = "/debug/pprof/threads"
        assert request(port, "GET", path)[0] == 401
        assert request(port, "GET", path, headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200


def test_comparing_takes_as_long_for_one_wrong_token_as_for_another(credentials: Credentials) -> None:
    """That it goes through `hmac.compare_digest`: no measurement, which a noisy machine would spoil, but its use."""
    from ringolib.net import credentials as room

    seen = []
    original = room.hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((a, b))
        return original(a, b)

    room.hmac.compare_digest = compare  # type: ignore[assignment]
    try:
        credentials.accepts(["Bearer a"], ["bearer.b"])
    finally:
        room.hmac.compare_digest = original
    assert seen == [(b"a", TOKEN.encode()), (b"b", TOKEN.encode())]


# Limits.


def test_a_requests_head_is_limited_in_all(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        for head, status in (
            (b"GET /v1.0/alive HTTP/1.1\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"y" * 900) for n in range(50)), b"431"),
            (b"GET /v1.0/alive HTTP/1.1\r\nX: " + b"y" * 40_000 + b"\r\n", b"431"),
            (b"GET /" + b"y" * 40_000 + b" HTTP/1.1\r\n", b"414"),
            (b"GET /v1.0/alive HTTP/1.1\r\n" + b"X: y\r\n" * 101, b"431"),
            (b"GET /v1.0/alive HTTP/1.1\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"y" * 300) for n in range(90)), b"200"),
        ):
            with socket.create_connection(("localhost", running.port), DEADLINE) as sock:
                sock.sendall(head + b"\r\n")
                assert sock.recv(65536).split()[1] == status
        with socket.create_connection(("localhost", running.port), DEADLINE) as sock:
            for _ in range(10):  # each request has its own
                sock.sendall(b"GET /v1.0/alive HTTP/1.1\r\nX: " + b"y" * 20_000 + b"\r\n\r\n")
                assert sock.recv(65536).split()[1] == b"200"


def test_connections_per_address(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-H", "0.0.0.0", "--per_address", "2") as running:
        held = [RawClient(running.port) for _ in range(2)]
        assert running.get("/v1.0/alive")[0] == 200, "who only looks on is answered"
        with RawClient(running.port) as refused:
            assert refused.status == 503 and "Retry-After: 1" in refused.head
            assert b"2 from one address" in refused.sock.recv(65536) + refused._buffer
        said = running.get("/v1.0/ready")[2].decode()
        assert "all 2 connections of this address are in use (--per_address)" in said, "not all there may be"
        stats = running.stats()
        assert stats["refusedConnections"] == 1 and stats["connections"] == 2
        with socket.create_connection(("127.0.0.1", running.port), source_address=("127.0.0.2", 0)) as other:
            other.sendall(b"GET /v1.0/ingest HTTP/1.1\r\nHost: x\r\n\r\n")
            assert other.recv(65536).startswith(b"HTTP/1.1 426"), "another address has its own"
        held.pop().sock.close()

        def let_in() -> bool:
            with RawClient(running.port) as client:
                return client.status == 101

        eventually(let_in)
        for each in held:
            each.sock.close()
        assert running.stop() == 0


def test_one_address_that_floods_does_not_keep_others_out(tmp_path: Path) -> None:
    patch = "web.table.MAX_REFUSED = 5; web.handler.REFUSED_TIMEOUT_SECONDS = 600"
    with server(tmp_path, "-p", "0", "-T", "0", "-H", "0.0.0.0", "--per_address", "1", patch=patch) as running:
        flood = [socket.create_connection(("127.0.0.1", running.port), DEADLINE) for _ in range(50)]
        with socket.create_connection(("127.0.0.1", running.port), DEADLINE, ("127.0.0.2", 0)) as other:
            other.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: x\r\n\r\n")
            assert other.recv(65536).startswith(b"HTTP/1.1 200")
            other.sendall(b"GET /v1.0/stats HTTP/1.1\r\nHost: x\r\n\r\n")
            body = b""
            while not body.endswith(b"}\n"):
                body += other.recv(65536)
            stats = json.loads(body.partition(b"\r\n\r\n")[2])["stats"]
            assert stats["refusedConnections"] == 50 - 1 - 5 and stats["connections"] == 2
        for sock in flood:
            sock.close()

        def let_in() -> bool:
            try:
                return not_ready(running) == []
            except (http.client.RemoteDisconnected, ConnectionError):  # those before it are not noticed as gone yet
                return False

        eventually(let_in)
        assert running.stop() == 0


def test_threads_limit_connections(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-I", "false", "--threads", "512") as running:
        clients = [RawClient(running.port) for _ in range(512 - 128)]
        assert all(client.status == 101 for client in clients)
        with RawClient(running.port) as refused:
            assert refused.status == 503
        assert json.loads(running.get("/v1.0/stats")[2])["memStats"]["threads"] <= 512
        for client in clients:
            client.sock.close()
        assert running.stop() == 0
