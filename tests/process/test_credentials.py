"""Authentication: the token on every route, in a header or a subprotocol, and never in a log."""

import hmac
import http.client
import json
import signal
import struct
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from support.harness import (
    DEADLINE,
    ROOT,
    RawClient,
    eventually,
    frame,
    free_port,
    not_ready,
    request,
    rows,
    server,
)

from ringolib.client.producer import Producer, ProducerError
from ringolib.net.credentials import MAX_TOKEN_LENGTH, CredentialError, CredentialFiles, Credentials, read_token

TOKEN = "t0k-en._~+/x=="


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
    ("authorization", "subprotocols", "accepted"),
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
def test_token_is_accepted_in_header_or_subprotocol(
    credentials: Credentials, authorization: list[str], subprotocols: list[str], accepted: bool
) -> None:
    assert credentials.accepts(authorization, subprotocols) is accepted


def test_server_without_token_accepts_all_requests() -> None:
    assert Credentials().accepts([]) and Credentials().accepts(["Bearer x"], ["bearer.y"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the token is empty"),
        (b" \n", "the token is empty"),
        (b"a b\n", "malformed token: expected at most"),
        (b"a\nb\n", "malformed token: expected at most"),
        (b"caf\xc3\xa9", "malformed token"),
        (b"x=y", "malformed token"),
        (b"x" * (MAX_TOKEN_LENGTH + 1), "malformed token"),
        (b"\0", "malformed token"),
    ],
)
def test_malformed_token_is_an_error_that_does_not_show_it(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(CredentialError) as refused:
        read_token(str(path))
    text = str(refused.value)
    assert text.startswith(f"--token_file {path}: ") and reason in text and "\n" not in text
    assert len(content) < 3 or content.decode("latin-1").strip() not in text


def test_unreadable_token_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CredentialError, match="No such file"):
        read_token(str(tmp_path / "absent"))
    with pytest.raises(CredentialError, match="Is a directory"):
        read_token(str(tmp_path))


