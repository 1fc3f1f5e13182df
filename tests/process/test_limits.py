"""Limits of HTTP requests and of connections: in total, for each client address, and by threads."""

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

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

from ringolib import open_files


def test_request_head_has_a_total_limit(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        for head, status in (
            (
                b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n"
                + b"".join(b"X-%d: %b\r\n" % (n, b"y" * 900) for n in range(50)),
                b"431",
            ),
            (b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000 + b"\r\n", b"431"),
            (b"GET /" + b"y" * 40_000 + b" HTTP/1.1\r\n", b"414"),
            (b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100, b"431"),
            (b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 99, b"200"),
            (
                b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n"
                + b"".join(b"X-%d: %b\r\n" % (n, b"y" * 300) for n in range(90)),
                b"200",
            ),
        ):
            with socket.create_connection(("localhost", running.port), DEADLINE) as sock:
                sock.sendall(head + b"\r\n")
                assert sock.recv(65536).split()[1] == status
        with socket.create_connection(("localhost", running.port), DEADLINE) as sock:
            for _ in range(10):  # the limit is for each request
                sock.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20_000 + b"\r\n\r\n")
                assert sock.recv(65536).split()[1] == b"200"


def test_connections_per_address_are_limited(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-H", "0.0.0.0", "--per_address", "2") as running:
        held = [RawClient(running.port) for _ in range(2)]
        assert running.get("/v1.0/alive")[0] == 200, "requests that store no records are answered"
        with RawClient(running.port) as refused:
            assert refused.status == 503 and "Retry-After: 1" in refused.head
            assert b"2 connections from one address" in refused.sock.recv(65536) + refused._buffer
        answer = running.get("/v1.0/ready")[2].decode()
        assert "2 connections from one address (--per_address)" in answer, "the limit is not the total one"
        stats = running.stats()
        assert stats["refusedConnections"] == 1 and stats["connections"] == 2
        with socket.create_connection(("127.0.0.1", running.port), source_address=("127.0.0.2", 0)) as other:
            other.sendall(b"GET /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert other.recv(65536).startswith(b"HTTP/1.1 426"), "each address has its own limit"
        held.pop().sock.close()

        def is_admitted() -> bool:
            with RawClient(running.port) as client:
                return client.status == 101

        eventually(is_admitted)
        for client in held:
            client.sock.close()
        assert running.stop() == 0


def test_flood_from_one_address_does_not_block_others(tmp_path: Path) -> None:
    patch = "web.table.MAX_REFUSED = 5; web.handler.REFUSED_TIMEOUT_SECONDS = 600"
    with server(tmp_path, "-p", "0", "-T", "0", "-H", "0.0.0.0", "--per_address", "1", patch=patch) as running:
        flood = [socket.create_connection(("127.0.0.1", running.port), DEADLINE) for _ in range(50)]
        with socket.create_connection(("127.0.0.1", running.port), DEADLINE, ("127.0.0.2", 0)) as other:
            other.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert other.recv(65536).startswith(b"HTTP/1.1 200")
            other.sendall(b"GET /v1.0/stats HTTP/1.1\r\nHost: localhost\r\n\r\n")
            body = b""
            while not body.endswith(b"}\n"):
                body += other.recv(65536)
            stats = json.loads(body.partition(b"\r\n\r\n")[2])["stats"]
            assert stats["refusedConnections"] == 50 - 1 - 5 and stats["connections"] == 2
        for sock in flood:
            sock.close()

        def is_ready() -> bool:
            try:
                return not_ready(running) == []
            except (
                http.client.RemoteDisconnected,
                ConnectionError,
            ):  # the server has not noticed the closed connections yet
                return False

        eventually(is_ready)
        assert running.stop() == 0


def test_silent_crowd_beyond_the_limit_does_not_delay_alive(tmp_path: Path) -> None:
    with server(
        tmp_path, "-p", "0", "-T", "0", "-n", "1", patch="web.handler.REFUSED_TIMEOUT_SECONDS = 600"
    ) as running:
        with RawClient(running.port) as admitted, ExitStack() as crowd:
            for _ in range(300):  # 64 have a place
                crowd.enter_context(socket.create_connection(("localhost", running.port), DEADLINE))
            assert running.get("/v1.0/alive")[0] == 200
            admitted.send(frame(2, bytes(4)))
            assert admitted.acked(1) == 1, "an admitted client is not cut off"
            assert running.stop() == 0


def test_crowd_that_does_not_read_the_page_does_not_delay_alive(tmp_path: Path) -> None:
    small_buffer = f"{int(socket.SOL_SOCKET)}, {int(socket.SO_SNDBUF)}, 4096"
    patch = (
        f"web.connections._set_tcp_options = lambda sock: sock.setsockopt({small_buffer}); "
        "web.handler.REQUEST_TIMEOUT_SECONDS = 600; web.handler.REFUSED_TIMEOUT_SECONDS = 0.5"
    )
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "1", patch=patch) as running, ExitStack() as crowd:
        crowd.enter_context(RawClient(running.port))
        for _ in range(64):  # all places for connections beyond the limit
            client = crowd.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect(("127.0.0.1", running.port))
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert running.get("/v1.0/alive")[0] == 200


def test_silent_crowd_at_the_profiler_does_not_delay_its_pages(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", "0", "-L", str(port)) as running, ExitStack() as crowd:
        for _ in range(100):  # 32 have a place
            crowd.enter_context(socket.create_connection(("localhost", port), DEADLINE))
        started = time.monotonic()
        assert request(port, "GET", "/debug/pprof/cmdline")[0] == running.get("/v1.0/alive")[0] == 200
        assert time.monotonic() - started < 20, "the crowd is not waited for"


def test_large_bodies_wait_for_their_share_of_the_memory(tmp_path: Path) -> None:
    """One body at a time goes on beyond the budget, and all are stored."""
    patch = "web.budget.MIB = 1024 * 32"
    with server(tmp_path, "-p", "0", "-T", "0", "-r", "65536", "--unfinished", "16", patch=patch) as running:
        size = 400_000
        head = b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(("localhost", running.port))) for _ in range(5)]
            for client in clients:
                client.sendall(head + bytes(size - 1))
            assert request(running.port, "POST", "/v1.0/ingest", bytes(8))[0] == 200, "a small body does not wait"
            eventually(lambda: "level=warning event=waiting_for_room" in running.errors.read_text())
            assert running.stats()["unfinishedBytes"] >= 16 * 32 * 1024
            for client in clients:
                client.sendall(b"\0")
            for client in clients:
                assert client.recv(65536).startswith(b"HTTP/1.1 200")
        eventually(lambda: running.stats()["unfinishedBytes"] == 0)  # each body is released after its answer
        assert running.stop() == 0


