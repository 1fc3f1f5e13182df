"""The profiler's port: what it answers, to whom, for how long, and that nothing is there when nobody asks for it."""

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
from support.pprof_reader import Read, check_speedscope, read_profile

BASE = "/debug/pprof/"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Profiled:
    """A server with a profiler on `port`."""

    def __init__(self, running: ServerProcess, port: int) -> None:
        self.running, self.port = running, port

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """The answer to a request below /debug/pprof/."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return request(self.port, method, BASE + path, headers=named)

    def profile(self, seconds: int = 1) -> Read:
        """A profile, decoded."""
        status, headers, body = self.get(f"profile?seconds={seconds}")
        assert (status, headers["Content-Type"]) == (200, "application/octet-stream"), body
        return read_profile(body)

    def begin(self, seconds: int = 60) -> socket.socket:
        """A client that waits for a profile which is being made."""
        sock = socket.create_connection(("127.0.0.1", self.port), DEADLINE)
        sock.sendall(f"GET {BASE}profile?seconds={seconds} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        eventually(self.busy)
        return sock

    def busy(self) -> bool:
        """True while somebody samples."""
        return b"profiler.py" in self.get("threads")[2] and b"in _sample" in self.get("threads")[2]

    def threads(self) -> list[str]:
        """The system's names of all threads are not Python's (before 3.14): their number is what counts."""
        return os.listdir(f"/proc/{self.running.process.pid}/task")


@contextmanager
def profiled(directory: Path, *flags: str, patch: str = "") -> Iterator[Profiled]:
    """A server that stores for itself, with a profiler."""
    port = free_port()
    with server(directory, "-p", "0", "-T", "0", "-L", str(port), *flags, patch=patch) as running:
        yield Profiled(running, port)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Profiled]:
    """One server for all that leaves nothing behind."""
    with profiled(tmp_path_factory.mktemp("server"), "-H", "127.0.0.1") as found:
        yield found


def refusal(answer: tuple[int, dict[str, str], bytes]) -> str:
    """The reason of an error in JSON."""
    assert answer[1]["Content-Type"].startswith("application/json")
    return str(json.loads(answer[2])["error"])


# Pages.


def test_the_index_links_to_all_there_is(one: Profiled) -> None:
    status, headers, body = one.get("")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"].startswith("default-src 'none';")
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert b"<script" not in body and b"style" not in body
    links = [link.replace("&amp;", "&") for link in re.findall('href="([^"]*)"', body.decode())]
    assert len(links) == len(set(links)) == 9
    profiles = {f"profile?seconds=5{more}" for more in ("", "&format=collapsed", "&format=speedscope")}
    assert profiles < set(links), "tests of their own ask for these"
    for link in links:  # in this order: to stop the tracing is after its start
        assert link in profiles or one.get(link)[0] == 200, link
    assert one.get("heap")[0] == 409
    status, headers, _ = request(one.port, "GET", BASE.rstrip("/"))
    assert status == 301 and headers["Location"] == BASE


def test_only_reading_is_for_head(one: Profiled) -> None:
    for path in ("", "threads", "cmdline"):
        assert one.get(path, "HEAD")[::2] == (200, b"")
    for path in ("profile?seconds=1", "heap", "heap?start=1"):
        status, headers, _ = one.get(path, "HEAD")
        assert (status, headers["Allow"]) == (405, "GET")
    for method in ("POST", "DELETE", "OPTIONS"):
        assert one.get("", method)[0] == one.get("profile?seconds=1", method)[0] == 405
    assert one.get("elsewhere")[0] == request(one.port, "GET", "/elsewhere")[0] == 404
    assert request(one.port, "GET", "/")[1]["Location"] == "/debug/pprof/"
    assert request(one.port, "GET", "/v1.0/stats")[0] == 404, "only the profiler"
    assert one.running.get(BASE)[0] == 404, "and only on its port"


@pytest.mark.parametrize("seconds", ["0", "61", "-1", "x", "", "1.5", "+5", "٣", "9" * 9, "9" * 5000])
def test_other_numbers_of_seconds_are_refused_with_what_is_accepted(one: Profiled, seconds: str) -> None:
    quoted = "%D9%A3" if seconds == "٣" else seconds
    answer = one.get(f"profile?seconds={quoted}")
    assert answer[0] == 400 and "a whole number, 1 to 60" in refusal(answer) and len(refusal(answer)) < 120


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("profile?second=5", "'second' is not a parameter here: seconds, format, value"),
        ("profile?seconds=1&format=svg", "format=svg is not accepted: pprof or collapsed or speedscope"),
        ("profile?seconds=1&value=", "value= is not accepted: cpu or wall"),
        ("threads?x=1", "'x' is not a parameter here: none"),
        ("?x", "'x' is not a parameter here: none"),
        ("heap?start=2", "start=2 is not accepted: 1"),
        ("heap?start=1&stop=1", "start=1 or stop=1, not both"),
        ("heap?start=1&frames=0", "frames=0 is not accepted: a whole number, 1 to 100"),
    ],
)
def test_what_is_not_known_is_refused(one: Profiled, path: str, reason: str) -> None:
    answer = one.get(path)
    assert (answer[0], refusal(answer)) == (400, reason)


def test_the_arguments(one: Profiled) -> None:
    found = one.get("cmdline")[2].decode().split("\0")
    assert found[-2:] == ["-H", "127.0.0.1"] and found[1].endswith("ringoexp.py")
    assert Path(found[0]).name == Path(sys.executable).name


def test_threads_are_named_with_their_stacks(one: Profiled) -> None:
    with RawClient(one.running.port) as client:
        client.send(frame(2, bytes(4)))
        client.acked(1)
        status, headers, body = one.get("threads")
    text = body.decode()
    assert status == 200 and headers["Content-Type"] == "text/plain; charset=utf-8"
    blocks = text.split("\n\n")
    assert sum(int(block.split()[0]) for block in blocks) == len(re.findall("^  .*, id [0-9]+", text, re.MULTILINE))
    names = re.findall(r"^  ([^\s,]+), id \d+, \d+\.\d{3} s of CPU", text, re.MULTILINE)
    assert {"MainThread", "accept", "profiler"} < set(names) and any(name.startswith("conn-") for name in names)
    pair = rb"^2 threads\n  (accept|profiler), id .*\n  (accept|profiler), id .*\n  File "
    eventually(lambda: re.search(pair, one.get("threads")[2], re.MULTILINE), "those in the same place together")
    (main,) = [block for block in blocks if "MainThread" in block]
    assert main.rstrip().endswith("while set(woken.recv(4096)) == {signal.SIGHUP}:  # however many came meanwhile"), (
        "most recent call last"
    )


def test_idle_connections_make_one_block_of_threads(one: Profiled) -> None:
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(RawClient(one.running.port))
        eventually(lambda: re.search(rb"^50 threads\n(  conn-\d+, id .*\n){50}  File", one.get("threads")[2], re.M))


# Who may ask.


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
        {"Host": "10.0.0.1"},
    ],
)
def test_pages_from_elsewhere_may_not_ask(one: Profiled, headers: dict[str, str]) -> None:
    for path in ("", "threads", "profile?seconds=1", "heap?start=1", "nothing"):
        assert one.get(path, **headers)[0] == 403
    assert one.get("heap")[0] == 409, "nothing was begun"


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec_Fetch_Site": "none"},
        {"Sec_Fetch_Site": "same-origin"},
        {"Host": "LOCALHOST"},
        {"Host": "127.0.0.1:6061"},
        {"Host": "[::1]:6061"},
    ],
)
def test_people_and_its_own_pages_may(one: Profiled, headers: dict[str, str]) -> None:
    assert one.get("cmdline", **headers)[0] == 200


@pytest.mark.parametrize("host", ["[", "[::1", "a b", "]:[", "%", "[x]", ":", ":80"])
def test_a_host_that_is_none_is_refused(one: Profiled, host: str) -> None:
    assert one.get("cmdline", Host=host)[0] == 403


@LINUX
def test_it_listens_on_the_loopback_address_only(one: Profiled) -> None:
    found = listening(one)
    assert ("0100007F", one.port) in found and {port for _, port in found} == {one.running.port, one.port}
    assert {address for address, _ in found} <= {"0100007F", "00000000000000000000000001000000"}


def listening(profiled: Profiled) -> set[tuple[str, int]]:
    """Address and port of the server's listening sockets."""
    inodes = set()
    for descriptor in Path(f"/proc/{profiled.running.process.pid}/fd").iterdir():
        try:
            found = re.match(r"socket:\[(\d+)\]", os.readlink(descriptor))
        except FileNotFoundError:
            continue  # closed meanwhile: none that listens
        inodes.add(found[1] if found else "")
    sockets = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{profiled.running.process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                sockets.add((address, int(port, 16)))
    return sockets


@LINUX
def test_elsewhere_only_where_it_is_told_with_a_warning(tmp_path: Path, one: Profiled) -> None:
    flags = ["--profiler_host", "0.0.0.0", "-H", "127.0.0.1"]
    with profiled(tmp_path, *flags) as found:
        assert listening(found) == {("0100007F", found.running.port), ("00000000", found.port)}
        log = found.running.errors.read_text()
        assert re.search(rf"level=warning event=profiling host=0.0.0.0 port={found.port}", log), log
        assert found.get("cmdline", Host="a-name-of-this-machine.example")[0] == 200
        assert found.get("cmdline", Sec_Fetch_Site="cross-site")[0] == 403
    assert re.search(rf"level=info event=profiling host=localhost port={one.port}", one.running.errors.read_text())


# Whether it is there.


@LINUX
def test_off_by_default(tmp_path: Path, one: Profiled) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-H", "127.0.0.1") as running:
        off = Profiled(running, 0)
        assert listening(off) == {("0100007F", running.port)}
        assert "profiling" not in running.errors.read_text()
        without = len(off.threads())
    with profiled(tmp_path, "-H", "127.0.0.1") as found:
        eventually(lambda: len(found.threads()) == without + 1, "one thread more, and it is blocked")


def fails(directory: Path, *flags: str) -> str:
    """The one line of a server that cannot run."""
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


def test_where_it_cannot_listen_the_server_does_not_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"-L: cannot listen on localhost:{port}: Address already in use" in fails(tmp_path, "-L", port)
    assert "--profiler_host" in fails(tmp_path, "-L", "6061", "--profiler_host", "no.such.host.invalid")
    assert "-L: cannot listen on 192.0.2.1:6061" in fails(tmp_path, "-L", "6061", "--profiler_host", "192.0.2.1")
    with server(tmp_path, "-p", "0", "-T", "0"):
        pass  # the database is free


def test_where_it_cannot_listen_nothing_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the database's lock nor a thread, in the process itself."""
    from ringolib import app as assembly
    from ringolib.options import read_arguments

    monkeypatch.chdir(tmp_path)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        settings = read_arguments(["-p", "0", "-T", "0", "-L", port])
        with pytest.raises(assembly.StartupError):
            assembly.App(settings, [])
    assert set(threading.enumerate()) == before
    with server(tmp_path, "-p", "0", "-T", "0"):
        pass


def test_where_the_database_is_taken_the_profilers_port_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ringolib import app as assembly
    from ringolib.options import read_arguments
    from store import StoreError

    monkeypatch.chdir(tmp_path)
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", "0"):
        with pytest.raises(StoreError) as failed:
            assembly.App(read_arguments(["-p", "0", "-T", "0", "-L", str(port)]), [])
        socket.create_server(("127.0.0.1", port)).close()
        assert failed.value


# Profiles.


def test_a_profile_of_the_server(one: Profiled) -> None:
    with RawClient(one.running.port) as client:
        asked = Blocked(lambda: one.profile(1))
        count = 0
        while asked.still(0):
            client.send(frame(2, bytes(4)) * 500)
            count += 500
            client.acked(count)
    read = asked.result()
    assert read.types == [("samples", "count"), ("cpu", "nanoseconds"), ("wall", "nanoseconds")]
    assert read.default == "cpu" and 0.9e9 < read.duration_ns < 20e9
    assert abs(read.time_ns / 1e9 - time.time()) < 600
    by_name: dict[str, list[int]] = {}
    for each in read.samples:
        total = by_name.setdefault(str(each.labels["thread"]), [0, 0, 0])
        total[:] = [a + b for a, b in zip(total, each.values, strict=True)]
        assert isinstance(each.labels["thread id"], int) and each.values[0] > 0 and each.calls[-1].line > 0
    assert not [name for name in by_name if name.startswith("profiler-")], "who samples is left out"
    conn = max((name for name in by_name if name.startswith("conn-")), key=lambda name: by_name[name][1])
    assert by_name[conn][1] > 20 * by_name["MainThread"][1] and by_name[conn][1] > read.duration_ns / 100
    assert abs(by_name["MainThread"][2] - read.duration_ns) < read.duration_ns / 10
    functions = {call.function.rpartition(".")[2] for each in read.samples for call in each.calls}
    assert {"serve_forever", "main", "_serve"} <= functions
    assert any(call.file == str(ROOT / "ringolib/net/websocket.py") for each in read.samples for call in each.calls)


def test_lines_for_flame_graphs(one: Profiled) -> None:
    status, headers, body = one.get("profile?seconds=1&format=collapsed&value=wall")
    assert status == 200 and headers["Content-Type"] == "text/plain; charset=utf-8"
    lines = body.decode().splitlines()
    assert all(re.fullmatch(r"[^;]+(;[^;]+)+ [1-9]\d*", line) for line in lines)
    (main,) = [line for line in lines if line.startswith("MainThread;")]
    assert main.partition(" ")[0].endswith(".serve") and 900_000 < int(main.rpartition(" ")[2]) < 20_000_000, "µs"


def test_one_profile_at_a_time(one: Profiled) -> None:
    with closing(one.begin(60)) as first:
        status, headers, body = one.get("profile?seconds=1")
        assert status == 503 and 0 < int(headers["Retry-After"]) <= 60 and "one profile at a time" in str(body)
        assert one.get("threads")[0] == one.get("cmdline")[0] == one.running.get("/v1.0/alive")[0] == 200
        first.shutdown(socket.SHUT_RDWR)
    started = time.monotonic()
    eventually(lambda: one.get("profile?seconds=1")[0] == 200, "free again, as the first one has left")
    assert time.monotonic() - started < 30


def test_a_client_that_leaves_with_something_unread_is_noticed_too(one: Profiled) -> None:
    with closing(one.begin(60)) as first:
        first.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
    started = time.monotonic()
    eventually(lambda: not one.busy(), deadline=20)
    assert time.monotonic() - started < 30


def test_requests_on_one_connection_are_answered_in_turn(one: Profiled) -> None:
    """What comes while it samples does not end it, and is answered after it."""
    with closing(one.begin(1)) as sock:
        sock.sendall(f"GET {BASE}cmdline HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answers = b""
        while data := sock.recv(65536):
            answers += data
    head, _, rest = answers.partition(b"\r\n\r\n")
    size = int(re.findall(rb"Content-Length: (\d+)", head)[0])
    assert head.startswith(b"HTTP/1.1 200 ") and read_profile(rest[:size]).samples
    assert rest[size:].startswith(b"HTTP/1.1 200 ") and rest.endswith(b"-H\x00127.0.0.1")


def test_a_profile_may_take_longer_than_a_request(tmp_path: Path) -> None:
    with profiled(tmp_path, patch="web.handler.REQUEST_TIMEOUT_SECONDS = 0.5") as found:
        connection = http.client.HTTPConnection("localhost", found.port, timeout=DEADLINE)
        connection.request("GET", f"{BASE}profile?seconds=1")
        answer = connection.getresponse()
        assert answer.status == 200 and read_profile(answer.read()).samples
        connection.request("GET", f"{BASE}cmdline")
        assert connection.getresponse().status == 200, "on the same connection"
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_profile(tmp_path: Path, number: int) -> None:
    with profiled(tmp_path) as found, closing(found.begin(60)) as waiting:
        started = time.monotonic()
        assert found.running.stop(number) == 0
        assert time.monotonic() - started < 20
        answer = waiting.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503 ") and found.running.tally == "ringoexp: stopped, 0 stored, 0 unstored"
        assert not re.search("level=(warning|error)", found.running.errors.read_text())


def test_a_server_that_does_not_stop_can_still_be_looked_at(tmp_path: Path) -> None:
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
        text = eventually(lambda: Profiled(running, port).get("threads")[2]).decode()
        assert "in stop" in text and "join" in text or "wait" in text


def test_a_thousand_threads(tmp_path: Path) -> None:
    with profiled(tmp_path, "-n", "0") as found, ExitStack() as stack:
        for _ in range(1000):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", found.running.port), DEADLINE))
            sock.sendall(b"GET / HTTP/1.1\r\n")  # and no more
        eventually(lambda: len(found.threads()) > 1000)
        read = found.profile(1)
        conns = {each.labels["thread"]: each for each in read.samples if str(each.labels["thread"]).startswith("conn-")}
        assert len(conns) == 1000
        counts = [each.values[0] for each in read.samples if each.labels["thread"] == "MainThread"]
        assert sum(counts) > 5, "samples, in a second; how many: bench/profile_cost.py"
        text = found.get("threads")[2]
        assert re.search(rb"^1000 threads$", text, re.M) and len(text) < 100_000


@LINUX
def test_its_connections_are_limited_and_the_next_ones_wait(tmp_path: Path) -> None:
    """Or they would take the threads that --threads leaves to others."""
    with profiled(tmp_path) as found, ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", found.port), DEADLINE)) for _ in range(32 + 1)
        ]
        for sock in socks:
            sock.sendall(f"GET {BASE}cmdline HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        for sock in socks[:-1]:
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        assert not select.select([socks[-1]], [], [], 0.2)[0] and len(found.threads()) < 32 + 16
        socks[0].close()
        assert socks[-1].recv(65536).startswith(b"HTTP/1.1 200")
        assert found.running.stop() == 0


# Memory.


def test_memory_is_traced_when_asked(tmp_path: Path) -> None:
    with profiled(tmp_path) as found:
        answer = found.get("heap")
        assert answer[0] == 409 and "heap?start=1" in refusal(answer)
        assert b"not tracing" in found.get("heap?stop=1")[2], "does no harm"
        status, headers, body = found.get("heap?start=1&frames=20")
        assert status == 200 and b"20 calls" in body
        with RawClient(found.running.port) as client:
            client.send(frame(2, bytes(4)))
            client.acked(1)
            status, headers, body = found.get("heap")
            text = found.get("heap?format=text")[2].decode()
        assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
        read = read_profile(body)
        assert read.types == [("inuse_objects", "count"), ("inuse_space", "bytes")]
        assert read.default == "inuse_space" and read.period[0] == ("space", "bytes")
        traced = [each for each in read.samples if any(call.file.endswith("websocket.py") for call in each.calls)]
        assert traced and all(each.values[0] > 0 and each.values[1] > 0 for each in traced)
        ends = [(Path(each.calls[0].file).name, Path(each.calls[-1].file).name) for each in traced]
        assert ("websocket.py", "threading.py") in ends, "innermost first"
        assert max(len(each.calls) for each in read.samples) <= 20
        first, *rest = text.splitlines()
        assert re.fullmatch(r"\d+ bytes now, \d+ at the peak, since the tracing began", first)
        sizes = [int(re.fullmatch(r" *(\d+) bytes +\d+ objects  \S.*:\d+", line)[1]) for line in rest]  # type: ignore[index]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) > 10
        again = found.get("heap?start=1&frames=5")
        assert again[0] == 200 and b"20 calls" in again[2], "it goes on as it was begun"
        assert found.get("heap?stop=1")[0] == 200
        assert found.get("heap")[0] == 409
        assert b"5 calls" in found.get("heap?start=1&frames=5")[2]


def test_asking_while_another_stops_the_tracing(tmp_path: Path) -> None:
    with profiled(tmp_path) as found:
        over = time.monotonic() + 1

        def ask(path: str) -> set[int]:
            statuses = set()
            while time.monotonic() < over:
                statuses.add(found.get(path)[0])
            return statuses

        asked = [Blocked(lambda path=path: ask(path)) for path in ("heap?start=1", "heap?stop=1", "heap", "heap")]  # type: ignore[misc]
        assert set().union(*(each.result() for each in asked)) <= {200, 409}
        assert "connection_error" not in found.running.errors.read_text()


# Secrets.


def test_what_was_sent_is_not_shown_in_any_format(tmp_path: Path) -> None:
    """Names and places of code, not what is in variables."""
    secret = "s3cr3t"
    with profiled(tmp_path) as found, closing(socket.create_connection(("localhost", found.running.port))) as sock:
        sock.sendall(f"POST /v1.0/ingest?key={secret} HTTP/1.1\r\nAuthorization: {secret}\r\n".encode())
        assert found.get("heap?start=1")[0] == 200
        pages = ("", "threads", "heap?format=text", "profile?seconds=1&format=speedscope", "cmdline")
        answers = {path: found.get(path) for path in pages}
        for status, _, body in answers.values():
            assert status == 200 and secret.encode() not in body
        _, headers, body = answers[pages[3]]
        assert headers["Content-Type"] == "application/json"
        assert headers["Content-Disposition"] == 'attachment; filename="profile.speedscope.json"'
        check_speedscope(json.loads(body))
        assert found.get(f"profile?seconds=1&{secret}=1")[0] == 400


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


def test_go_reads_a_profile(one: Profiled, pprof: "object", tmp_path: Path) -> None:
    url = f"http://localhost:{one.port}{BASE}profile?seconds=1"
    assert callable(pprof)
    top = pprof("-top", "-sample_index=wall", url)
    assert re.search(r"^Type: wall$", top, re.M) and re.search(r"^Duration: 1[.0-9]*s", top, re.M)
    assert re.search(r"(?s)flat%.*connections\.\S*serve_forever", top)
    (file,) = map(str, tmp_path.glob("pprof.*.pb.gz"))  # it keeps what it has got
    raw = pprof("-raw", file)
    assert "samples/count cpu/nanoseconds[dflt] wall/nanoseconds" in raw and "PeriodType: cpu nanoseconds" in raw
    assert "thread:[MainThread]" in raw and re.search(r"thread id:\[\d+", raw)
    assert re.search(r"ringoexp\.\S*main \S*/ringoexp\.py:\d+ s=\d+", raw)
    tags = pprof("-tags", "-sample_index=samples", file)
    assert re.search(r"(?s)thread: Total .*MainThread", tags)


def test_go_reads_memory(tmp_path: Path, pprof: "object") -> None:
    with profiled(tmp_path) as found:
        assert callable(pprof)
        found.get("heap?start=1")
        assert found.running.get("/v1.0/stats")[0] == 200
        top = pprof("-top", f"http://localhost:{found.port}{BASE}heap")
        assert re.search(r"^Type: inuse_space$", top, re.M) and re.search(r"flat%", top)
        raw = pprof("-raw", f"http://localhost:{found.port}{BASE}heap")
        assert "inuse_objects/count inuse_space/bytes[dflt]" in raw


def test_the_database_is_whole_after_all_this(one: Profiled) -> None:
    """The server was profiled for the whole of this file."""
    assert one.running.get("/v1.0/alive")[0] == 200
    assert not re.search("level=(warning|error)", one.running.errors.read_text())
    with closing(sqlite3.connect(one.running.errors.parent / "ringoexp.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
