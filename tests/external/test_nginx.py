"""The server behind nginx, with deploy/nginx.conf and other paths, ports and times."""

import json
import re
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.harness import (
    DEADLINE,
    Blocked,
    RawClient,
    ServerProcess,
    connected,
    eventually,
    frame,
    in_order,
    not_ready,
    request,
    rows,
    server,
)
from support.nginx import CONFIG, nginx, socket_directory

from ringolib.client.producer import Producer
from ringolib.net.frames import MAX_MESSAGE
from ringolib.web import handler, session
from ringolib.wire import encode_plain

Proxied = tuple[ServerProcess, int]


@pytest.fixture
def directory() -> Iterator[Path]:
    with socket_directory() as path:
        yield path


@pytest.fixture(scope="module", params=["unix", "tcp"])
def proxied(request: pytest.FixtureRequest) -> Iterator[Proxied]:
    """A server, and the port of the nginx in front of it."""
    flags = (
        ("-H", "unix:x.sock")
        if request.param == "unix"
        else ("-H", "127.0.0.1", "-p", "0", "-T", "0", "--allow_host", "numbers.example")
    )
    with socket_directory() as directory, server(directory, *flags, "-N", "our name") as process:
        with nginx(directory, process.at) as port:
            yield process, port
        assert process.stop() == 0


def url(port: int) -> str:
    return f"ws://localhost:{port}/v1.0/ingest"


def test_responses_pass_through_nginx(proxied: Proxied) -> None:
    process, port = proxied
    status, headers, body = request(port, "GET", "/")
    assert status == 200 and b"<h1" in body and headers["Server"] == "our name"
    status, _, body = request(port, "GET", "/v1.0/stats")
    assert json.loads(body)["info"]["port"] == process.port
    assert request(port, "HEAD", "/v1.0/alive")[0] == 200
    assert request(port, "GET", "/v1.0/ready")[2].startswith(b'{"ready": true')
    assert json.loads(request(port, "GET", "/nothing")[2])["error"].startswith("no such path")
    assert request(port, "GET", "/v1.0/ingest")[0] == 426