def test_body_without_room_is_refused_and_lost_bodies_give_room(tmp_path: Path) -> None:
    patch = "web.budget.MIB = 1024 * 16; wsserver.BODY_BYTES_PER_SECOND = 100_000; "
    patch += "web.handler.REQUEST_TIMEOUT_SECONDS = 1.0"
    head = b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with server(tmp_path, "-p", "0", "-T", "0", "-r", "262144", "--unfinished", "32", patch=patch) as running:
        for _ in range(10):  # together, more than the budget
            with socket.create_connection(("localhost", running.port), DEADLINE) as lost:
                lost.sendall((head % 400_000) + bytes(100_000))
        with socket.create_connection(("localhost", running.port), DEADLINE) as oldest:
            oldest.sendall((head % 1_000_000) + bytes(400_000))
            assert request(running.port, "POST", "/v1.0/ingest", bytes(96_000))[0] == 200, "there is room"
            oldest.sendall(bytes(599_000))
            eventually(lambda: request(running.port, "POST", "/v1.0/ingest", bytes(96_000))[0] == 503)
            oldest.sendall(bytes(1000))
            assert oldest.recv(65536).startswith(b"HTTP/1.1 200")
        assert request(running.port, "POST", "/v1.0/ingest", bytes(96_000))[0] == 200


def test_http_connections_are_limited_by_threads_websockets_are_not(tmp_path: Path) -> None:
    limit = 512 - 128
    with server(tmp_path, "-p", "0", "-I", "false", "--threads", "512") as running, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.port)) for _ in range(limit + 100)]
        assert all(client.status == 101 for client in clients)
        assert json.loads(running.get("/v1.0/stats")[2])["memStats"]["threads"] < 32, "a WebSocket needs no thread"
        requests = [stack.enter_context(socket.create_connection(("localhost", running.port))) for _ in range(limit)]
        for sock in requests:
            sock.sendall(b"GET / HTTP/1.1\r\n")  # an unfinished request
        eventually(lambda: json.loads(running.get("/v1.0/stats")[2])["memStats"]["threads"] > limit)
        with RawClient(running.port) as refused:
            assert refused.status == 503
            text = b"the limit is 384 HTTP connections at once (--threads)"
            assert text in refused.sock.recv(65536) + refused._buffer
        assert json.loads(running.get("/v1.0/stats")[2])["memStats"]["threads"] <= 512
        clients[0].send(frame(2, bytes(4)))
        assert clients[0].acked(1) == 1
        requests[0].close()

        def is_admitted() -> bool:
            with RawClient(running.port) as client:
                return client.status == 101

        eventually(is_admitted)
        assert running.stop() == 0


