"""The profiler's port: its pages and profiles, which requests it refuses, and its place in a server's life."""

import gzip
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from support.harness import (
    DEADLINE,
    ROOT,
    Blocked,
    RawClient,
    ServerProcess,
    eventually,
    frame,
    free_port,
    request,
    server,
)
from support.pprof_reader import DecodedProfile, read_profile

from ringolib.app import App, StartupError
from ringolib.options import read_arguments
from store import StoreError

BASE = "/debug/pprof/"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class ProfiledServer:
    """A server with a profiler on `port`."""

    def __init__(self, running: ServerProcess, port: int) -> None:
        self.running, self.port = running, port

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Return the response to a request below /debug/pprof/. In header names `_` becomes `-`."""
        http_headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return request(self.port, method, BASE + path, headers=http_headers)

    def profile(self, seconds: int = 1) -> DecodedProfile:
        """Return a profile, decoded."""
        status, headers, body = self.get(f"profile?seconds={seconds}")
        assert (status, headers["Content-Type"]) == (200, "application/octet-stream"), body
        return read_profile(body)

    def begin(self, seconds: int = 60) -> socket.socket:
        """Return the connection of a client that waits for its profile, after the sampling has begun."""
        sock = socket.create_connection(("127.0.0.1", self.port), DEADLINE)
        sock.sendall(f"GET {BASE}profile?seconds={seconds} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        eventually(self.is_sampling)
        return sock

    def is_sampling(self) -> bool:
        """True while a request takes a profile."""
        return b"in _take_profile" in self.get("threads")[2]

    def thread_count(self) -> int:
        """Return the number of threads of the server."""
        return len(os.listdir(f"/proc/{self.running.process.pid}/task"))


@contextmanager
def profiled(directory: Path, *flags: str, patch: str = "") -> Iterator[ProfiledServer]:
    """Run a server with a database and a profiler."""
    port = free_port()
    with server(directory, "-p", "0", "-T", "0", "-L", str(port), *flags, patch=patch) as running:
        yield ProfiledServer(running, port)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProfiledServer]:
    """One server for all tests that leave it as it was."""
    with profiled(tmp_path_factory.mktemp("server"), "-H", "127.0.0.1") as shared:
        yield shared


def error_of(response: tuple[int, dict[str, str], bytes]) -> str:
    """Return the error text of a refused request."""
    assert response[1]["Content-Type"].startswith("application/json")
    return str(json.loads(response[2])["error"])


# Pages.


def test_index_links_to_every_page(shared: ProfiledServer) -> None:
    status, headers, body = shared.get("")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"].startswith("default-src 'none';")
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert b"<script" not in body and b"style" not in body
    links = [link.replace("&amp;", "&") for link in re.findall('href="([^"]*)"', body.decode())]
    assert len(links) == len(set(links)) == 7
    assert links[0] == "profile?seconds=5", "has tests of its own"
    for link in links[1:]:  # in this order: tracing stops after it started
        assert shared.get(link)[0] == 200, link
    assert shared.get("heap")[0] == 409
    status, headers, _ = request(shared.port, "GET", BASE.rstrip("/"))
    assert status == 301 and headers["Location"] == BASE


def test_head_has_no_effects(shared: ProfiledServer) -> None:
    for path in ("", "threads", "cmdline"):
        assert shared.get(path, "HEAD")[::2] == (200, b"")
    for path in ("profile?seconds=60", "heap", "heap?start=1"):
        status, headers, body = shared.get(path, "HEAD")
        assert (status, body) == (200, b"") and headers["Content-Type"] and "Content-Length" not in headers
    assert shared.get("profile?seconds=61", "HEAD")[0] == 400
    assert shared.get("heap")[0] == 409, "HEAD did not start tracing"
    for method in ("POST", "DELETE", "OPTIONS"):
        assert shared.get("", method)[0] == shared.get("profile?seconds=1", method)[0] == 405
    assert shared.get("elsewhere")[0] == request(shared.port, "GET", "/elsewhere")[0] == 404
    assert request(shared.port, "GET", "/")[1]["Location"] == "/debug/pprof/"
    assert request(shared.port, "GET", "/v1.0/stats")[0] == 404, "the profiler has only its own routes"
    assert shared.running.get(BASE)[0] == 404, "the server does not have the profiler's routes"


@pytest.mark.parametrize("seconds", ["0", "61", "-1", "x", "", "1.5", "+5", "٣", "9" * 9, "9" * 5000])
def test_invalid_seconds_are_refused_with_the_valid_range(shared: ProfiledServer, seconds: str) -> None:
    quoted = "%D9%A3" if seconds == "٣" else seconds
    response = shared.get(f"profile?seconds={quoted}")
    assert response[0] == 400
    assert "a whole number from 1 to 60" in error_of(response) and len(error_of(response)) < 120


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("profile?second=5", "unknown parameter 'second', known are: seconds, format"),
        ("profile?seconds=1&format=svg", "format=svg is invalid: expected pprof"),
        ("profile?seconds=1&format=collapsed", "format=collapsed is invalid: expected pprof"),
        ("profile?seconds=1&format=speedscope", "format=speedscope is invalid: expected pprof"),
        ("profile?seconds=1&value=cpu", "unknown parameter 'value', known are: seconds, format"),
        ("threads?x=1", "unknown parameter 'x', known are: none"),
        ("?x", "unknown parameter 'x', known are: none"),
        ("heap?format=svg", "format=svg is invalid: expected pprof or text"),
        ("heap?start=2", "start=2 is invalid: expected 1"),
        ("heap?start=1&stop=1", "use either start=1 or stop=1, not both"),
        ("heap?start=1&frames=0", "frames=0 is invalid: expected a whole number from 1 to 100"),
    ],
)
def test_unknown_or_invalid_parameter_is_refused(shared: ProfiledServer, path: str, reason: str) -> None:
    response = shared.get(path)
    assert (response[0], error_of(response)) == (400, reason)


def test_cmdline_shows_the_arguments(shared: ProfiledServer) -> None:
    arguments = shared.get("cmdline")[2].decode().split("\0")
    assert arguments[-2:] == ["-H", "127.0.0.1"] and arguments[1].endswith("ringoexp.py")
    assert Path(arguments[0]).name == Path(sys.executable).name


def unfinished_request(profiler: ProfiledServer) -> socket.socket:
    """Return a connection to the server that sends only the first line of its request."""
    sock = socket.create_connection(("127.0.0.1", profiler.running.port), DEADLINE)
    sock.sendall(b"GET / HTTP/1.1\r\n")
    return sock


def test_threads_page_shows_names_and_stacks(shared: ProfiledServer) -> None:
    with RawClient(shared.running.port) as client, unfinished_request(shared):
        client.send(frame(2, bytes(4)))
        client.acked(1)
        eventually(lambda: b"http-" in shared.get("threads")[2])
        status, headers, body = shared.get("threads")
    text = body.decode()
    assert status == 200 and headers["Content-Type"] == "text/plain; charset=utf-8"
    blocks = text.split("\n\n")
    assert sum(int(block.split()[0]) for block in blocks) == len(re.findall("^  .*, id [0-9]+", text, re.MULTILINE))
    names = re.findall(r"^  ([^\s,]+), id \d+, \d+\.\d{3} s of CPU", text, re.MULTILINE)
    assert {"MainThread", "accept", "ingest", "profiler"} < set(names)
    assert any(re.fullmatch(r"http-\d+", name) for name in names)
    pair = rb"^2 threads\n  (accept|profiler), id .*\n  (accept|profiler), id .*\n  File "
    eventually(
        lambda: re.search(pair, shared.get("threads")[2], re.MULTILINE), "threads with equal stacks share a block"
    )
    (main,) = [block for block in blocks if "MainThread" in block]
    assert main.rstrip().endswith("while set(received.recv(4096)) == {signal.SIGHUP}:"), "most recent call last"


def test_threads_with_equal_stacks_share_a_block(shared: ProfiledServer) -> None:
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(unfinished_request(shared))
        eventually(lambda: re.search(rb"^50 threads\n(  http-\d+, id .*\n){50}  File", shared.get("threads")[2], re.M))


# Requests of other websites, and addresses.


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Host": "elsewhere.example"},
        {"Host": "elsewhere.example:6061"},
        {"Host": "localhost.elsewhere.example"},
        {"Host": "elsewhere.example", "Origin": "http://elsewhere.example"},
    ],
)
def test_request_of_another_website_is_refused(shared: ProfiledServer, headers: dict[str, str]) -> None:
    for path in ("", "threads", "profile?seconds=1", "heap?start=1", "nothing"):
        assert shared.get(path, **headers)[0] == (421 if "Host" in headers else 403)
    assert shared.get("heap")[0] == 409, "tracing did not start"


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec_Fetch_Site": "none"},
        {"Sec_Fetch_Site": "same-origin"},
        {"Host": "LOCALHOST"},
        {"Host": "127.0.0.1:6061"},
        {"Host": "[::1]:6061"},
        {"Host": "10.0.0.1"},
        {"Host": "localhost:6061", "Origin": "http://localhost:6061"},
    ],
)
def test_request_of_user_or_own_page_is_answered(shared: ProfiledServer, headers: dict[str, str]) -> None:
    assert shared.get("cmdline", **headers)[0] == 200


@pytest.mark.parametrize("host", ["[", "[::1", "a b", "]:[", "%", "[x]", ":", ":80"])
def test_malformed_host_header_is_refused(shared: ProfiledServer, host: str) -> None:
    assert shared.get("cmdline", Host=host)[0] == (421 if host.startswith(":") else 400)


@LINUX
def test_profiler_listens_on_loopback_only_by_default(shared: ProfiledServer) -> None:
    sockets = listening(shared)
    assert ("0100007F", shared.port) in sockets and {port for _, port in sockets} == {shared.running.port, shared.port}
    assert {address for address, _ in sockets} <= {"0100007F", "00000000000000000000000001000000"}


def listening(profiler: ProfiledServer) -> set[tuple[str, int]]:
    """Return address and port of each listening socket of the server."""
    inodes = set()
    for descriptor in Path(f"/proc/{profiler.running.process.pid}/fd").iterdir():
        try:
            match = re.match(r"socket:\[(\d+)\]", os.readlink(descriptor))
        except FileNotFoundError:
            continue  # a connection that has been closed meanwhile
        inodes.add(match[1] if match else "")
    sockets = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{profiler.running.process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                sockets.add((address, int(port, 16)))
    return sockets


@LINUX
def test_profiler_host_beyond_loopback_logs_a_warning(tmp_path: Path, shared: ProfiledServer) -> None:
    flags = ["--profiler_host", "0.0.0.0", "-H", "127.0.0.1"]
    with profiled(tmp_path, *flags) as profiler:
        assert listening(profiler) == {("0100007F", profiler.running.port), ("00000000", profiler.port)}
        log = profiler.running.errors.read_text()
        assert re.search(rf"level=warning event=profiling host=0.0.0.0 port={profiler.port}", log), log
        assert profiler.get("cmdline", Host=socket.gethostname())[0] == 200
        assert profiler.get("cmdline", Host="elsewhere.example")[0] == 421
        assert profiler.get("cmdline", Sec_Fetch_Site="cross-site")[0] == 403
    assert re.search(
        rf"level=info event=profiling host=localhost port={shared.port}", shared.running.errors.read_text()
    )


# Start.


@LINUX
def test_profiler_is_off_by_default(tmp_path: Path, shared: ProfiledServer) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-H", "127.0.0.1") as running:
        off = ProfiledServer(running, 0)
        assert listening(off) == {("0100007F", running.port)}
        assert "profiling" not in running.errors.read_text()
        without = off.thread_count()
    with profiled(tmp_path, "-H", "127.0.0.1") as profiler:
        eventually(lambda: profiler.thread_count() == without + 1, "one more thread, which is blocked")


def startup_error(directory: Path, *flags: str) -> str:
    """Return the error line of a server that cannot start."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "-T", "0", *flags],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 1 and not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "level=" not in line and line]
    assert line.startswith("ringoexp: error: ") and "Traceback" not in done.stderr
    return line