def test_posts_through_nginx_are_stored(proxied: Proxied) -> None:
    _, port = proxied
    assert request(port, "POST", "/v1.0/ingest", bytes(16))[2] == b'{"stored": 2}\n'
    whole = encode_plain(range(MAX_MESSAGE // 8))
    assert json.loads(request(port, "POST", "/v1.0/ingest", whole)[2]) == {"stored": MAX_MESSAGE // 8}
    status, _, body = request(port, "POST", "/v1.0/ingest", bytes(MAX_MESSAGE + 8))
    assert status == 413 and "the limit is" in json.loads(body)["error"]


def test_chunked_body_gets_a_content_length(proxied: Proxied) -> None:
    _, port = proxied
    with connected(port) as client:
        client.sendall(
            b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            b"8\r\n\0\0\0\0\0\0\0\1\r\n0\r\n\r\n"
        )
        response = b""
        while data := client.recv(65536):
            response += data
    assert response.startswith(b"HTTP/1.1 200") and response.endswith(b'{"stored": 1}\n')


def test_chunked_body_passes_through_without_buffering(directory: Path) -> None:
    """As it does through proxies that forward a body while it arrives."""
    unbuffered = ("proxy_request_buffering on;", "proxy_request_buffering off;")
    with server(directory, "-H", "unix:x.sock") as process, nginx(directory, process.at, unbuffered) as port:
        with connected(port) as client:
            head = b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: text/plain\r\n"
            client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n1 \r\n1\r\n2\r\n0\r\n\r\n")
            response = b""
            while data := client.recv(65536):
                response += data
        assert response.startswith(b"HTTP/1.1 200") and response.endswith(b'{"stored": 2}\n')
        assert process.stop() == 0
    assert sorted(value for _, _, value in rows(directory / "ringoexp.db")) == [1, 2]


def test_websocket_receives_its_acks(proxied: Proxied) -> None:
    """For single integers, and for a message of the maximum size."""
    _, port = proxied
    with RawClient(port) as client:
        for value in range(100):
            client.send(frame(2, struct.pack(">i", value)))
        assert client.acked(100) == 100
        sending = Blocked(lambda: client.send(frame(2, encode_plain(range(MAX_MESSAGE // 8)))))
        assert client.acked(100 + MAX_MESSAGE // 8) == 100 + MAX_MESSAGE // 8
        sending.result()
        client.send(frame(1, b"text"))
        assert client.closed()[0] == 1003


def test_page_from_the_same_nginx_may_write(proxied: Proxied) -> None:
    """nginx must pass on the browser's Host with its port, because the server compares Origin with it."""
    _, port = proxied
    for host in (f"localhost:{port}", "numbers.example", "numbers.example:8080"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert request(port, "POST", "/v1.0/ingest", bytes(8), headers)[0] == 200
        with RawClient(port, dict(headers)) as client:
            assert client.status == 101
    for origin in ("http://elsewhere.example", f"http://localhost:{port + 1}", "http://localhost", "null"):
        headers = {"Host": f"localhost:{port}", "Origin": origin, "X-Forwarded-Host": "elsewhere.example"}
        assert request(port, "POST", "/v1.0/ingest", bytes(8), headers)[0] == 403
        with RawClient(port, dict(headers)) as client:
            assert client.status == 403


def test_connections_to_the_server_are_reused(proxied: Proxied) -> None:
    process, port = proxied
    before = process.stats()["totalConnections"]
    for _ in range(50):
        assert request(port, "POST", "/v1.0/ingest", bytes(8))[0] == 200
    assert process.stats()["totalConnections"] < before + 20


def test_timeouts_of_nginx_fit_those_of_the_server() -> None:
    """nginx closes idle connections first, so no POST is lost on one; its other timeouts are longer than our pings."""
    text = CONFIG.read_text()
    (idle,) = re.findall(r"^ *keepalive_timeout (\d+)s;", text, re.M)
    assert int(idle) + 5 <= handler.IDLE_TIMEOUT_SECONDS
    for hours in re.findall(r"proxy_(?:read|send)_timeout (\d+)h;", text):
        assert int(hours) * 3600 > session.PING_AFTER_SECONDS + session.PING_TIMEOUT_SECONDS
    assert session.PING_AFTER_SECONDS == 20, "see the comment in nginx.conf"
    assert MAX_MESSAGE == 8 << 20, "see the comment in nginx.conf"


SHORT = ("proxy_read_timeout 1h;", "proxy_read_timeout 2s;")


def test_idle_websocket_lives_while_the_server_pings(directory: Path) -> None:
    """Without pings nginx closes it; the test shows that too."""
    connect = pytest.importorskip("websockets.sync.client").connect
    closed = pytest.importorskip("websockets.exceptions").ConnectionClosed
    with server(directory, "-H", "unix:x.sock", patch="web.session.PING_AFTER_SECONDS = 0.5") as process:
        with (
            nginx(directory, process.at, SHORT) as port,
            connect(url(port), ping_interval=None) as client,
        ):
            try:
                client.recv(timeout=5)
            except TimeoutError:
                pass
            client.send(bytes(4))
            assert client.recv() == struct.pack(">Q", 1)
        assert process.stop() == 0
    with server(directory, "-H", "unix:x.sock") as process:
        with (
            nginx(directory, process.at, SHORT) as port,
            connect(url(port), ping_interval=None) as client,
        ):
            with pytest.raises(closed):
                client.recv(timeout=DEADLINE)
        assert process.stop() == 0


def test_restart_behind_nginx_keeps_exactly_once(directory: Path) -> None:
    """The server is killed once and stopped in order once. nginx answers 502 in between."""
    with nginx(directory, directory / "x.sock") as port:
        assert request(port, "POST", "/v1.0/ingest", bytes(8))[0] == 502
        with Producer(url(port)) as producer:
            for start in (0, 100_000, 200_000):
                with server(directory, "-H", "unix:x.sock") as process:
                    producer.send(range(start, start + 100_000))
                    eventually(lambda start=start: producer.acked > start, "some records are acked")
                    if start == 0:
                        process.kill()
                    elif start == 100_000:
                        assert process.stop() == 0
                    else:
                        producer.flush(DEADLINE)
                        assert process.stop() == 0
                assert request(port, "GET", "/v1.0/alive")[0] == 502
                assert request(port, "POST", "/v1.0/ingest", bytes(8))[0] == 502
        assert producer.reconnects >= 2
    assert in_order(directory / "ringoexp.db", producer.source) == list(range(300_000))
    assert len(rows(directory / "ringoexp.db")) == 300_000, "no POST that nginx answered 502 is stored"


def test_stop_behind_nginx_closes_websockets_with_1001(directory: Path) -> None:
    with server(directory, "-H", "unix:x.sock") as process, nginx(directory, process.at) as port:
        with RawClient(port) as client:
            client.send(frame(2, struct.pack(">i", 1)))
            assert client.acked(1) == 1
            assert process.stop() == 0
            assert client.closed()[:2] == (1001, "the server is stopping")


def test_refused_handshake_is_retried_elsewhere_and_a_post_is_not(directory: Path) -> None:
    """One of two publishers has reached its connection limit."""
    with (
        server(directory, "-H", "unix:full.sock", "-n", "1", "-D", "full.db") as full,
        server(directory, "-H", "unix:x.sock") as process,
        RawClient(full.at),
        nginx(directory, full.at, ("    keepalive 16;", f"server unix:{process.at};\nkeepalive 16;")) as port,
    ):
        statuses = [request(port, "POST", "/v1.0/ingest", bytes(8))[0] for _ in range(4)]
        assert sorted(statuses) == [200, 200, 503, 503], "the publishers take turns"
        for _ in range(4):
            with RawClient(port) as client:
                client.send(frame(2, struct.pack(">i", 1)))
                assert client.acked(1) == 1
        assert len(rows(directory / "ringoexp.db")) == 6
        assert full.stop() == 0 and process.stop() == 0


def test_tls_terminates_at_nginx(directory: Path) -> None:
    """With the second server of the example, a page from https may write, over wss too."""
    connect = pytest.importorskip("websockets.sync.client").connect
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make the certificate")
    certificate = directory / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        + ["-keyout", str(certificate), "-out", str(directory / "certificate.pem")],
        check=True,
        capture_output=True,
    )
    with open(certificate, "a") as pem:
        pem.write((directory / "certificate.pem").read_text())
    trust = ssl.create_default_context(cafile=str(directory / "certificate.pem"))
    with server(directory, "-H", "unix:x.sock") as process:
        with nginx(directory, process.at, certificate=certificate) as port:
            headers = {"Origin": f"https://localhost:{port}"}
            secure = f"wss://localhost:{port}/v1.0/ingest"
            with connect(secure, ssl=trust, additional_headers=headers, ping_interval=None) as client:
                client.send(bytes(4))
                assert client.recv() == struct.pack(">Q", 1)
            with socket.create_connection(("127.0.0.1", port), DEADLINE) as plain:
                with trust.wrap_socket(plain, server_hostname="localhost") as client_socket:
                    client_socket.sendall(
                        f"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 8\r\n"
                        f"Origin: http://localhost:{port}\r\n\r\n".encode()
                        + bytes(8)
                    )
                    assert client_socket.recv(65536).startswith(b"HTTP/1.1 200"), "schemes are not compared"
        assert not_ready(process) == []
        assert process.stop() == 0
