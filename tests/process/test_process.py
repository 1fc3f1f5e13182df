"""Whole processes: publishers and consumers with real sockets, real files and real kills.

Each test reads the database at its end: no acked record may be missing, and none may be stored twice.
"""

import os
import random
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import threading
import uuid
from array import array
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import pytest
from support.harness import Blocked, RawClient, ServerProcess, eventually, frame, free_port, rows, seeded, server

from ringolib.wire import SUBPROTOCOL, Run, encode_batch, encode_plain

needs_websockets = pytest.mark.usefixtures("websockets")
EXTREMES = [0, 1, -1, 2**31 - 1, -(2**31), 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)]


@pytest.fixture
def websockets() -> None:
    """Skip the test if the package is not installed."""
    pytest.importorskip("websockets")


def by_source(database: Path) -> dict[str, list[int]]:
    """Return the values of each source in sequence order; fails if a sequence is missing or stored twice.

    The ids may have another order: workers run in parallel, so a batch may be stored before an older one.
    """
    stored: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for source, sequence, value in rows(database):
        stored[source].append((sequence, value))
    for source, records in stored.items():
        records.sort()
        assert [sequence for sequence, _ in records] == list(range(len(records))), f"sequences of {source}"
    return {source: [value for _, value in records] for source, records in stored.items()}


def plain_frame(value: int) -> bytes:
    """Return the frame of one integer: 4 bytes if it fits, else 8."""
    if -(2**31) <= value < 2**31:
        return frame(2, struct.pack(">i", value))
    return frame(2, struct.pack(">q", value))


def send_raw(port: int, values: list[int]) -> None:
    """Stream `values`, one per message, and read acks until all are stored."""
    data = b"".join(map(plain_frame, values))
    with RawClient(port) as client:
        sender = Blocked(lambda: client.send(data))
        client.acked(len(values))
        sender.result()
        client.send(frame(8, struct.pack(">H", 1000)))
        assert client.closed()[0] == 1000


def send_websockets(port: int, values: list[int]) -> None:
    """Do the same with another implementation of WebSocket. Most messages have many integers."""
    connect = pytest.importorskip("websockets.sync.client").connect
    with connect(f"ws://localhost:{port}/v1.0/ingest", compression="deflate") as client:
        single = len(values) // 10
        for value in values[:single]:
            client.send(struct.pack(">q", value))
        for start in range(single, len(values), 999):
            client.send(encode_plain(values[start : start + 999]))
        acked = 0
        while acked < len(values):
            (acked,) = struct.unpack(">Q", client.recv(timeout=30))


@needs_websockets
def test_eight_connections_are_stored_once_and_in_order(tmp_path: Path) -> None:
    seed = seeded()
    rng = random.Random(seed)
    sent = []
    for number in range(8):
        wide = [rng.randrange(-(2**63), 2**63) for _ in range(5000)]
        narrow = [rng.randrange(-(2**31), 2**31) for _ in range(20_000 - len(EXTREMES))]
        sent.append(EXTREMES + wide + narrow)
        rng.shuffle(sent[number])
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db") as consumer:
        with server(tmp_path, "-p", "0", "-T", str(consumer.port)) as publisher:
            calls = [
                Blocked(lambda n=n: (send_websockets if n % 4 == 0 else send_raw)(publisher.port, sent[n]))
                for n in range(8)
            ]
            for call in calls:
                call.result(60)
            stats = publisher.stats()
            assert stats["recordsReceived"] == stats["recordsStored"] == 200_000
            assert stats["ringDepth"] == stats["ringInFlight"] == 0
            assert publisher.stop() == 0
            assert publisher.tally == "ringoexp: stopped, 200000 stored, 0 unstored"
        stats = consumer.stats()
        assert (stats["recordsStored"], stats["recordsDuplicate"]) == (200_000, 0)
        assert consumer.stop() == 0
    stored = by_source(tmp_path / "c.db")
    assert sorted(stored.values()) == sorted(sent)


