"""Behind nginx, with deploy/nginx.conf as it is but for paths, ports and times."""

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
from support.nginx import CONFIG, nginx, room
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from ringolib.client.producer import Producer
from ringolib.net import websocket as websock
from ringolib.net.frames import MAX_MESSAGE
from ringolib.web import handler as web
from ringolib.wire import encode_plain

Proxied = tuple[ServerProcess, int]


@pytest.fixture
def place() -> Iterator[Path]:
    with room() as directory:
        yield directory


@pytest.fixture(scope="module", params=["unix", "tcp"])
def both(request: pytest.FixtureRequest) -> Iterator[Proxied]:
    """A server, and the port of the nginx before it."""
    flags = ("-H", "unix:x.sock") if request.param == "unix" else ("-H", "127.0.0.1", "-p", "0", "-T", "0")
    with room() as directory, server(directory, *flags, "-N", "our name") as running:
        with nginx(directory, running.at) as port:
            yield running, port
        assert running.stop() == 0


def url(port: int) -> str:
    return f"ws://localhost:{port}/v1.0/ingest"


def test_page_stats_and_errors_come_through(both: Proxied) -> None:
    running, port = both
    status, headers, body = request(port, "GET", "/")
    assert status == 200 and b"<h1" in body and headers["Server"] == "our name"
    status, _, body = request(port, "GET", "/v1.0/stats")
    assert json.loads(body)["info"]["port"] == running.port
    assert request(port, "HEAD", "/v1.0/alive")[0] == 200
    assert request(port, "GET", "/v1.0/ready")[2].startswith(b'{"ready": true')
    assert json.loads(request(port, "GET", "/nothing")[2])["error"].startswith("no such path")
    assert request(port, "GET", "/v1.0/ingest")[0] == 426


