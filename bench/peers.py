"""Measures alternatives to Ringo Exp on this machine: each stores and acks single integers of 4 bytes.

    python bench/peers.py [--seconds N] [--rounds N] [--modules DIR]

The bench measures the installed alternatives and prints how to install the others. Each has its fastest configuration
in which acked messages survive a power loss (except JetStream, which acks before its fsync). There are two workloads:

- streaming: one connection that sends as fast as the server takes it
- crowds: 1, 64, 500 and 2,000 clients with one message in flight each, and 2,000 clients that send one message a
  second; Redis and JetStream, which have their own protocols, are measured with one client only

In each round, all alternatives do one workload after another, each with a new server, before the next workload
starts. After each run the database must hold as many records as were acked. The tables show medians of the rounds.
Machines differ, so run `bench.py` on the same one.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import re
import shutil
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import isnan, nan
from pathlib import Path
from typing import NamedTuple, TypeAlias

import crowd
import load

from bench import busy_note, cpu_seconds, generate, measure_crowd, own_consumer, say, stored, system

HERE = Path(__file__).resolve().parent
FIRST = 100_000
"""Messages in the first streaming run, which determines the number of messages for a run of the wanted duration."""
DEADLINE = 20.0
GO_PATH = Path("/usr/share/gocode")
"""Where Debian keeps the sources of Go packages."""


class Missing(Exception):
    """An alternative is not installed. The text tells how to install it."""


class Case(NamedTuple):
    """A workload: `clients` with one message in flight each, or with one per `interval`; 0 clients: streaming."""

    title: str
    clients: int = 0
    interval: float | None = None


STREAMING, ONE, SLOW = Case("streaming"), Case("1 client", 1), Case("2,000 at 1/s", 2000, 1.0)
CROWDS = (ONE, Case("64", 64), Case("500", 500), Case("2,000", 2000), SLOW)


class Figures(NamedTuple):
    """The measurements of one run. Latencies are from sending a message to its ack, in ms; streaming has none."""

    rate: float  # acked messages per second
    cores: float  # processor time of the server per second
    p50: float = nan
    p99: float = nan
    served: float = 1.0  # share of the due messages that were sent and acked

    def __str__(self) -> str:
        latency = "" if isnan(self.p50) else f", p50 {milliseconds(self.p50)}, p99 {milliseconds(self.p99)} ms"
        served = "" if self.served == 1 else f", {self.served:.1%} served"
        return f"{self.rate:,.0f}/s{latency}, {self.cores:.2f} cores{served}"


class Tools(NamedTuple):
    """What the alternatives are made with: the directory of Node modules, and one for programs that are built."""

    modules: str
    directory: Path


class WebSocketServer(NamedTuple):
    """A server with the protocol of Ringo Exp, its processes, and its database."""

    port: int
    pids: Sequence[int]
    database: Path

    def measure(self, case: Case, seconds: float) -> Figures:
        """Run a workload for about `seconds`."""
        if case == STREAMING:
            before = cpu_seconds(*self.pids)
            sent, taken, rate = enough(seconds, lambda messages: generate(self.port, 1, messages, "4")["seconds"])
            cores = (cpu_seconds(*self.pids) - before) / taken
            check(stored(self.database), sent)
            return Figures(rate, cores)
        result, cores = measure_crowd(self.port, self.pids, self.database, case.clients, seconds, case.interval)
        return Figures(result.rate, cores, result.p50, result.p99, result.served)


class LineServer(NamedTuple):
    """A server with its own protocol: a connection to it, a request that stores a record, and how answers look."""

    sock: socket.socket
    pid: int
    request: bytes
    answers: Callable[[bytes], int]
    window: int  # unanswered requests when streaming
    total: Callable[[], int]  # returns the number of stored records

    def measure(self, case: Case, seconds: float) -> Figures:
        """Run a workload of one client for about `seconds`."""
        before = cpu_seconds(self.pid)
        if case == STREAMING:
            sent, taken, rate = enough(
                seconds, lambda messages: pump(self.sock, self.request, messages, self.answers, self.window)
            )
            latencies = []
        else:
            started = time.perf_counter()
            latencies = ping_pong(self.sock, self.request, self.answers, seconds)
            taken, sent = time.perf_counter() - started, len(latencies)
            rate = sent / taken
        cores = (cpu_seconds(self.pid) - before) / taken
        check(self.total(), sent)
        return Figures(rate, cores, *crowd.percentiles(latencies)[:2])


Peer: TypeAlias = "Callable[[Tools], AbstractContextManager[WebSocketServer | LineServer]]"


@contextmanager
def process(*command: str, directory: str, env: dict[str, str] | None = None) -> "Iterator[subprocess.Popen[str]]":
    """Run a process, and terminate it at the end of the block."""
    running = subprocess.Popen(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    try:
        yield running
    finally:
        running.terminate()
        running.communicate(timeout=DEADLINE)


@contextmanager
def rival(*command: str, env: dict[str, str] | None = None) -> Iterator[WebSocketServer]:
    """Run a server that prints its port and stores in peer.db, in a new directory."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        with process(*command, directory=directory, env=env) as running:
            assert running.stdout
            line = running.stdout.readline()
            if not line:
                raise SystemExit(f"did not start: {' '.join(command)}")
            yield WebSocketServer(int(line), [running.pid], Path(directory, "peer.db"))


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def connect(port: int) -> socket.socket:
    """Return a TCP connection to a server that may still be starting."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), DEADLINE)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def pump(sock: socket.socket, request: bytes, count: int, answers: Callable[[bytes], int], window: int) -> float:
    """Send `request` `count` times, at most `window` of them unanswered; return the seconds until the last answer."""
    block = request * min(window, 2000)
    answered = sent = at = 0
    started = time.perf_counter()
    sock.setblocking(False)
    size = len(request)
    while answered < count:
        room = min(count, answered + window) * size - sent
        if room > 0:
            try:
                part = sock.send(block[at : at + min(room, 1 << 16)])
                sent += part
                at = (at + part) % (len(block) if len(block) % size == 0 else size)
            except BlockingIOError:
                pass
        sock.settimeout(DEADLINE if room <= 0 else 0)
        try:
            data = sock.recv(1 << 18)
            if not data:
                raise ConnectionError("closed before the last answer")
            answered += answers(data)
        except BlockingIOError:
            pass
        sock.setblocking(False)
    return time.perf_counter() - started


def ping_pong(sock: socket.socket, request: bytes, answers: Callable[[bytes], int], seconds: float) -> list[float]:
    """Send with one message in flight for `seconds`; return the times to the answers, in seconds."""
    sock.settimeout(DEADLINE)
    latencies = []
    now = time.perf_counter()
    end = now + seconds
    while now < end:
        started = now
        sock.sendall(request)
        while not answers(sock.recv(65536)):
            pass
        now = time.perf_counter()
        latencies.append(now - started)
    return latencies


def enough(seconds: float, run: Callable[[int], float]) -> tuple[int, float, float]:
    """Run a few messages, then as many as take about `seconds`.

    Return the messages of both runs, the seconds of both, and the rate of the second. `run` sends a number of messages
    and returns the seconds that it took.
    """
    first = run(FIRST)
    messages = max(FIRST, int(FIRST / first * seconds))
    second = run(messages)
    return FIRST + messages, first + second, messages / second


def check(held: int, sent: int) -> None:
    """End the program unless every acked message is stored once."""
    if held != sent:
        raise SystemExit(f"{held} messages are stored, but {sent} were acked")


# The alternatives. Each starts a server with an empty database.


@contextmanager
def ringoexp_alone(tools: Tools) -> Iterator[WebSocketServer]:
    """Ringo Exp without flags."""
    with own_consumer() as (server, database):
        yield WebSocketServer(server.port, [server.pid], database)


@contextmanager
def ringoexp(tools: Tools) -> Iterator[WebSocketServer]:
    """Publisher and consumer with the default ring."""
    with system(4096) as (publisher, consumer, database):
        yield WebSocketServer(publisher.port, [publisher.pid, consumer.pid], database)


@contextmanager
def ringoexp_large(tools: Tools) -> Iterator[WebSocketServer]:
    """Publisher and consumer with a larger ring."""
    with system(65_536) as (publisher, consumer, database):
        yield WebSocketServer(publisher.port, [publisher.pid, consumer.pid], database)


@contextmanager
def go(tools: Tools) -> Iterator[WebSocketServer]:
    """rival.go: one commit for all messages since the last commit."""
    sources = [GO_PATH / "src/github.com" / name for name in ("gorilla/websocket", "mattn/go-sqlite3")]
    if not shutil.which("go") or not all(map(Path.exists, sources)):
        raise Missing("apt install golang-go golang-github-{gorilla-websocket,mattn-go-sqlite3}-dev")
    program = tools.directory / "rival"
    if not program.exists():
        env = {**os.environ, "GO111MODULE": "off", "GOFLAGS": "", "CGO_ENABLED": "1", "GOPATH": str(GO_PATH)}
        subprocess.run(["go", "build", "-o", str(program), str(HERE / "rival.go")], env=env, check=True)
    with rival(str(program)) as server:
        yield server


@contextmanager
def node(tools: Tools) -> Iterator[WebSocketServer]:
    """rival.js: one commit for all messages of a turn of the event loop."""
    env = {**os.environ, "NODE_PATH": tools.modules}
    test = "require('ws'); require('better-sqlite3')"
    if not shutil.which("node") or subprocess.run(["node", "-e", test], env=env, stderr=subprocess.DEVNULL).returncode:
        raise Missing("apt install nodejs npm; npm install --prefix DIR ws better-sqlite3; --modules DIR/node_modules")
    with rival("node", str(HERE / "rival.js"), env=env) as server:
        yield server


@contextmanager
def websockets_sqlite(tools: Tools) -> Iterator[WebSocketServer]:
    """The server below: one commit for all messages since the last commit."""
    if not importlib.util.find_spec("websockets"):
        raise Missing("pip install websockets")
    with rival(sys.executable, str(Path(__file__).resolve()), "--serve-websockets") as server:
        yield server


@contextmanager
def redis(tools: Tools) -> Iterator[LineServer]:
    """XADD over the protocol of Redis."""
    if not shutil.which("redis-server"):
        raise Missing("apt install redis-server")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        flags = ["--port", str(port), "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        with process("redis-server", *flags, directory=directory) as server, connect(port) as sock:
            words = [b"XADD", b"s", b"*", b"v", b"1234567890"]
            request = b"*5\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)

            def count() -> int:
                sock.settimeout(DEADLINE)
                sock.sendall(b"XLEN s\r\n")
                return int(sock.recv(100)[1:])

            yield LineServer(sock, server.pid, request, Answers(b"\r\n", repeats=2), 20_000, count)


@contextmanager
def jetstream(tools: Tools) -> Iterator[LineServer]:
    """JetStream over WebSocket with file storage."""
    if not shutil.which("nats-server"):
        raise Missing("apt install nats-server")
    port, other = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        config = f'listen: "127.0.0.1:{other}"\njetstream {{ store_dir: "{directory}" }}\n'
        config += f'websocket {{ listen: "127.0.0.1:{port}", no_tls: true }}\n'
        Path(directory, "nats.conf").write_text(config)
        with process("nats-server", "-c", "nats.conf", directory=directory) as server:
            connect(port).close()
            with load.connect(port) as sock:

                def ask(request: str, until: bytes) -> bytes:
                    sock.settimeout(DEADLINE)
                    sock.sendall(masked(request.encode()))
                    received = b""
                    while until not in received:
                        received += sock.recv(65536)
                    return received

                def count() -> int:
                    info = ask("PUB $JS.API.STREAM.INFO.s in 0\r\n\r\n", b'"consumer_count"')
                    match = re.search(rb'"messages":(\d+)', info)
                    return int(match[1]) if match else 0

                stream = json.dumps({"name": "s", "subjects": ["s"], "storage": "file"})
                create = f"PUB $JS.API.STREAM.CREATE.s in {len(stream)}\r\n{stream}\r\n"
                ask(f"CONNECT {{}}\r\nSUB in 1\r\n{create}", b"stream_create_response")
                request = masked(b"PUB s in 4\r\n\0\1\2\3\r\n")
                yield LineServer(sock, server.pid, request, Answers(b'"seq":'), 4000, count)


PEERS: dict[str, tuple[Peer, Sequence[Case]]] = {
    "Ringo Exp, no flags, one process": (ringoexp_alone, (STREAMING, *CROWDS)),
    "Ringo Exp, two processes": (ringoexp, (STREAMING, *CROWDS)),
    "Ringo Exp, two, -r 65536": (ringoexp_large, (STREAMING,)),
    "Go gorilla/websocket, go-sqlite3": (go, (STREAMING, *CROWDS)),
    "Node ws, better-sqlite3": (node, (STREAMING, *CROWDS)),
    "Python websockets, sqlite3": (websockets_sqlite, (STREAMING, *CROWDS)),
    "Redis Streams, appendfsync always": (redis, (STREAMING, ONE)),
    "NATS JetStream, acks before fsync": (jetstream, (STREAMING, ONE)),
}


class Answers:
    """Counts answers in a stream: an answer contains `pattern` `repeats` times, in any division into pieces."""

    def __init__(self, pattern: bytes, repeats: int = 1) -> None:
        self._pattern, self._repeats = pattern, repeats
        self._tail, self._seen = b"", 0

    def __call__(self, data: bytes) -> int:
        """Return the number of answers that `data` completes."""
        data = self._tail + data
        matches = data.count(self._pattern)
        keep = len(self._pattern) - 1
        self._tail = data[max(len(data) - keep, data.rfind(self._pattern) + len(self._pattern)) :] if keep else b""
        before = self._seen // self._repeats
        self._seen += matches
        return self._seen // self._repeats - before


def masked(payload: bytes) -> bytes:
    """Return a binary frame of a client."""
    size = len(payload)
    head = bytes([0x82, 0x80 | size]) if size < 126 else b"\x82\xfe" + struct.pack(">H", size)
    return head + bytes(4) + payload


async def serve_websockets() -> None:
    """Run the server of `websockets_sqlite`."""
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.exceptions import ConnectionClosed

    database = sqlite3.connect("peer.db", isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE record(id INTEGER PRIMARY KEY, value INTEGER NOT NULL)")
    values: list[tuple[int]] = []
    gathered: dict[ServerConnection, int] = {}  # the records of each client in `values`
    stored: dict[ServerConnection, int] = {}
    arrived = asyncio.Event()

    async def commit() -> None:
        nonlocal values, gathered
        while True:
            await arrived.wait()
            arrived.clear()
            (batch, values), (counts, gathered) = (values, []), (gathered, {})
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT INTO record(value) VALUES (?)", batch)
            database.execute("COMMIT")
            for client, count in counts.items():
                stored[client] = stored.get(client, 0) + count
                try:
                    await client.send(struct.pack(">Q", stored[client]))
                except ConnectionClosed:
                    pass

    async def handle(client: ServerConnection) -> None:
        async for message in client:
            assert isinstance(message, bytes)
            values.append(struct.unpack(">i", message))
            gathered[client] = gathered.get(client, 0) + 1
            arrived.set()

    committer = asyncio.create_task(commit())
    async with serve(handle, "127.0.0.1", 0, compression=None, backlog=1024) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await committer


# The tables.


def median(runs: Sequence[Figures]) -> Figures:
    """Return the median of each figure."""
    return Figures(*(statistics.median(column) for column in zip(*runs, strict=True)))


def milliseconds(latency: float) -> str:
    """Return a latency with three digits or all before the point."""
    return f"{latency:.{0 if latency >= 100 else 1 if latency >= 10 else 2}f}"


def table(
    title: str, cases: Sequence[Case], figures: dict[str, dict[Case, Figures]], cell: Callable[[Figures], str]
) -> list[str]:
    """Return the lines of a table with a row for each alternative and a column for each case."""
    width = max(map(len, PEERS))
    lines = ["", title, " " * width + "".join(f"{case.title:>13}" for case in cases)]
    for name, by_case in figures.items():
        if any(case in by_case for case in cases):
            cells = (cell(by_case[case]) if case in by_case else "-" for case in cases)
            lines.append(f"{name:{width}}" + "".join(f"{text:>13}" for text in cells))
    return lines


def tables(figures: dict[str, dict[Case, Figures]]) -> list[str]:
    """Return the lines of all tables."""
    rates = table("messages per second", (STREAMING, *CROWDS[:-1]), figures, lambda run: f"{run.rate:,.0f}")
    acks = table(
        "ack in ms, p50 / p99",
        CROWDS,
        figures,
        lambda run: f"{milliseconds(run.p50)} / {milliseconds(run.p99)}",
    )
    cores = table("cores used by the server", CROWDS, figures, lambda run: f"{run.cores:.2f}")
    late = [
        f"{name}, {SLOW.title}: served {by_case[SLOW].served:.1%} of the messages that were due"
        for name, by_case in figures.items()
        if SLOW in by_case and by_case[SLOW].served < 1
    ]
    return [*rates, *acks, *cores, "", *(late or [f"{SLOW.title}: all served all messages"])]


def measure(tools: Tools, seconds: float, rounds: int) -> tuple[dict[str, dict[Case, Figures]], dict[str, str]]:
    """Measure all peers; return their medians by name and case, and why others are missing."""
    runs: dict[str, dict[Case, list[Figures]]] = {}
    missing: dict[str, str] = {}
    for turn in range(rounds):
        for case in (STREAMING, *CROWDS):
            say(f"round {turn + 1} of {rounds}: {case.title}")
            for name, (start, cases) in PEERS.items():
                if case not in cases or name in missing:
                    continue
                try:
                    with start(tools) as server:
                        run = server.measure(case, seconds)
                except Missing as reason:
                    missing[name] = str(reason)
                    continue
                say(f"  {name}: {run}")
                runs.setdefault(name, {}).setdefault(case, []).append(run)
    return {name: {case: median(all_) for case, all_ in by_case.items()} for name, by_case in runs.items()}, missing


def main() -> None:
    parser = argparse.ArgumentParser(description="measures alternatives to Ringo Exp with the same work")
    parser.add_argument("--seconds", type=float, default=2, help="approximate duration of a run (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default 3)")
    parser.add_argument("--modules", default="node_modules", help="node_modules directory with ws and better-sqlite3")
    parser.add_argument("--serve-websockets", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_websockets:
        asyncio.run(serve_websockets())
        return
    note = busy_note()
    if note:
        say(note)
    most = max(case.clients for case in CROWDS)
    if crowd.allow_clients(most) < most:
        raise SystemExit(f"the hard limit of open files is too low for {most} clients (ulimit -Hn)")
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        tools = Tools(str(Path(arguments.modules).resolve()), Path(directory))
        figures, missing = measure(tools, arguments.seconds, arguments.rounds)
    if note:
        print(note)
    print(
        f"Medians of {arguments.rounds} runs of about {arguments.seconds:g} s. Clients have one message in flight each."
    )
    print("\n".join(tables(figures)), end="\n\n" if missing else "\n")
    for name, reason in missing.items():
        print(f"{name} is not installed:\n  {reason}")


if __name__ == "__main__":
    main()