def test_consumer_started_after_publisher_gets_everything(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", str(port), "-r", "64") as publisher:
        values = list(range(1000))
        call = Blocked(lambda: send_raw(publisher.port, values))
        eventually(lambda: publisher.stats()["ringDepth"] == 64, "the ring is full")
        assert call.still()
        with server(tmp_path, "-I=false", "-p", str(port), "-D", "c.db"):
            call.result()
            assert list(by_source(tmp_path / "c.db").values()) == [values]


def test_backpressure_blocks_the_client_and_keeps_memory_flat(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", str(port)) as publisher:
        total, sent = 3_000_000, 0
        # 10,000 integers in messages of 100. In all, they have more bytes than the buffers of the sockets.
        chunk = b"".join(frame(2, encode_plain(range(start, start + 100))) for start in range(0, 10_000, 100))

        def flood() -> None:
            nonlocal sent
            for _ in range(total // 10_000):
                client.send(chunk)
                sent += 10_000

        with RawClient(publisher.port) as client:
            sender = Blocked(flood)
            eventually(lambda: publisher.stats()["ringDepth"] == 4096, "the ring is full")
            # The client is blocked once the buffers of the sockets are full as well, and nothing moves.
            before = -1
            while before != sent:
                before = sent
                assert sender.still(1.0), "the server accepted 24 MB that it cannot store"
            full = publisher.resident()
            assert sender.still(2.0) and sent == before
            flat = publisher.resident()
            print(f"blocked after {sent} of {total} integers; resident {full / 1e6:.1f} then {flat / 1e6:.1f} MB")
            assert flat < 64e6 and flat - full < 2e6
            with server(tmp_path, "-I", "f", "-p", str(port), "-D", "c.db"):
                acks = Blocked(lambda: client.acked(total))
                sender.result(90)
                assert acks.result(90) == total
    with closing(sqlite3.connect(tmp_path / "c.db")) as reader:
        counts = reader.execute(
            "SELECT count(*), count(DISTINCT sequence), max(sequence), sum(value != sequence % 10000) FROM records"
        ).fetchone()
    assert counts == (total, total, total - 1, 0)


class ExactlyOnceClient(threading.Thread):
    """Streams batches of one source. After a lost connection it sends again from the last ack on."""

    def __init__(self, port: int, count: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.source = uuid.UUID(int=random.Random(seed).getrandbits(128))
        self.values = array("q", range(seed, seed + count))
        self.port = port
        self.acked = 0
        self.connections = 0
        self._rng = random.Random(seed)

    def run(self) -> None:
        from websockets.exceptions import ConnectionClosed, InvalidHandshake

        while self.acked < len(self.values):
            try:
                self._stream()
            except (OSError, ConnectionClosed, InvalidHandshake):  # InvalidHandshake: the server was killed, or stops
                threading.Event().wait(0.05)

    def _stream(self) -> None:
        from websockets.sync.client import connect

        base = sent = self.acked
        with connect(f"ws://localhost:{self.port}/v1.0/ingest", subprotocols=[SUBPROTOCOL], close_timeout=1) as client:  # type: ignore[list-item]
            self.connections += 1
            while self.acked < len(self.values):
                while sent < len(self.values) and sent - self.acked < 2000:
                    size = min(self._rng.randrange(1, 300), len(self.values) - sent)
                    run = Run(self.source.bytes, sent, size)
                    client.send(encode_batch([run], self.values[sent : sent + size]))
                    sent += size
                (count,) = struct.unpack(">Q", client.recv(timeout=20))
                self.acked = base + count


@needs_websockets
@pytest.mark.parametrize("victim", ["consumer", "publisher", "publisher, politely"])
def test_acked_records_survive_a_restart_without_duplicates(tmp_path: Path, victim: str) -> None:
    seed = seeded()
    rng = random.Random(seed)
    ports = {"consumer": free_port(), "publisher": free_port()}

    def start(role: str) -> ServerProcess:
        if role == "consumer":
            flags = ["-I", "false", "-p", str(ports[role]), "-D", "c.db"]
        else:
            flags = ["-p", str(ports[role]), "-T", str(ports["consumer"]), "-r", "1000"]
        return ServerProcess(tmp_path, *flags)

    running = {role: start(role) for role in ports}
    clients = [ExactlyOnceClient(ports["publisher"], 60_000, n) for n in range(3)]
    try:
        for client in clients:
            client.start()
        for turn in range(1, 4):
            eventually(lambda turn=turn: clients[0].acked > turn * 12_000, "acks")
            threading.Event().wait(rng.random() * 0.05)  # a random moment, not a synchronisation
            role = victim.split(",")[0]
            if "politely" in victim:
                assert running[role].stop() in (0, 3)
            else:
                running[role].kill()
            acked = {str(client.source): client.acked for client in clients}
            if role == "consumer":
                # After the acked records there may be gaps: workers may store a batch before an older one.
                stored = {(source, sequence) for source, sequence, _ in rows(tmp_path / "c.db")}
                for source, count in acked.items():
                    assert stored >= {(source, sequence) for sequence in range(count)}, "an acked record is missing"
            running[role] = start(role)
        for client in clients:
            client.join(60)
            assert not client.is_alive(), "not all records are acked"
    finally:
        for process in running.values():
            process.kill()
    assert by_source(tmp_path / "c.db") == {str(client.source): list(client.values) for client in clients}
    if victim != "consumer":
        assert all(client.connections > 1 for client in clients)


@pytest.mark.slow
def test_consumer_with_fewer_connections_than_workers_gets_everything(tmp_path: Path) -> None:
    """The consumer refuses workers beyond its limit; workers with a link go on."""
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db", "-n", "2") as consumer:
        with server(tmp_path, "-p", "0", "-T", str(consumer.port), "-r", "64") as publisher:
            values = list(range(10_000))
            for call in [Blocked(lambda: send_raw(publisher.port, values)) for _ in range(8)]:
                call.result(60)
            assert publisher.stop() == 0
    assert [*by_source(tmp_path / "c.db").values()] == [values] * 8


@pytest.mark.slow
def test_lost_clients_release_everything_while_the_ring_is_full(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", str(port), "-r", "16", "-n", "3") as publisher:
        for _ in range(2):
            with RawClient(publisher.port) as client:
                client.send(plain_frame(5) * 100)
                eventually(lambda: publisher.stats()["ringDepth"] == 16)
        eventually(lambda: publisher.stats()["connections"] <= 1, "their connections have ended")
        stats = publisher.stats()
        # There is no room, so the server does not read from the second client: its records are not received or refused.
        assert stats["recordsReceived"] == 100 and stats["recordsRefused"] == 100 - 16
        with server(tmp_path, "-I", "false", "-p", str(port), "-D", "c.db"):
            eventually(lambda: publisher.stats()["recordsStored"] == 16)


def test_stop_waits_for_a_client_that_closes_late(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as publisher:
        with RawClient(publisher.port) as client:
            publisher.send_signal(signal.SIGTERM)
            assert client.closed()[0] == 1001
            ended = Blocked(publisher.wait)
            for late in (frame(2, bytes(4)), frame(8, struct.pack(">H", 1001))):
                assert ended.still(0.1)
                client.send(late)  # a reset could destroy bytes that the server has sent
            assert client.sock.recv(1) == b""
        assert ended.result() == 0


def test_stop_during_the_upgrade_closes_the_websocket_with_1001(tmp_path: Path) -> None:
    """The client has its answer, and its socket is not with the ingest loop yet."""
    patch = (
        "web.table.ConnectionTable.detach = (lambda real: lambda self:"
        " (time.sleep(1), real(self))[1])(web.table.ConnectionTable.detach)"
    )
    with server(tmp_path, "-p", "0", "-T", "0", patch=patch) as publisher:
        with RawClient(publisher.port) as client:
            publisher.send_signal(signal.SIGTERM)
            assert client.closed()[:2] == (1001, "the server is stopping")
            client.send(frame(8, struct.pack(">H", 1001)))
        assert publisher.wait() == 0


@needs_websockets
def test_chained_publishers_keep_sources_and_sequences(tmp_path: Path) -> None:
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db") as consumer:
        with server(tmp_path, "-p", "0", "-T", str(consumer.port), "-r", "100") as region:
            with server(tmp_path, "-p", "0", "-T", str(region.port), "-r", "37") as edge:
                client = ExactlyOnceClient(edge.port, 20_000, 7)
                client.start()
                client.join(30)
                assert client.acked == 20_000
                assert edge.stop() == region.stop() == consumer.stop() == 0
    assert by_source(tmp_path / "c.db") == {str(client.source): list(client.values)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_sends_the_last_ack_and_closes_with_1001(tmp_path: Path, number: int) -> None:
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db") as consumer:
        with server(tmp_path, "-p", "0", "-T", str(consumer.port)) as publisher:
            with RawClient(publisher.port) as idle, RawClient(publisher.port) as busy:
                stop = threading.Event()
                sent = 0

                def stream() -> None:
                    nonlocal sent
                    while not stop.is_set():
                        try:
                            busy.send(b"".join(plain_frame(sent + n) for n in range(100)))
                        except OSError:
                            return
                        sent += 100

                sender = Blocked(stream)
                eventually(lambda: publisher.stats()["recordsStored"] > 1000)
                publisher.send_signal(number)
                code, reason, acked = busy.closed()
                stop.set()
                sender.result()
                assert (code, reason) == (1001, "the server is stopping")
                assert idle.closed() == (1001, "the server is stopping", 0)
                assert publisher.wait() == 0
                assert publisher.tally == f"ringoexp: stopped, {acked} stored, 0 unstored"
                assert list(by_source(tmp_path / "c.db").values()) == [list(range(acked))]


def test_ack_ring_acks_while_the_consumer_is_unreachable(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", str(port), "-A", "ring") as publisher:
        with RawClient(publisher.port) as client:
            client.send(b"".join(map(plain_frame, range(100))))
            assert client.acked(100) == 100
            assert publisher.stats()["recordsStored"] == 0
        with server(tmp_path, "-I", "false", "-p", str(port), "-D", "c.db"):
            eventually(lambda: publisher.stats()["recordsStored"] == 100)
            assert list(by_source(tmp_path / "c.db").values()) == [list(range(100))]


@pytest.mark.slow
def test_only_one_worker_probes_an_unreachable_consumer(tmp_path: Path) -> None:
    """A port accepts and closes. The backlog is enough for many workers, but only one connects at a time."""
    with socket.create_server(("127.0.0.1", 0)) as fake:
        fake.settimeout(30)
        with server(tmp_path, "-p", "0", "-T", str(fake.getsockname()[1]), "-r", "1000") as publisher:
            with RawClient(publisher.port) as client:
                client.send(b"".join(map(plain_frame, range(2000))))
                eventually(lambda: publisher.stats()["ringDepth"] == 1000)
                for _ in range(4):  # some of these began before the first one failed
                    early, _ = fake.accept()
                    early.close()
                for _ in range(4):
                    probe, _ = fake.accept()
                    with probe:
                        fake.settimeout(0.3)
                        with pytest.raises(TimeoutError):
                            fake.accept()
                        fake.settimeout(30)
                assert publisher.stats()["mostWorkers"] <= 3


NODE_CLIENT = """
const WebSocket = require('ws');
const ws = new WebSocket(process.argv[2]);
const total = 5000;
ws.on('open', () => {
  for (let i = 0; i < total; i++) { const b = Buffer.alloc(4); b.writeInt32BE(i - 2500); ws.send(b); }
});
ws.on('message', (data) => { if (Number(data.readBigUInt64BE()) === total) ws.close(1000); });
ws.on('close', (code) => { console.log(code); process.exit(code === 1000 ? 0 : 1); });
"""


def test_node_ws_client_works(tmp_path: Path) -> None:
    modules = os.environ.get("RINGOEXP_NODE_MODULES")
    if not (modules and shutil.which("node")):
        pytest.skip("needs node and RINGOEXP_NODE_MODULES, a node_modules directory with ws")
    with server(tmp_path, "-p", "0", "-T", "0") as publisher:
        done = subprocess.run(
            ["node", "-e", NODE_CLIENT, "x", publisher.url],
            env={**os.environ, "NODE_PATH": modules},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout.strip()) == (0, "1000"), done.stderr
    assert list(by_source(tmp_path / "ringoexp.db").values()) == [list(range(-2500, 2500))]


def test_stopped_server_leaves_only_its_database(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as publisher:
        send_raw(publisher.port, EXTREMES)
        assert publisher.stop() == 0
    files = {path.name for path in tmp_path.iterdir() if not path.name.startswith("stderr")}
    assert files == {"ringoexp.db", "ringoexp.db-lock"}
