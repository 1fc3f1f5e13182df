"""Whole servers that listen on IPv4, IPv6 and Unix sockets."""

import json
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.harness import (
    DEADLINE,
    ROOT,
    Blocked,
    RawClient,
    connected,
    eventually,
    frame,
    free_port,
    in_order,
    not_ready,
    request,
    rows,
    server,
)
from support.network import IPV6, accepts

from ringolib.client.producer import Producer

# IPv4 and IPv6.


@IPV6
@pytest.mark.parametrize(
    ("host", "ipv4", "ipv6"),
    [
        ("localhost", True, True),
        ("::", True, True),
        ("[::]", True, True),
        ("0.0.0.0", True, False),
        ("127.0.0.1", True, False),
        ("::1", False, True),
        ("[::1]", False, True),
    ],
)
def test_every_address_of_a_name_listens_on_one_port(tmp_path: Path, host: str, ipv4: bool, ipv6: bool) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-H", host) as running:
        assert accepts("127.0.0.1", running.port) is ipv4
        assert accepts("::1", running.port) is ipv6
        name = host.strip("[]")
        written = "localhost" if name in ("0.0.0.0", "::") else f"[{name}]" if ":" in name else name
        assert running.started["url"] == f"http://{written}:{running.port}/"
        assert running.stop() == 0
    for address in ("127.0.0.1", "::1"):
        assert not accepts(address, running.port)


@IPV6
def test_profiler_listens_on_ipv4_and_ipv6(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", "0", "-L", str(port)) as running:
        assert accepts("127.0.0.1", port) and accepts("::1", port)
        assert "level=info event=profiling" in running.errors.read_text()
        assert running.stop() == 0


@pytest.mark.slow
@IPV6
def test_flood_on_ipv4_does_not_delay_ipv6(tmp_path: Path) -> None:
    """The server accepts from each socket in turn, and answers all connections beyond the limit."""
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "4") as running:
        ended = threading.Event()

        def flood() -> None:
            while not ended.is_set():
                socket.create_connection(("127.0.0.1", running.port), DEADLINE).close()

        floods = [Blocked(flood) for _ in range(3)]
        for _ in range(20):
            with socket.create_connection(("::1", running.port), DEADLINE) as sock:
                sock.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        ended.set()
        for thread in floods:
            thread.result()
        assert running.stop() == 0


# Unix sockets.


def test_unix_socket_alone_is_a_complete_system(short_path: Path) -> None:
    """`-H unix:PATH` alone serves WebSocket, HTTP and the page. The log calls its clients `unix`."""
    with server(short_path, "-H", "unix:x.sock", "-d") as running:
        path = short_path.resolve()
        expected = f"publisher on unix:{path}/x.sock storing in {path}/ringoexp.db, token off, TLS off"
        assert running.greeting.endswith(expected)
        assert stat.S_ISSOCK((short_path / "x.sock").lstat().st_mode)
        with RawClient(running.at) as client:
            client.send(frame(2, struct.pack(">i", 42)))
            assert client.acked(1) == 1
            client.send(frame(8, struct.pack(">H", 1000)))
            assert client.closed()[0] == 1000
        assert request(running.at, "POST", "/v1.0/ingest", bytes(8))[0] == 200
        assert request(running.at, "GET", "/")[0] == 200
        assert request(running.at, "GET", "/nothing")[0] == 404
        assert not_ready(running) == []
        info = json.loads(running.get("/v1.0/stats")[2])["info"]
        assert (info["hostname"], info["port"], info["consumerHostname"]) == ("unix:x.sock", 0, "unix:x.sock")
        assert running.stop() == 0
        assert running.tally == "ringoexp: stopped, 2 stored, 0 unstored"
        log = running.errors.read_text()
        assert "event=connected client=unix kind=plain" in log
        assert "event=refused client=unix status=404" in log
        assert "event=request client=unix" in log
    assert not (short_path / "x.sock").exists()
    assert [value for _, _, value in rows(short_path / "ringoexp.db")] == [42, 0]


def test_link_over_unix_socket_stores_exactly_once(short_path: Path) -> None:
    """The consumer is killed: the next one takes over the file that it left behind."""
    consumer = ("-I", "false", "-H", "unix:consumer.sock", "-D", "numbers.db")
    with server(short_path, "-H", "unix:x.sock", "-U", f"unix:{short_path}/consumer.sock") as publisher:
        assert f" on unix:{short_path.resolve()}/x.sock forwarding to unix:{short_path}/consumer.sock," in (
            publisher.greeting
        )
        assert not_ready(publisher) == ["consumer_unreachable"]
        with server(short_path, *consumer) as first:
            with Producer(f"ws+unix:{publisher.at}:/v1.0/ingest") as producer:
                producer.send(range(1000))
                producer.flush(DEADLINE)
                assert not_ready(publisher) == []
                first.kill()
                assert (short_path / "consumer.sock").exists()
                producer.send(range(1000, 2000))
                with server(short_path, *consumer) as second:
                    producer.flush(DEADLINE)
                    assert request(second.at, "GET", "/v1.0/ready")[0] == 200
                    assert publisher.stop() == 0
                    assert second.stop() == 0
        assert f"event=link_up consumer=unix:{short_path}/consumer.sock" in publisher.errors.read_text()
    assert in_order(short_path / "numbers.db", producer.source) == list(range(2000))