def test_token_file_overrides_variable(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_token(None) is None
    monkeypatch.setenv("RINGOEXP_TOKEN", "other")
    assert read_token(None) == "other" and read_token(str(token_file)) == TOKEN
    monkeypatch.setenv("RINGOEXP_TOKEN", "")
    with pytest.raises(CredentialError, match="RINGOEXP_TOKEN: the token is empty"):
        read_token(None)


def test_reload_keeps_old_token_if_new_one_is_malformed(credentials: Credentials, token_file: Path) -> None:
    token_file.write_text("")
    with pytest.raises(CredentialError):
        credentials.reload()
    assert credentials.accepts([f"Bearer {TOKEN}"])
    token_file.write_text("new")
    credentials.reload()
    assert credentials.accepts(["Bearer new"]) and not credentials.accepts([f"Bearer {TOKEN}"])


def test_tokens_are_compared_in_constant_time(credentials: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that `hmac.compare_digest` is used: a measurement would fail on a busy machine."""
    compared = []

    def compare(candidate: bytes, token: bytes) -> bool:
        compared.append((candidate, token))
        return compare_really(candidate, token)

    compare_really = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    credentials.accepts(["Bearer a"], ["bearer.b"])
    assert compared == [(b"a", TOKEN.encode()), (b"b", TOKEN.encode())]


# Servers.


def test_every_route_except_alive_and_ready_requires_token(tmp_path: Path, token_file: Path) -> None:
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
                status, response, content = request(running.port, method, path, body, headers)
                assert status == 401 and response["WWW-Authenticate"].startswith('Bearer realm="ringoexp"'), path
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


def test_wrong_token_is_headers_with_invalid_token(tmp_path: Path, token_file: Path) -> None:
    """A request without a token gets no error code (RFC 6750 section 3.1)."""
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        assert 'error="invalid_token"' not in running.get("/v1.0/stats")[1]["WWW-Authenticate"]
        headers = running.get("/v1.0/stats", Authorization="Bearer x")[1]
        assert 'error="invalid_token"' in headers["WWW-Authenticate"]


def test_ready_reports_whether_token_is_accepted(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        for authorization, accepted in (({}, False), ({"Authorization": f"Bearer {TOKEN}"}, True)):
            answer = json.loads(running.get("/v1.0/ready", **authorization)[2])
            assert (answer["ready"], answer["authorized"]) == (True, accepted)


def test_details_of_ready_require_token(tmp_path: Path, token_file: Path) -> None:
    flags = ["-p", "0", "-U", "127.0.0.1", "-T", str(free_port()), "--token_file", str(token_file)]
    with server(tmp_path, *flags) as running:
        for authorization, detailed in (({}, False), ({"Authorization": f"Bearer {TOKEN}"}, True)):
            status, _, body = running.get("/v1.0/ready", **authorization)
            (reason,) = json.loads(body)["reasons"]
            assert status == 503 and reason["code"] == "consumer_unreachable"
            assert ("127.0.0.1" in reason["detail"]) is detailed and reason["detail"]


def test_websocket_sends_token_in_header_or_subprotocol(tmp_path: Path, token_file: Path) -> None:
    connect: Any = pytest.importorskip("websockets.sync.client").connect
    invalid_status: Any = pytest.importorskip("websockets.exceptions").InvalidStatus
    bearer, plain, batch = "bearer.t0k-en._~%2B%2Fx%3D%3D", "ringoexp.plain.v1", "ringoexp.batch.v1"
    with server(tmp_path, "-p", "0", "-T", "0", "-D", "a.db", "--token_file", str(token_file)) as running:
        for offered in (None, [plain], [batch], ["bearer.wrong"]):
            with pytest.raises(invalid_status) as refused, connect(running.url, subprotocols=offered):
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


def test_token_in_url_is_not_accepted(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        assert running.get(f"/v1.0/stats?token={TOKEN}&access_token={TOKEN}")[0] == 401


def test_token_is_in_no_log_line_and_no_stats(tmp_path: Path, token_file: Path) -> None:
    """The token is right or wrong, in a header, a subprotocol or a URL. The log has all details."""
    wrong = "wrong-one"
    with server(tmp_path, "-d", "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        for token in (TOKEN, wrong):
            running.get("/v1.0/stats", Authorization=f"Bearer {token}")
            running.get(f"/v1.0/stats?token={token}")
            running.get(f"/v1.0/{'x' * 10}", Authorization=f"Basic {token}")
            for suffix in ("", ", x\x0by", ", \x7f", ",\r\n x", ", \xe9"):
                with RawClient(
                    running.port, {"Sec-WebSocket-Protocol": f"ringoexp.plain.v1, bearer.{token}{suffix}"}
                ) as client:
                    assert client.status in (400, 401) or token == TOKEN and not suffix
        stats = running.get("/v1.0/stats", Authorization=f"Bearer {TOKEN}")[2].decode()
        assert "the token" in stats, "stats have the name of the token file"
        assert running.stop() == 0
        for text in (running.errors.read_text(), stats, running.tally):
            assert TOKEN not in text and wrong not in text
        assert running.errors.read_text().count("event=refused") >= 6


def test_refusals_are_limited_in_log(tmp_path: Path, token_file: Path) -> None:
    with server(
        tmp_path,
        "-p",
        "0",
        "-T",
        "0",
        "--token_file",
        str(token_file),
        patch="status.logs.RATE_LIMIT_SECONDS = 600",
    ) as running:
        for _ in range(50):
            assert running.get("/v1.0/stats")[0] == 401
        assert running.stop() == 0
        assert running.errors.read_text().count("status=401") <= 2 and "count=49" in running.errors.read_text()


def test_refused_request_with_body_is_answered_and_closed(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        status, headers, _ = request(running.port, "POST", "/v1.0/ingest", bytes(8_000_000))
        assert status == 401 and headers["Connection"] == "close"
        connection = http.client.HTTPConnection("localhost", running.port, timeout=DEADLINE)
        for _ in range(3):  # without a body the connection stays open
            connection.request("GET", "/v1.0/stats")
            assert connection.getresponse().read() and connection.sock
        connection.close()


@pytest.mark.slow
def test_publisher_and_send_use_token(tmp_path: Path, token_file: Path) -> None:
    token = ["--token_file", str(token_file)]
    with server(tmp_path, "-p", "0", "-I", "false", "-D", "c.db", *token) as consumer:
        link = ["-p", "0", "-T", str(consumer.port)]
        with server(tmp_path, *link, *token) as publisher:
            assert json.loads(publisher.get("/v1.0/ready")[2])["ready"] is True
            command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", publisher.url]
            for options, env in ((token, {}), ([], {"RINGOEXP_TOKEN": TOKEN})):
                done = subprocess.run(
                    [*command, *options], input=b"1\n2\n", capture_output=True, timeout=DEADLINE, env=env, cwd=tmp_path
                )
                assert done.returncode == 0, done.stderr
            done = subprocess.run(command, input=b"1\n", capture_output=True, timeout=DEADLINE, text=False, env={})
            assert (
                done.returncode == 1
                and b"401: this server requires a token: send " in done.stderr
                and b"--token_file" in done.stderr
            )
            assert publisher.stop() == 0
        with server(tmp_path, *link, env={"RINGOEXP_TOKEN": "wrong"}) as publisher:
            assert not json.loads(publisher.get("/v1.0/ready")[2])["ready"], "before any record"
            with RawClient(publisher.port, {"Authorization": "Bearer wrong"}) as client:
                client.send(frame(2, struct.pack(">i", 42)))
                eventually(lambda: "event=link_down" in publisher.errors.read_text())
                assert (
                    "401: wrong token: send the token of this server (with ringoexp: --token_file"
                    in publisher.errors.read_text()
                )
                publisher.kill()
        with server(tmp_path, *link) as publisher:  # without a token
            assert not_ready(publisher) == ["consumer_unreachable"]
    assert [value for _, _, value in rows(tmp_path / "c.db")] == [1, 2, 1, 2]


def test_producer_with_wrong_token_gives_up(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        with pytest.raises(ProducerError, match="401"), Producer(running.url, token="wrong") as producer:
            producer.send([1])
        with Producer(running.url, token=TOKEN) as producer:
            producer.send([1])


def test_sighup_reads_new_token(tmp_path: Path, token_file: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file)) as running:
        token_file.write_text("new\n")
        assert running.get("/v1.0/stats", Authorization="Bearer new")[0] == 401
        running.send_signal(signal.SIGHUP)
        eventually(lambda: running.get("/v1.0/stats", Authorization="Bearer new")[0] == 200)
        assert running.get("/v1.0/stats", Authorization=f"Bearer {TOKEN}")[0] == 401
        token_file.unlink()
        running.send_signal(signal.SIGHUP)
        eventually(lambda: "event=not_reloaded" in running.errors.read_text())
        assert running.get("/v1.0/stats", Authorization="Bearer new")[0] == 200
        assert running.stop() == 0


def test_many_sighups_during_traffic_close_no_connection(tmp_path: Path, token_file: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", str(port), "-T", str(port), "-D", "a.db", "--token_file", str(token_file)) as running:
        with Producer(running.url, token=TOKEN) as producer:
            for start in range(0, 50_000, 1000):
                producer.send(range(start, start + 1000))
                running.send_signal(signal.SIGHUP)
        assert producer.reconnects == 0
        assert running.stop() == 0 and running.tally.endswith("50000 stored, 0 unstored")


@pytest.mark.slow
def test_stop_signal_is_handled_among_many_sighups(tmp_path: Path, token_file: Path) -> None:
    """SIGHUPs fill the buffer that wakes the main thread while the main thread handles the first one."""
    patch = "net.credentials.Credentials.reload = lambda self: __import__('time').sleep(1)"
    with server(tmp_path, "-p", "0", "-T", "0", "--token_file", str(token_file), patch=patch) as running:
        until = time.monotonic() + 0.8
        while time.monotonic() < until:
            running.send_signal(signal.SIGHUP)
        assert running.stop(deadline=15) == 0
        assert len(running.errors.read_text().splitlines()) < 10


@pytest.mark.parametrize("variable", [None, ""])
def test_server_with_malformed_token_does_not_start(tmp_path: Path, variable: str | None) -> None:
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
    assert "the token is empty" in done.stderr


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["-H", "127.0.0.1"], False),
        (["-H", "localhost"], False),
        (["-H", "0.0.0.0"], True),
        (["-H", "::"], True),
        (["-H", "0.0.0.0", "--token_file", "the token"], False),
        (["-H", "unix:sock"], False),
    ],
)
def test_server_beyond_loopback_without_token_logs_a_warning(
    tmp_path: Path, token_file: Path, flags: list[str], warned: bool
) -> None:
    with server(tmp_path, "-I", "false", "-p", "0", *flags) as running:
        assert running.stop() == 0
        lines = [line for line in running.errors.read_text().splitlines() if "event=no_token" in line]
        assert len(lines) == warned and all("level=warning" in line and "--token_file" in line for line in lines)


def test_profiler_port_requires_token(tmp_path: Path, token_file: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", "0", "-L", str(port), "--token_file", str(token_file)):
        path = "/debug/pprof/threads"
        assert request(port, "GET", path)[0] == 401
        assert request(port, "GET", path, headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