def with_files(count: int) -> list[str]:
    """Return a command that runs a program which may open so many files."""
    return ["bash", "-c", f'ulimit -n {count} && exec "$@"', "x"]


@pytest.mark.parametrize("count", [8, 14, 30])
def test_too_few_files_end_the_start_with_the_number_needed(tmp_path: Path, count: int) -> None:
    command = [*with_files(count), sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "-T", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    error = rf"this process may open {count} files, and needs (\d+): raise the limit \(ulimit -n (\d+)\)"
    needed = re.fullmatch(rf"ringoexp: error: {error}\n", done.stderr)
    assert needed and needed[1] == needed[2] and done.returncode == 1
    with server(tmp_path, "-p", "0", "-T", "0", under=with_files(int(needed[1]))) as running:
        assert running.get("/v1.0/alive")[0] == 200
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            assert client.acked(1) == 1


def test_server_with_few_files_answers_alive_beside_a_crowd(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", under=with_files(64)) as running, ExitStack() as crowd:
        clients = [crowd.enter_context(RawClient(running.port)) for _ in range(100)]
        assert running.get("/v1.0/alive")[0] == 200
        admitted = [client for client in clients if client.status == 101]
        assert len(admitted) >= 16
        (refused, *others) = [client for client in clients if client.status == 503]
        text = f"the limit is {len(admitted)} connections at once (ulimit -n)"
        assert text.encode() in refused.sock.recv(65536) + refused._buffer
        assert len(admitted) + 1 + len(others) == 100
        for number, client in enumerate(admitted):
            client.send(frame(2, number.to_bytes(4, "big")))
        assert all(client.acked(1) == 1 for client in admitted)
        assert "connections_full" in not_ready(running)
        assert running.stop() == 0
        assert "cannot_accept" not in running.errors.read_text()
    assert len(rows(tmp_path / "ringoexp.db")) == len(admitted)


@pytest.mark.slow
def test_publisher_with_few_files_serves_its_clients_and_alive(tmp_path: Path) -> None:
    """Its workers share the files with its clients, and must not use them up."""
    with ExitStack() as stack:
        consumer = stack.enter_context(server(tmp_path, "-I", "false", "-p", "0"))
        flags = ["-p", "0", "-T", str(consumer.port), "-r", "65536"]
        running = stack.enter_context(server(tmp_path, *flags, under=with_files(64)))
        assert re.search(r"event=few_files connections=\d+ workers=\d+", running.errors.read_text())
        clients = [stack.enter_context(RawClient(running.port)) for _ in range(60)]
        admitted = [client for client in clients if client.status == 101]
        assert len(admitted) >= 10
        for turn in range(1, 6):
            for client in admitted:
                client.send(frame(2, bytes(8 * 20_000)))
            assert running.get("/v1.0/alive")[0] == 200
            for client in admitted:
                assert client.acked(turn * 20_000) == turn * 20_000
        log = running.errors.read_text()
        assert "cannot_accept" not in log and "Too many open files" not in log
        assert running.stop() == 0


@pytest.mark.parametrize(
    ("free", "connections", "links", "shares"),
    [
        (None, 0, 1024, (0, None, 1024)),  # the system has no limit
        (75_000, 0, 1024, (75_000 - 32 - 64 - 1024, 64, 1024)),
        (75_000, 500, 1024, (500, 64, 1024)),
        (500, 0, 0, (500 - 32 - 64, 64, 0)),
        (500, 500, 1024, (303, 64, 101)),
        (778, 10, 256, (10, 64, 256)),
        (59, 0, 0, (21, 6, 0)),
        (40, 0, 1024, (5, 2, 1)),
        (40, 1, 3, (1, 2, 3)),
    ],
)
def test_open_files_are_divided_between_connections_and_links(
    free: int | None,
    connections: int,
    links: int,
    shares: tuple[int, int | None, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_files, "free_files", lambda: free)
    divided = open_files.divide(connections, links)
    assert divided == shares
    if free is not None and divided.refused is not None:
        assert sum((divided.connections, divided.refused, divided.links)) <= free - open_files.OWN_FILES