@pytest.mark.parametrize("url", ["ws+unix:{}:/v1.0/ingest", "ws+unix://{}:/v1.0/ingest"])
def test_send_reaches_unix_socket(short_path: Path, url: str) -> None:
    with server(short_path, "-H", "unix:x.sock") as running:
        command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", url.format(running.at)]
        done = subprocess.run(command, input=b"1\n2\n3\n", cwd=short_path, capture_output=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, b"")
        assert running.stop() == 0
    assert [value for _, _, value in rows(short_path / "ringoexp.db")] == [1, 2, 3]


def test_curl_reaches_unix_socket(short_path: Path) -> None:
    """The command is that of docs/deploy.md."""
    if not shutil.which("curl"):
        pytest.skip("no curl")
    with server(short_path, "-H", "unix:x.sock") as running:
        command = ["curl", "-s", "--unix-socket", "x.sock", "--data-binary", "@-", "http://localhost/v1.0/ingest"]
        done = subprocess.run(command, input=b"1\n2\n", cwd=short_path, capture_output=True, timeout=DEADLINE)
        assert done.stdout == b'{"stored": 2}\n'
        assert running.stop() == 0


@pytest.mark.slow
def test_stop_stores_records_received_over_unix_socket(short_path: Path) -> None:
    """The consumer is unreachable at first. The ring is drained, and an open WebSocket gets its acks and a Close."""
    with server(short_path, "-H", "unix:x.sock", "-U", "unix:c.sock") as running:
        with RawClient(running.at) as client, connected(running.at) as idle:
            client.send(b"".join(frame(2, struct.pack(">i", value)) for value in range(100)))
            eventually(lambda: running.stats()["recordsReceived"] == 100)
            running.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""
            refused = request(running.at, "POST", "/v1.0/ingest", bytes(8))
            assert refused[0] == 503 and b"stopping" in refused[2]
            with server(short_path, "-I", "false", "-H", "unix:c.sock", "-D", "numbers.db") as consumer:
                assert client.closed() == (1001, "the server is stopping", 100)
                assert running.wait() == 0
                assert consumer.stop() == 0
        assert running.tally == "ringoexp: stopped, 100 stored, 0 unstored"
    assert [path.name for path in short_path.glob("*.sock")] == []


def test_stop_answers_unfinished_request_on_unix_socket(short_path: Path) -> None:
    with server(short_path, "-H", "unix:x.sock") as running:
        with connected(running.at) as client:
            client.sendall(b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: 80\r\n\r\n" + bytes(8))
            eventually(lambda: running.stats()["connections"] == 2)
            running.send_signal(signal.SIGTERM)
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 503") and b"stopping" in answer + client.recv(65536)
        assert running.wait() == 0
    assert rows(short_path / "ringoexp.db") == []


@pytest.mark.slow
def test_late_reader_on_unix_socket_gets_newest_ack(short_path: Path) -> None:
    """The buffer of a Unix socket holds only some hundred acks: one ack replaces the others."""
    with server(short_path, "-H", "unix:x.sock", "-r", "65536") as running, RawClient(running.at) as client:
        for start in range(0, 20_000, 100):
            client.send(b"".join(frame(2, struct.pack(">i", value)) for value in range(start, start + 100)))
        eventually(lambda: running.stats()["recordsStored"] == 20_000)
        assert client.acked(20_000) == 20_000
        assert running.stop() == 0


def test_client_that_binds_its_unix_socket_is_logged_as_unix(short_path: Path) -> None:
    with server(short_path, "-H", "unix:x.sock", "-d") as running:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(short_path / "client.sock"))
            sock.connect(str(running.at))
            sock.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 404")
        assert "event=refused client=unix status=404" in running.errors.read_text()
        assert running.stop() == 0


def test_profiler_on_unix_socket(short_path: Path) -> None:
    with server(short_path, "-H", "unix:x.sock", "-L", "1", "--profiler_host", "unix:p.sock") as running:
        status, _, body = request(short_path / "p.sock", "GET", "/debug/pprof/cmdline")
        assert status == 200 and b"unix:p.sock" in body
        assert "level=info event=profiling host=unix:p.sock" in running.errors.read_text()
        assert running.stop() == 0
    assert list(short_path.glob("*.sock")) == []


def test_socket_file_of_killed_server_is_taken_over(short_path: Path) -> None:
    for _ in range(2):
        with server(short_path, "-H", "unix:x.sock") as running:
            running.kill()
        assert (short_path / "x.sock").exists()
    with server(short_path, "-H", "unix:x.sock") as running:
        assert running.get("/v1.0/alive")[0] == 200
        assert running.stop() == 0


def test_socket_in_use_is_an_error_of_one_line(short_path: Path) -> None:
    """The server that uses the socket goes on."""
    with server(short_path, "-H", "unix:x.sock") as running:
        done = subprocess.run(
            [sys.executable, str(ROOT / "ringoexp.py"), "-H", "unix:x.sock", "-D", "other.db"],
            cwd=short_path,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith("ringoexp: error: cannot listen on unix:x.sock: the socket is in use")
        assert not (short_path / "other.db").exists()
        assert running.get("/v1.0/alive")[0] == 200
        assert running.stop() == 0