def test_posts_are_stored(both: Proxied) -> None:
    _, port = both
    assert request(port, "POST", "/v1.0/ingest", bytes(16))[2] == b'{"stored": 2}\n'
    whole = encode_plain(range(MAX_MESSAGE // 8))
    assert json.loads(request(port, "POST", "/v1.0/ingest", whole)[2]) == {"stored": MAX_MESSAGE // 8}
    status, _, body = request(port, "POST", "/v1.0/ingest", bytes(MAX_MESSAGE + 8))
    assert status == 413 and "the limit is" in json.loads(body)["error"]


def test_a_body_in_chunks_gets_a_length_from_nginx(both: Proxied) -> None:
    _, port = both
    with connected(port) as client:
        client.sendall(
            b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            b"8\r\n\0\0\0\0\0\0\0\1\r\n0\r\n\r\n"
        )
        answer = b""
        while data := client.recv(65536):
            answer += data
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b'{"stored": 1}\n')


def test_a_websocket_gets_its_acks(both: Proxied) -> None:
    """Single integers, and a message as large as there may be."""
    _, port = both
    with RawClient(port) as client:
        for value in range(100):
            client.send(frame(2, struct.pack(">i", value)))
        assert client.acked(100) == 100
        sending = Blocked(lambda: client.send(frame(2, encode_plain(range(MAX_MESSAGE // 8)))))
        assert client.acked(100 + MAX_MESSAGE // 8) == 100 + MAX_MESSAGE // 8
        sending.result()
        client.send(frame(1, b"text"))
        assert client.closed()[0] == 1003


def test_a_page_may_write_if_it_came_through_the_same_nginx(both: Proxied) -> None:
    """The Host that the browser asked for has to come through, with its port: that is what Origin is compared with."""
    _, port = both
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


def test_connections_to_the_server_are_used_again(both: Proxied) -> None:
    running, port = both
    before = running.stats()["totalConnections"]
    for _ in range(50):
        assert request(port, "POST", "/v1.0/ingest", bytes(8))[0] == 200
    assert running.stats()["totalConnections"] < before + 20


def test_its_times_fit_ours() -> None:
    """nginx ends idle connections first, or a POST might meet their end; and its patience is longer than our pings."""
    text = CONFIG.read_text()
    (idle,) = re.findall(r"^ *keepalive_timeout (\d+)s;", text, re.M)
    assert int(idle) + 5 <= web.REQUEST_TIMEOUT_SECONDS
    for hours in re.findall(r"proxy_(?:read|send)_timeout (\d+)h;", text):
        assert int(hours) * 3600 > websock.PING_AFTER + websock.PING_TIMEOUT
    assert websock.PING_AFTER == 20, "says a comment"
    assert MAX_MESSAGE == 8 << 20, "says another"


SHORT = ("proxy_read_timeout 1h;", "proxy_read_timeout 2s;")


def test_an_idle_websocket_lives_as_long_as_the_server_pings(place: Path) -> None:
    """It is longer than nginx would wait without; the test shows that, too."""
    with server(place, "-H", "unix:x.sock", patch="net.websocket.PING_AFTER = 0.5") as running:
        with nginx(place, running.at, SHORT) as port, connect(url(port), ping_interval=None) as client:
            try:
                client.recv(timeout=5)
            except TimeoutError:
                pass
            client.send(bytes(4))
            assert client.recv() == struct.pack(">Q", 1)
        assert running.stop() == 0
    with server(place, "-H", "unix:x.sock") as running:
        with nginx(place, running.at, SHORT) as port, connect(url(port), ping_interval=None) as client:
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=DEADLINE)
        assert running.stop() == 0


def test_a_restart_behind_nginx_loses_nothing_and_doubles_nothing(place: Path) -> None:
    """Killed once, stopped in order once: 502 in between, and exactly once through `Producer`."""
    with nginx(place, place / "x.sock") as port:
        assert request(port, "POST", "/v1.0/ingest", bytes(8))[0] == 502
        with Producer(url(port)) as producer:
            for start in (0, 100_000, 200_000):
                with server(place, "-H", "unix:x.sock") as running:
                    producer.send(range(start, start + 100_000))
                    eventually(lambda start=start: producer.acked > start, "some of it is acked")
                    if start == 0:
                        running.kill()
                    elif start == 100_000:
                        assert running.stop() == 0
                    else:
                        producer.flush(DEADLINE)
                        assert running.stop() == 0
                assert request(port, "GET", "/v1.0/alive")[0] == 502
                assert request(port, "POST", "/v1.0/ingest", bytes(8))[0] == 502
        assert producer.reconnects >= 2
    assert in_order(place / "ringoexp.db", producer.source) == list(range(300_000))
    assert len(rows(place / "ringoexp.db")) == 300_000, "a POST answered 502 by nginx alone is not stored"


def test_a_stop_behind_nginx_ends_websockets_in_order(place: Path) -> None:
    with server(place, "-H", "unix:x.sock") as running, nginx(place, running.at) as port:
        with RawClient(port) as client:
            client.send(frame(2, struct.pack(">i", 1)))
            assert client.acked(1) == 1
            assert running.stop() == 0
            assert client.closed()[:2] == (1001, "the server is stopping")


def test_a_handshake_that_is_answered_503_goes_to_another_publisher_and_a_post_does_not(place: Path) -> None:
    """Two publishers; one has no connection left."""
    with (
        server(place, "-H", "unix:full.sock", "-n", "1", "-D", "full.db") as full,
        server(place, "-H", "unix:x.sock") as running,
        RawClient(full.at),
        nginx(place, full.at, ("    keepalive 16;", f"server unix:{running.at};\nkeepalive 16;")) as port,
    ):
        answers = [request(port, "POST", "/v1.0/ingest", bytes(8))[0] for _ in range(4)]
        assert sorted(answers) == [200, 200, 503, 503], "in turn"
        for _ in range(4):
            with RawClient(port) as client:
                client.send(frame(2, struct.pack(">i", 1)))
                assert client.acked(1) == 1
        assert len(rows(place / "ringoexp.db")) == 6
        assert full.stop() == 0 and running.stop() == 0


def test_tls_ends_at_nginx(place: Path) -> None:
    """The example's second server: a page from https may write, over wss too."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl, which makes the certificate")
    certificate = place / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        + ["-keyout", str(certificate), "-out", str(place / "certificate.pem")],
        check=True,
        capture_output=True,
    )
    with open(certificate, "a") as both:
        both.write((place / "certificate.pem").read_text())
    trust = ssl.create_default_context(cafile=str(place / "certificate.pem"))
    with server(place, "-H", "unix:x.sock") as running:
        with nginx(place, running.at, certificate=certificate) as port:
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
                    assert client_socket.recv(65536).startswith(b"HTTP/1.1 200"), "hosts are compared, as ever"
        assert not_ready(running) == []
        assert running.stop() == 0