def test_server_does_not_start_if_profiler_cannot_listen(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"-L: cannot listen on localhost:{port}: Address already in use" in startup_error(tmp_path, "-L", port)
    assert "--profiler_host" in startup_error(tmp_path, "-L", "6061", "--profiler_host", "no.such.host.invalid")
    assert "-L: cannot listen on 192.0.2.1:6061" in startup_error(
        tmp_path, "-L", "6061", "--profiler_host", "192.0.2.1"
    )
    with server(tmp_path, "-p", "0", "-T", "0"):
        pass  # the database is not locked


def test_failed_listen_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the database's lock nor a thread, in this process."""
    monkeypatch.chdir(tmp_path)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        settings = read_arguments(["-p", "0", "-T", "0", "-L", port])
        with pytest.raises(StartupError):
            App(settings, [])
    assert set(threading.enumerate()) == before
    with server(tmp_path, "-p", "0", "-T", "0"):
        pass


def test_locked_database_frees_the_profilers_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", "0"):
        with pytest.raises(StoreError) as failed:
            App(read_arguments(["-p", "0", "-T", "0", "-L", str(port)]), [])
        socket.create_server(("127.0.0.1", port)).close()
        assert failed.value  # its traceback keeps the half-built App alive until here


# Profiles.


@pytest.mark.slow
def test_profile_shows_where_the_server_works(shared: ProfiledServer) -> None:
    with RawClient(shared.running.port) as client:
        pending = Blocked(lambda: shared.profile(1))
        count = 0
        while pending.still(0):
            client.send(frame(2, bytes(4)) * 500)
            count += 500
            client.acked(count)
    read = pending.result()
    assert read.types == [("samples", "count"), ("cpu", "nanoseconds"), ("wall", "nanoseconds")]
    assert read.default == "cpu" and 0.9e9 < read.duration_ns < 20e9
    assert abs(read.time_ns / 1e9 - time.time()) < 600
    by_name: dict[str, list[int]] = {}
    for sample in read.samples:
        total = by_name.setdefault(str(sample.labels["thread"]), [0, 0, 0])
        total[:] = [a + b for a, b in zip(total, sample.values, strict=True)]
        assert isinstance(sample.labels["thread id"], int) and sample.values[0] > 0 and sample.calls[-1].line > 0
    assert not [name for name in by_name if name.startswith("profiler-")], "the sampling thread is left out"
    ingest = by_name["ingest"]
    assert ingest[1] > 20 * by_name["MainThread"][1] and ingest[1] > read.duration_ns / 100
    assert abs(by_name["MainThread"][2] - read.duration_ns) < read.duration_ns / 10
    functions = {call.function.rpartition(".")[2] for sample in read.samples for call in sample.calls}
    assert {"serve_forever", "main", "_turn"} <= functions
    files = {call.file for sample in read.samples for call in sample.calls}
    assert {str(ROOT / "ringolib/web/loop.py"), str(ROOT / "store.py")} <= files


@pytest.mark.slow
def test_second_profile_is_refused_until_first_client_leaves(shared: ProfiledServer) -> None:
    with closing(shared.begin(60)) as first:
        status, headers, body = shared.get("profile?seconds=1")
        assert status == 503 and 0 < int(headers["Retry-After"]) <= 60 and "one profile at a time" in str(body)
        assert shared.get("threads")[0] == shared.get("cmdline")[0] == shared.running.get("/v1.0/alive")[0] == 200
        first.shutdown(socket.SHUT_RDWR)
    started = time.monotonic()
    eventually(lambda: shared.get("profile?seconds=1")[0] == 200, "the first client has left")
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_half_closed_client_gets_its_profile(shared: ProfiledServer) -> None:
    with closing(shared.begin(1)) as client:
        client.shutdown(socket.SHUT_WR)
        response = b""
        while data := client.recv(65536):
            response += data
    assert response.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")


def test_client_that_leaves_with_unread_requests_ends_its_profile(shared: ProfiledServer) -> None:
    with closing(shared.begin(60)) as first:
        first.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
    started = time.monotonic()
    eventually(lambda: not shared.is_sampling(), deadline=20)
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_pipelined_requests_are_answered_in_order(shared: ProfiledServer) -> None:
    """A request that arrives during the sampling does not end it, and is answered next."""
    with closing(shared.begin(1)) as sock:
        sock.sendall(f"GET {BASE}cmdline HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answers = b""
        while data := sock.recv(65536):
            answers += data
    head, _, rest = answers.partition(b"\r\n\r\n")
    size = int(re.findall(rb"Content-Length: (\d+)", head)[0])
    assert head.startswith(b"HTTP/1.1 200 ") and read_profile(rest[:size]).samples
    assert rest[size:].startswith(b"HTTP/1.1 200 ") and rest.endswith(b"-H\x00127.0.0.1")


@pytest.mark.slow
def test_profile_may_take_longer_than_request_timeout(tmp_path: Path) -> None:
    with profiled(tmp_path, patch="web.handler.REQUEST_TIMEOUT_SECONDS = 0.5") as profiler:
        connection = http.client.HTTPConnection("localhost", profiler.port, timeout=DEADLINE)
        connection.request("GET", f"{BASE}profile?seconds=1")
        response = connection.getresponse()
        assert response.status == 200 and read_profile(response.read()).samples
        connection.request("GET", f"{BASE}cmdline")
        assert connection.getresponse().status == 200, "on the same connection"
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_profile(tmp_path: Path, number: int) -> None:
    with profiled(tmp_path) as profiler, closing(profiler.begin(60)) as waiting:
        started = time.monotonic()
        assert profiler.running.stop(number) == 0
        assert time.monotonic() - started < 20
        response = waiting.recv(65536)
        assert (
            response.startswith(b"HTTP/1.1 503 ")
            and profiler.running.tally == "ringoexp: stopped, 0 stored, 0 unstored"
        )
        assert not re.search("level=(warning|error)", profiler.running.errors.read_text())


def test_profiler_answers_while_the_server_drains(tmp_path: Path) -> None:
    port, consumer = free_port(), free_port()
    flags = ["-p", "0", "-T", str(consumer), "-L", str(port)]
    with (
        server(tmp_path, *flags, patch="app.DRAIN_SECONDS = 600") as running,
        RawClient(running.port) as client,
    ):
        client.send(frame(2, bytes(4)))
        eventually(lambda: running.stats()["ringDepth"] == 1)
        running.send_signal(signal.SIGTERM)
        eventually(lambda: "draining" in running.errors.read_text())
        text = eventually(lambda: ProfiledServer(running, port).get("threads")[2]).decode()
        assert "in stop" in text and "join" in text or "wait" in text


@pytest.mark.slow
def test_profile_of_a_thousand_threads(tmp_path: Path) -> None:
    with profiled(tmp_path, "-n", "0") as profiler, ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(unfinished_request(profiler))
        eventually(lambda: profiler.thread_count() > 1000)
        read = profiler.profile(1)
        requests = {sample.labels["thread"] for sample in read.samples if "http-" in str(sample.labels["thread"])}
        assert len(requests) == 1000
        counts = [sample.values[0] for sample in read.samples if sample.labels["thread"] == "MainThread"]
        assert sum(counts) > 5, "samples in one second; bench/profile_cost.py measures how many"
        text = profiler.get("threads")[2]
        assert re.search(rb"^1000 threads$", text, re.M) and len(text) < 100_000


@LINUX
def test_connection_beyond_the_limit_takes_the_place_of_an_idle_one(tmp_path: Path) -> None:
    """More connections would use threads that --threads reserves for others."""
    with profiled(tmp_path) as profiler, ExitStack() as stack:
        socks = []
        for _ in range(32 + 1):  # one after the other: the answers have an order
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", profiler.port), DEADLINE))
            sock.sendall(f"GET {BASE}cmdline HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            socks.append(sock)
        assert profiler.thread_count() < 32 + 16
        cut_off = select.select(socks, [], [], DEADLINE)[0]
        assert len(cut_off) == 1 and cut_off[0].recv(1) == b""
        assert cut_off[0] in socks[:16], "it was idle for longer than most"
        assert profiler.running.stop() == 0


# Memory.


def test_heap_shows_memory_traced_since_start(tmp_path: Path) -> None:
    with profiled(tmp_path) as profiler:
        response = profiler.get("heap")
        assert response[0] == 409 and "heap?start=1" in error_of(response)
        assert b"not tracing" in profiler.get("heap?stop=1")[2], "stop without start changes nothing"
        status, headers, body = profiler.get("heap?start=1&frames=20")
        assert status == 200 and b"20 calls" in body
        with RawClient(profiler.running.port) as client:
            client.send(frame(2, bytes(4)))
            client.acked(1)
            status, headers, body = profiler.get("heap")
            text = profiler.get("heap?format=text")[2].decode()
        assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
        read = read_profile(body)
        assert read.types == [("inuse_objects", "count"), ("inuse_space", "bytes")]
        assert read.default == "inuse_space" and read.period[0] == ("space", "bytes")
        traced = [sample for sample in read.samples if any(call.file.endswith("web/loop.py") for call in sample.calls)]
        assert traced and all(sample.values[0] > 0 and sample.values[1] > 0 for sample in traced)
        ends = [(Path(sample.calls[0].file).name, Path(sample.calls[-1].file).name) for sample in traced]
        assert ("loop.py", "threading.py") in ends, "innermost first"
        assert max(len(sample.calls) for sample in read.samples) <= 20
        first, *rest = text.splitlines()
        assert re.fullmatch(r"\d+ bytes now, \d+ at the peak, since tracing started", first)
        sizes = [int(re.fullmatch(r" *(\d+) bytes +\d+ objects  \S.*:\d+", line)[1]) for line in rest]  # type: ignore[index]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) > 10
        again = profiler.get("heap?start=1&frames=5")
        assert again[0] == 409, "the running trace keeps its number of frames"
        assert error_of(again) == "memory is traced already, with 20 calls per allocation: use ?stop=1 first"
        assert profiler.get("heap?start=1&frames=20")[0] == 200
        assert profiler.get("heap?stop=1")[0] == 200
        assert profiler.get("heap")[0] == 409
        assert b"5 calls" in profiler.get("heap?start=1&frames=5")[2]


@pytest.mark.slow
def test_heap_requests_race_with_start_and_stop(tmp_path: Path) -> None:
    with profiled(tmp_path) as profiler:
        over = time.monotonic() + 1

        def ask(path: str) -> set[int]:
            statuses = set()
            while time.monotonic() < over:
                statuses.add(profiler.get(path)[0])
            return statuses

        pending = [Blocked(lambda path=path: ask(path)) for path in ("heap?start=1", "heap?stop=1", "heap", "heap")]  # type: ignore[misc]
        assert set().union(*(sample.result() for sample in pending)) <= {200, 409}
        assert "connection_error" not in profiler.running.errors.read_text()


# Secrets.


@pytest.mark.slow
def test_no_page_shows_data_of_clients(tmp_path: Path) -> None:
    """Profiles and stacks contain names and positions of code, but no values of variables."""
    secret = "s3cr3t"
    with (
        profiled(tmp_path) as profiler,
        closing(socket.create_connection(("localhost", profiler.running.port))) as sock,
    ):
        sock.sendall(f"POST /v1.0/ingest?key={secret} HTTP/1.1\r\nAuthorization: {secret}\r\n".encode())
        started = profiler.get("heap?start=1")
        assert started[0] == 200 and started[2].startswith(b"tracing memory, 1 call kept per allocation;")
        for path in ("", "threads", "heap?format=text", "cmdline"):
            status, _, body = profiler.get(path)
            assert status == 200 and secret.encode() not in body
        for path, name in ("profile?seconds=1&format=pprof", "profile"), ("heap?format=pprof", "heap"):
            status, headers, body = profiler.get(path)
            assert status == 200 and secret.encode() not in gzip.decompress(body)
            assert headers["Content-Type"] == "application/octet-stream"
            assert headers["Content-Disposition"] == f'attachment; filename="{name}.pb.gz"'
        assert profiler.get(f"profile?seconds=1&{secret}=1")[0] == 400


# Go's pprof.


@pytest.fixture
def pprof(tmp_path: Path) -> Iterator[object]:
    go = shutil.which("go")
    if not go:
        pytest.skip("needs Go (Debian: golang-go)")
    environment = {**os.environ, "HOME": str(tmp_path), "PPROF_TMPDIR": str(tmp_path), "GOFLAGS": ""}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [go, "tool", "pprof", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run


@pytest.mark.slow
def test_go_reads_a_profile(shared: ProfiledServer, pprof: "object", tmp_path: Path) -> None:
    url = f"http://localhost:{shared.port}{BASE}profile?seconds=1"
    assert callable(pprof)
    top = pprof("-top", "-sample_index=wall", url)
    assert re.search(r"^Type: wall$", top, re.M) and re.search(r"^Duration: 1[.0-9]*s", top, re.M)
    assert re.search(r"(?s)flat%.*connections\.\S*serve_forever", top)
    (file,) = map(str, tmp_path.glob("pprof.*.pb.gz"))  # pprof keeps a copy of the profile
    raw = pprof("-raw", file)
    assert "samples/count cpu/nanoseconds[dflt] wall/nanoseconds" in raw and "PeriodType: cpu nanoseconds" in raw
    assert "thread:[MainThread]" in raw and re.search(r"thread id:\[\d+", raw)
    assert re.search(r"ringoexp\.\S*main \S*/ringoexp\.py:\d+ s=\d+", raw)
    tags = pprof("-tags", "-sample_index=samples", file)
    assert re.search(r"(?s)thread: Total .*MainThread", tags)


def test_go_reads_a_heap_profile(tmp_path: Path, pprof: "object") -> None:
    with profiled(tmp_path) as profiler:
        assert callable(pprof)
        profiler.get("heap?start=1")
        assert profiler.running.get("/v1.0/stats")[0] == 200
        top = pprof("-top", f"http://localhost:{profiler.port}{BASE}heap")
        assert re.search(r"^Type: inuse_space$", top, re.M) and re.search(r"flat%", top)
        raw = pprof("-raw", f"http://localhost:{profiler.port}{BASE}heap")
        assert "inuse_objects/count inuse_space/bytes[dflt]" in raw


def test_database_is_intact_after_profiling(shared: ProfiledServer) -> None:
    """All tests above profiled this server."""
    assert shared.running.get("/v1.0/alive")[0] == 200
    assert not re.search("level=(warning|error)", shared.running.errors.read_text())
    with closing(sqlite3.connect(shared.running.errors.parent / "ringoexp.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
