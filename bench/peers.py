"""Measures alternatives to Ringo Exp on this machine: each stores and acks single integers of 4 bytes.

    python bench/peers.py [--seconds N] [--modules DIR]

The bench measures the installed alternatives and prints how to install the others. Each has its fastest configuration
in which acked messages survive a power loss (except JetStream, which acks before its fsync). It gets the messages on
one connection, as fast as it takes them, for about the same time. Afterwards it must hold as many messages as it has
acked. Machines differ, so run `bench.py` on the same one.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import load

from bench import generate, own_consumer, say, stored, system

ROUNDS = 3
FIRST = 100_000
"""Messages in the first run, which determines the number of messages for a run of the wanted duration."""
PINGS = 2000
DEADLINE = 20.0

NODE_SERVER = """
const db = new (require('better-sqlite3'))('peer.db');
db.pragma('journal_mode = WAL'); db.pragma('synchronous = FULL');
db.exec('CREATE TABLE record(id INTEGER PRIMARY KEY, value INTEGER NOT NULL)');
const one = db.prepare('INSERT INTO record(value) VALUES (?)');
const many = db.prepare('INSERT INTO record(value) VALUES ' + Array(256).fill('(?)').join());
const store = db.transaction(values => {
  let i = 0;
  for (; i + 256 <= values.length; i += 256) many.run(values.slice(i, i + 256));
  for (; i < values.length; i++) one.run(values[i]);
});
const server = new (require('ws').Server)({port: 0, host: '127.0.0.1', perMessageDeflate: false});
server.on('listening', () => console.log(server.address().port));
server.on('connection', ws => {
  let values = [], stored = 0, waiting = false;
  const flush = () => {
    waiting = false;
    store(values); stored += values.length; values = [];
    const ack = Buffer.alloc(8); ack.writeBigUInt64BE(BigInt(stored)); ws.send(ack);
  };
  ws.on('message', data => {
    values.push(data.readInt32BE(0));
    if (!waiting) { waiting = true; setImmediate(flush); }
  });
});
"""


class Missing(Exception):
    """An alternative is not installed. The text tells how to install it."""


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


def ping_pong(sock: socket.socket, request: bytes, answers: Callable[[bytes], int]) -> float:
    """Send with one message in flight; return the median time to the answer, in ms."""
    sock.settimeout(DEADLINE)
    taken = []
    for _ in range(PINGS):
        started = time.perf_counter()
        sock.sendall(request)
        while not answers(sock.recv(65536)):
            pass
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1000


def enough(seconds: float, run: Callable[[int], float]) -> tuple[int, float]:
    """Run a few messages, then as many as take about `seconds`; return their total and the rate of the second run.

    `run` sends a number of messages and returns the seconds that it took.
    """
    messages = max(FIRST, int(FIRST / run(FIRST) * seconds))
    return FIRST + messages, messages / run(messages)


def websocket(port: int, seconds: float, count: Callable[[], int]) -> tuple[float, float]:
    """Measure a server that acks as Ringo Exp does: messages per second, and the median ack in ms.

    `count` returns the number of records that it has stored.
    """
    sent, rate = enough(seconds, lambda messages: generate(port, 1, messages, 4)["seconds"])
    latency = generate(port, 1, PINGS, 4, "--in-flight-1")["p50"]
    check(count(), sent + PINGS)
    return rate, latency


def check(held: int, sent: int) -> None:
    """End the program unless every acked message is stored once."""
    if held != sent:
        raise SystemExit(f"{held} messages are stored, but {sent} were acked")


# The alternatives. Each returns messages per second, and the median ack in ms with one message in flight.
# The first line of its docstring is its name in the table.


def ringoexp(seconds: float, modules: str) -> tuple[float, float]:
    """Ringo Exp with its default ring, publisher and consumer in two processes."""
    with system(4096) as (publisher, _, database):
        return websocket(publisher.port, seconds, lambda: stored(database))


def ringoexp_large(seconds: float, modules: str) -> tuple[float, float]:
    """Ringo Exp with -r 65536, publisher and consumer in two processes."""
    with system(65_536) as (publisher, _, database):
        return websocket(publisher.port, seconds, lambda: stored(database))


def ringoexp_alone(seconds: float, modules: str) -> tuple[float, float]:
    """Ringo Exp with no flags: one process."""
    with own_consumer() as (server, database):
        return websocket(server.port, seconds, lambda: stored(database))


def node(seconds: float, modules: str) -> tuple[float, float]:
    """Node ws + better-sqlite3: one commit for all messages of a turn of the event loop."""
    env = {**os.environ, "NODE_PATH": modules}
    test = "require('ws'); require('better-sqlite3')"
    if not shutil.which("node") or subprocess.run(["node", "-e", test], env=env, stderr=subprocess.DEVNULL).returncode:
        raise Missing("apt install nodejs npm; npm install --prefix DIR ws better-sqlite3; --modules DIR/node_modules")
    with tempfile.TemporaryDirectory() as directory:
        with process("node", "-e", NODE_SERVER, directory=directory, env=env) as server:
            assert server.stdout
            port = int(server.stdout.readline())
            return websocket(port, seconds, lambda: stored(Path(directory, "peer.db")))


def websockets_sqlite(seconds: float, modules: str) -> tuple[float, float]:
    """Python websockets + SQLite: one commit for all messages since the last commit."""
    if not importlib.util.find_spec("websockets"):
        raise Missing("pip install websockets")
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(Path(__file__).resolve()), "--serve-websockets"]
        with process(*command, directory=directory) as server:
            assert server.stdout
            port = int(server.stdout.readline())
            return websocket(port, seconds, lambda: stored(Path(directory, "peer.db")))


def redis(seconds: float, modules: str) -> tuple[float, float]:
    """Redis Streams, XADD over its own protocol, appendfsync always."""
    if not shutil.which("redis-server"):
        raise Missing("apt install redis-server")
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--port", str(port), "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        with process("redis-server", *flags, directory=directory), connect(port) as sock:
            words = [b"XADD", b"s", b"*", b"v", b"1234567890"]
            request = b"*5\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
            answers = Answers(b"\r\n", repeats=2)
            sent, rate = enough(seconds, lambda messages: pump(sock, request, messages, answers, 20_000))
            latency = ping_pong(sock, request, answers)
            sock.sendall(b"XLEN s\r\n")
            check(int(sock.recv(100)[1:]), sent + PINGS)
            return rate, latency


def jetstream(seconds: float, modules: str) -> tuple[float, float]:
    """NATS JetStream over WebSocket, file storage; acks before fsync."""
    if not shutil.which("nats-server"):
        raise Missing("apt install nats-server")
    port, other = free_port(), free_port()
    with tempfile.TemporaryDirectory() as directory:
        config = f'listen: "127.0.0.1:{other}"\njetstream {{ store_dir: "{directory}" }}\n'
        config += f'websocket {{ listen: "127.0.0.1:{port}", no_tls: true }}\n'
        Path(directory, "nats.conf").write_text(config)
        with process("nats-server", "-c", "nats.conf", directory=directory):
            connect(port).close()
            with load.connect(port) as sock:

                def ask(request: str, until: bytes) -> bytes:
                    sock.settimeout(DEADLINE)
                    sock.sendall(masked(request.encode()))
                    received = b""
                    while until not in received:
                        received += sock.recv(65536)
                    return received

                stream = json.dumps({"name": "s", "subjects": ["s"], "storage": "file"})
                create = f"PUB $JS.API.STREAM.CREATE.s in {len(stream)}\r\n{stream}\r\n"
                ask(f"CONNECT {{}}\r\nSUB in 1\r\n{create}", b"stream_create_response")
                request = masked(b"PUB s in 4\r\n\0\1\2\3\r\n")
                answers = Answers(b'"seq":')
                sent, rate = enough(seconds, lambda messages: pump(sock, request, messages, answers, 4000))
                latency = ping_pong(sock, request, answers)
                info = ask("PUB $JS.API.STREAM.INFO.s in 0\r\n\r\n", b'"consumer_count"')
                match = re.search(rb'"messages":(\d+)', info)
                check(int(match[1]) if match else 0, sent + PINGS)
                return rate, latency


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

    database = sqlite3.connect("peer.db", isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE record(id INTEGER PRIMARY KEY, value INTEGER NOT NULL)")

    async def handle(client: ServerConnection) -> None:
        values: list[tuple[int]] = []
        stored = 0
        arrived = asyncio.Event()

        async def commit() -> None:
            nonlocal values, stored
            while True:
                await arrived.wait()
                arrived.clear()
                batch, values = values, []
                database.execute("BEGIN IMMEDIATE")
                database.executemany("INSERT INTO record(value) VALUES (?)", batch)
                database.execute("COMMIT")
                stored += len(batch)
                await client.send(struct.pack(">Q", stored))

        committer = asyncio.create_task(commit())
        async for message in client:
            assert isinstance(message, bytes)
            values.append(struct.unpack(">i", message))
            arrived.set()
        committer.cancel()

    async with serve(handle, "127.0.0.1", 0, compression=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await server.serve_forever()


PEERS = (ringoexp_large, ringoexp, ringoexp_alone, node, websockets_sqlite, redis, jetstream)


def main() -> None:
    parser = argparse.ArgumentParser(description="measures alternatives to Ringo Exp with the same work")
    parser.add_argument("--seconds", type=float, default=2, help="approximate duration of a run (default 2)")
    parser.add_argument("--modules", default="node_modules", help="node_modules directory with ws and better-sqlite3")
    parser.add_argument("--serve-websockets", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_websockets:
        asyncio.run(serve_websockets())
        return
    results: dict[str, list[tuple[float, float]]] = {}
    missing: dict[str, str] = {}
    for turn in range(ROUNDS):
        for peer in PEERS:
            name = re.sub(r"\s+", " ", peer.__doc__ or "").rstrip(".")
            if name in missing:
                continue
            try:
                result = peer(arguments.seconds, str(Path(arguments.modules).resolve()))
            except Missing as reason:
                missing[name] = str(reason)
                continue
            say(f"round {turn + 1}: {name}: {result[0]:,.0f}/s, {result[1]:.2f} ms")
            results.setdefault(name, []).append(result)
    width = max(map(len, [*results, *missing]))
    for name, figures in results.items():
        rate, latency = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{name:{width}}  {rate:>11,.0f} messages/s   ack p50 {latency:.2f} ms")
    for name, reason in missing.items():
        print(f"{name:{width}}  not installed: {reason}")


if __name__ == "__main__":
    main()
