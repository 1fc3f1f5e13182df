"""Hostile clients are disconnected and leave nothing behind. Good clients are served at the same time."""

import asyncio
import os
import random
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from support.gauges import RETURNING, Usage, back_to, complaints, settled, usage
from support.harness import (
    ROLES,
    UPGRADE,
    Blocked,
    RawClient,
    ServerProcess,
    eventually,
    frame,
    free_port,
    request,
    rows,
    seeded,
    server,
)

from ringolib.client.producer import Producer
from ringolib.net.frames import MAX_MESSAGE

REQUEST = "web.handler.REQUEST_TIMEOUT_SECONDS"
CLOSE = "web.session.CLOSE_TIMEOUT_SECONDS"
PING_AFTER = "web.session.PING_AFTER_SECONDS"
PING = "web.session.PING_TIMEOUT_SECONDS"
STALL = "web.session.STALL_TIMEOUT_SECONDS"
MESSAGE = "web.session.MESSAGE_TIMEOUT_SECONDS"
SHORT = {REQUEST: 0.4, CLOSE: 0.4, PING_AFTER: 0.3, PING: 0.3, STALL: 0.4, MESSAGE: 0.5}
"""The server's timeouts, shortened."""
GRACE_SECONDS = 10.0
"""On a busy machine: the time for an ack to a good client, and the time a hostile one may exceed its timeouts."""
MAX_GROWTH = 6_000_000
"""Bytes by which the mean memory may grow over a long run: the cache of sources."""
SMALL_BUFFERS = (
    "wsserver.Server.finish_request = lambda self, sock, address:"
    f" (sock.setsockopt({socket.SOL_SOCKET}, {socket.SO_SNDBUF}, 4096), self.RequestHandlerClass(sock, address, self))"
)
"""With small buffers, a client blocks the server's sends before it has left megabytes unread."""


def patched(timeouts: dict[str, float]) -> str:
    """Return the patch for a server with these timeouts, and with short intervals for its workers."""
    more = {
        "forward.workers.IDLE_SECONDS": 0.3,
        "timing.BACKOFF_MAX_SECONDS": 0.2,
        "storage.sqlite_file.CACHE_KIB": 1024,  # full from the start: while it fills, the memory grows
    }
    return "; ".join([*(f"{name} = {seconds}" for name, seconds in {**timeouts, **more}.items()), SMALL_BUFFERS])


# The behaviour of hostile clients: generators, whose steps are about 20 ms apart.

Steps = Iterator[None]


def push(sock: socket.socket, data: bytes) -> None:
    """Send as much as the socket's buffer takes. Raises OSError if the connection is lost."""
    try:
        sock.send(data)
    except BlockingIOError:
        pass


def says_nothing(sock: socket.socket) -> Steps:
    while True:
        yield


def never_finishes_the_handshake(sock: socket.socket) -> Steps:
    push(sock, UPGRADE[:-2])
    yield from says_nothing(sock)


def dribbles_its_request_line(sock: socket.socket) -> Steps:
    push(sock, b"GET /")
    while True:
        push(sock, b"x")
        yield


def dribbles_its_headers(sock: socket.socket) -> Steps:
    push(sock, UPGRADE[:-2])
    while True:
        push(sock, b"X: y\r\n")
        yield


def dribbles_its_body(sock: socket.socket) -> Steps:
    push(sock, b"POST /v1.0/ingest HTTP/1.1\r\nContent-Length: 800\r\n\r\n")
    while True:
        push(sock, b"x")
        yield


def claims_too_large_a_body(sock: socket.socket) -> Steps:
    push(sock, b"POST /v1.0/ingest HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_MESSAGE + 8))
    while True:
        push(sock, bytes(1000))
        yield


def reads_no_answers(sock: socket.socket) -> Steps:
    while True:
        push(sock, b"GET /v1.0/stats HTTP/1.1\r\n\r\n" * 50)
        yield


def sends_half_a_frame(sock: socket.socket) -> Steps:
    push(sock, UPGRADE + frame(2, bytes(800))[:300])
    yield from says_nothing(sock)


def answers_no_pings(sock: socket.socket) -> Steps:
    push(sock, UPGRADE + frame(2, bytes(4)))
    yield from says_nothing(sock)


def dribbles_a_message(sock: socket.socket) -> Steps:
    push(sock, UPGRADE + frame(2, bytes(4)) + struct.pack(">BBQ", 0x82, 255, MAX_MESSAGE) + bytes(4))
    while True:
        push(sock, b"x")
        yield


def dribbles_fragments_and_pongs(sock: socket.socket) -> Steps:
    push(sock, UPGRADE + frame(2, b"", fin=False))
    while True:
        push(sock, frame(0, b"x", fin=False) + frame(10, b""))
        yield


def reads_no_acks(sock: socket.socket) -> Steps:
    """The pongs fill the buffers that the acks need; they are half of the unsent bytes that the server keeps."""
    push(sock, UPGRADE + frame(9, bytes(125)) * 250)
    while True:
        push(sock, frame(2, bytes(4)))
        yield


def sends_a_text(sock: socket.socket) -> Steps:
    push(sock, UPGRADE + frame(2, bytes(4)) + frame(1, b"hello"))
    yield from says_nothing(sock)


def claims_too_large_a_message(sock: socket.socket) -> Steps:
    push(sock, UPGRADE + struct.pack(">BBQ", 0x82, 255, MAX_MESSAGE + 1) + bytes(4))
    while True:
        push(sock, bytes(1000))
        yield


def says_goodbye_and_stays(sock: socket.socket) -> Steps:
    push(sock, UPGRADE + frame(2, bytes(4)) + frame(8, struct.pack(">H", 1000)))
    while True:
        push(sock, b"x")
        yield


def ends_its_side(sock: socket.socket) -> Steps:
    push(sock, UPGRADE + frame(2, bytes(4)))
    sock.shutdown(socket.SHUT_WR)
    yield from says_nothing(sock)


def ends_its_side_within_a_request(sock: socket.socket) -> Steps:
    push(sock, UPGRADE[:40])
    sock.shutdown(socket.SHUT_WR)
    yield from says_nothing(sock)


def resets(sock: socket.socket) -> Steps:
    push(sock, UPGRADE + frame(2, bytes(4)))
    yield
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def resets_at_once(sock: socket.socket) -> Steps:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    yield


KINDS: dict[Callable[[socket.socket], Steps], tuple[str, ...]] = {
    says_nothing: (REQUEST,),
    never_finishes_the_handshake: (REQUEST,),
    dribbles_its_request_line: (REQUEST,),
    dribbles_its_headers: (REQUEST,),
    dribbles_its_body: (REQUEST, CLOSE),
    claims_too_large_a_body: (CLOSE,),
    reads_no_answers: (REQUEST,),
    sends_half_a_frame: (PING_AFTER, PING, CLOSE),
    answers_no_pings: (PING_AFTER, PING, CLOSE),
    dribbles_a_message: (MESSAGE, CLOSE),
    dribbles_fragments_and_pongs: (MESSAGE, CLOSE),
    reads_no_acks: (STALL, CLOSE),
    sends_a_text: (CLOSE,),
    claims_too_large_a_message: (MESSAGE, CLOSE),
    says_goodbye_and_stays: (CLOSE,),
    ends_its_side: (),
    ends_its_side_within_a_request: (),
    resets: (),
    resets_at_once: (),
}
"""Each kind of client, and the timeouts that end it, one after the other. Without a timeout it ends by itself."""


def lifetime(kind: Callable[[socket.socket], Steps], timeouts: dict[str, float]) -> float:
    """Return the seconds after which the server must have disconnected a hostile client of this kind."""
    return sum(timeouts[name] for name in KINDS[kind])


class Hostile:
    """One hostile client. Call `step` repeatedly; it returns False once the client knows that its connection has ended.

    A client that reads nothing may learn it late: if its buffers are full, even a reset is lost until its kernel sends
    again. `held` shows the server's side.
    """

    def __init__(self, port: int, kind: Callable[[socket.socket], Steps]) -> None:
        self.kind = kind
        self.started = time.monotonic()
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.port = int(self.sock.getsockname()[1])
        self._steps = kind(self.sock)

    def step(self) -> bool:
        try:
            next(self._steps)
            poll = select.poll()
            poll.register(self.sock, select.POLLRDHUP)
            return not poll.poll(0)
        except (StopIteration, OSError, ValueError):  # closed by the client or by the server
            return False

    def close(self) -> None:
        self.sock.close()


def held(port: int) -> set[int]:
    """Return the ports of clients whose connection is still open in the server that listens on `port`."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {int(line[2][-4:], 16) for line in lines if int(line[1][-4:], 16) == port and line[9] != "0"}  # the inode


class Neighbour:
    """A good client in its own thread. It sends a record every few milliseconds and waits for its ack."""

    def __init__(self, port: int) -> None:
        self.sent = 0
        self.slowest = 0.0
        self._client = RawClient(port)
        self._client.sock.settimeout(GRACE_SECONDS)
        self._stop = threading.Event()
        self._thread = Blocked(self._run)

    def __enter__(self) -> "Neighbour":
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop.set()
        with self._client:
            self._thread.result()

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            started = time.monotonic()
            self._client.send(frame(2, bytes(4)))
            self.sent += 1
            while read_ack_or_ping(self._client) < self.sent:
                pass
            self.slowest = max(self.slowest, time.monotonic() - started)


def read_ack_or_ping(client: RawClient) -> int:
    """Read a frame, and answer it if it is a ping. Return the count of an ack, and -1 for a ping."""
    received = client.read()
    assert received, "a good client was disconnected"
    opcode, payload = received
    assert opcode in (2, 9), received
    if opcode == 9:
        client.send(frame(10, payload))
        return -1
    return int(struct.unpack(">Q", payload)[0])


def gets_in(port: int) -> bool:
    """True if a good client is admitted and its record is acked."""
    with RawClient(port) as client:
        if client.status == 503:
            return False
        client.send(frame(2, bytes(4)))
        while (acked := read_ack_or_ping(client)) < 0:
            pass
        return acked == 1


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server for three clients, with short timeouts."""
    directory = tmp_path_factory.mktemp("impatient")
    with server(directory, *ROLES["publisher"], "-n", "3", patch=patched(SHORT)) as process:
        assert gets_in(process.port)
        yield process


SIMILAR_TO_ANOTHER = (never_finishes_the_handshake, dribbles_its_headers, claims_too_large_a_message)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.__name__, marks=[pytest.mark.long] if kind in SIMILAR_TO_ANOTHER else [])
        for kind in KINDS
    ],
)
def test_hostile_client_is_disconnected_in_time(
    impatient: ServerProcess, kind: Callable[[socket.socket], Steps]
) -> None:
    base = settled(impatient)
    with ExitStack() as stack, Neighbour(impatient.port) as neighbour:
        hostile = [stack.enter_context(closing(Hostile(impatient.port, kind))) for _ in range(2)]
        for client in hostile:
            client.step()
        if KINDS[kind]:
            assert not gets_in(impatient.port), "the hostile clients use both other connections"

        def free() -> bool:
            for client in hostile:
                client.step()
            return neighbour.sent > 0 and gets_in(impatient.port)

        eventually(free, "a good client gets in", lifetime(kind, SHORT) + GRACE_SECONDS)
        # Most hostile clients have not closed their sockets: the server has. The neighbour is still connected.
        eventually(lambda: impatient.stats()["connections"] <= 2, "only the neighbour and this request are left")
        eventually(lambda: usage(impatient).descriptors <= base.descriptors + 1)
        still_open = [client for client in hostile if client.step() and client.port in held(impatient.port)]
        assert not still_open, "both hostile clients are disconnected"
    assert neighbour.slowest < 5
    back_to(impatient, base)
    assert not complaints(impatient), complaints(impatient)


@pytest.mark.slow
def test_good_clients_do_not_wait_for_hostile_ones(tmp_path: Path) -> None:
    """All kinds of hostile clients are connected, and the server has its normal timeouts."""
    with server(tmp_path, *ROLES["publisher"], patch=SMALL_BUFFERS) as running, ExitStack() as stack:
        hostile = [stack.enter_context(closing(Hostile(running.port, kind))) for kind in KINDS for _ in range(3)]
        with Neighbour(running.port) as neighbour:

            def served() -> bool:
                for client in hostile:
                    client.step()
                assert running.get("/v1.0/alive")[0] == 200
                return neighbour.sent >= 100

            started = time.monotonic()
            eventually(served)
            assert running.stats()["connections"] > 20, "the hostile clients are still connected"
        assert neighbour.slowest < 5 and time.monotonic() - started < 20


def test_idle_client_that_answers_pings_stays_connected(impatient: ServerProcess) -> None:
    connect = pytest.importorskip("websockets.sync.client").connect
    with connect(impatient.url) as idle, Producer(impatient.url) as producer, RawClient(impatient.port) as counting:
        producer.send([1, 2, 3])
        producer.flush(GRACE_SECONDS)
        counting.sock.settimeout(GRACE_SECONDS)
        for _ in range(5):
            assert read_ack_or_ping(counting) == -1
        idle.send(bytes(8))
        assert idle.recv(timeout=GRACE_SECONDS) == struct.pack(">Q", 1)
        producer.send([4])
        producer.flush(GRACE_SECONDS)
        assert producer.reconnects == 0


@pytest.mark.parametrize("pongs", [False, True], ids=["silent", "half a message"])
@pytest.mark.parametrize("ack", ["stored", "ring"])
def test_stalled_client_is_cut_off_while_its_record_waits(tmp_path: Path, ack: str, pongs: bool) -> None:
    """A record that waits for the consumer does not suspend the timeouts of its client, and is stored later."""
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", str(port), "-A", ack, patch=patched(SHORT)) as running:
        with RawClient(running.port) as client:
            client.send(frame(2, struct.pack(">i", 42)) + (frame(2, bytes(8), fin=False) if pongs else b""))
            client.sock.settimeout(GRACE_SECONDS)
            acks, pings = 0, 0
            while received := client.read():
                opcode, payload = received
                assert opcode in (2, 9), "cut off without a Close frame"
                acks += opcode == 2
                pings += opcode == 9
                if opcode == 9 and pongs:
                    client.send(frame(10, payload))
            assert (acks, pings > 0) == (ack == "ring", True)
            assert running.stats()["ringDepth"] == 1, "its record waits on"
        with server(tmp_path, "-I", "false", "-p", str(port), "-D", "c.db"):
            eventually(lambda: [value for _, _, value in rows(tmp_path / "c.db")] == [42])
            eventually(lambda: running.stats()["ringDepth"] == 0)


@pytest.mark.slow
def test_client_waiting_for_the_consumer_stays_connected(tmp_path: Path) -> None:
    """A client whose pongs follow messages without room in the ring stays too: the server does not read its pongs."""
    port = free_port()
    flags = ["-p", "0", "-T", str(port), "-r", "16"]
    with server(tmp_path, *flags, patch=patched(SHORT)) as running, ExitStack() as stack:
        counting, waiting, stuffed = (stack.enter_context(RawClient(running.port)) for _ in range(3))
        waiting.send(frame(2, bytes(4)))
        eventually(lambda: running.stats()["ringDepth"] == 1)
        stuffed.send(b"".join(frame(2, struct.pack(">i", n)) for n in range(1000)) + frame(9, b"behind"))
        eventually(lambda: running.stats()["ringDepth"] == 16)

        def acked(client: RawClient, count: int) -> None:
            while True:
                received = client.read()
                assert received, "a client was disconnected because the consumer was unreachable"
                opcode, payload = received
                if opcode == 9:
                    client.send(frame(10, payload))
                elif opcode == 2 and payload == struct.pack(">Q", count):
                    return
                assert opcode in (2, 9, 10), received

        calls = [Blocked(lambda: acked(waiting, 1)), Blocked(lambda: acked(stuffed, 1000))]
        counting.sock.settimeout(GRACE_SECONDS)
        for _ in range(4):
            assert read_ack_or_ping(counting) == -1
        assert all(call.still(0) for call in calls)
        with server(tmp_path, "-I", "false", "-p", str(port), "-D", "c.db"):
            for call in calls:
                call.result()
    assert sorted(value for _, _, value in rows(tmp_path / "c.db")) == sorted([0, *range(1000)])


# Many clients at once.


class Crowd:
    """Good and hostile clients of one server, all in one event loop. Call `run` once."""

    def __init__(
        self, running: ServerProcess, good: int, hostile: int, timeouts: dict[str, float], rng: random.Random
    ) -> None:
        self.running = running
        self.hostile = hostile
        self.timeouts = timeouts
        self.rng = rng
        self.acked = dict.fromkeys(range(1, good + 1), 0)  # records of each good client
        self.waits: list[float] = []  # for each ack
        self.pings = self.alive = 0
        self.lag = 0.0  # the largest delay of the event loop, and so of a pong
        self.ended: Counter[str] = Counter()  # hostile clients that were disconnected, by kind
        self.samples: list[Usage] = []
        self.stopped = False

    async def run(self, seconds: float) -> None:
        """Return `seconds` after all clients have connected. Raise the first error of a client."""
        tasks = [asyncio.create_task(self._misbehave())]
        gate = asyncio.Semaphore(50)  # more connects at once would overflow the backlog and be retried by the kernel
        tasks += [asyncio.create_task(self._behave(number, gate)) for number in self.acked]
        tasks += [asyncio.create_task(self._ask()), asyncio.create_task(self._watch(seconds))]
        try:
            for task in asyncio.as_completed(tasks, timeout=seconds + 10 * GRACE_SECONDS):
                await task
        finally:
            self.stopped = True  # `wait_for` ignores a cancellation if its result has just arrived
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _behave(self, number: int, gate: asyncio.Semaphore) -> None:
        """Send a few records at random intervals. A value contains the numbers of the client and of the record."""
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.running.port)
            writer.write(UPGRADE)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), GRACE_SECONDS)
            assert b" 101 " in head
        try:
            await self._converse(number, reader, writer)
        except (OSError, EOFError) as error:
            raise AssertionError(f"good client {number} was disconnected: {error!r}; lag {self.lag:.1f} s") from error
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    async def _converse(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not self.stopped:
            sent = self.acked[number]
            for _ in range(self.rng.randrange(1, 6)):
                writer.write(frame(2, struct.pack(">q", number << 32 | sent)))
                sent += 1
            started = time.monotonic()
            while self.acked[number] < sent:
                left = started + GRACE_SECONDS - time.monotonic()
                assert left > 0, "no ack in time"
                self.acked[number] = max(self.acked[number], await self._read(reader, writer, left))
            self.waits.append(time.monotonic() - started)
            # Read while waiting, because pings may come.
            until = time.monotonic() + self.rng.choice([0.5, 1, 2, 4, 8]) * self.rng.uniform(0.5, 1.5)
            while (left := until - time.monotonic()) > 0 and not self.stopped:
                await self._read(reader, writer, min(left, 1))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> int:
        """Read a frame, if one arrives in time. Return the count of an ack, else 0."""
        try:
            head = await asyncio.wait_for(reader.readexactly(2), seconds)
        except asyncio.TimeoutError:
            return 0
        payload = await asyncio.wait_for(reader.readexactly(head[1]), GRACE_SECONDS)
        if head[0] == 0x89:
            self.pings += 1
            writer.write(frame(10, payload))
            return 0
        assert head[0] == 0x82, (head, payload)
        return int(struct.unpack(">Q", payload)[0])

    async def _misbehave(self) -> None:
        """Keep the number of hostile clients constant. Fail if the server disconnects one of them too late."""
        kinds = list(KINDS)
        turn = 0
        present: list[Hostile] = []
        try:
            while not self.stopped:
                for _ in range(min(10, self.hostile - len(present))):
                    present.append(Hostile(self.running.port, kinds[turn % len(kinds)]))
                    turn += 1
                still: set[int] | None = None  # looked up once, if a client is late
                for client in list(present):
                    late = time.monotonic() - client.started - lifetime(client.kind, self.timeouts)
                    ended = not client.step()
                    if late > 1 and not ended:
                        still = held(self.running.port) if still is None else still
                        ended = client.port not in still
                    assert ended or late < GRACE_SECONDS, f"a client that {client.kind.__name__} was not disconnected"
                    if ended:
                        client.close()
                        present.remove(client)
                        self.ended[client.kind.__name__] += 1
                await asyncio.sleep(0.02)
        finally:
            for client in present:
                client.close()

    async def _ask(self) -> None:
        while not self.stopped:
            started = time.monotonic()
            status, _, _ = await asyncio.to_thread(request, self.running.port, "GET", "/v1.0/alive")
            assert status == 200 and time.monotonic() - started < GRACE_SECONDS
            self.alive += 1
            await asyncio.sleep(0.2)

    async def _watch(self, seconds: float) -> None:
        """Sample the server's resources once all clients have connected, and end the run after `seconds`."""
        started = time.monotonic()
        while not (all(self.acked.values()) and self.ended.keys() == {kind.__name__ for kind in KINDS}):
            assert time.monotonic() < started + 5 * GRACE_SECONDS, (
                f"some clients were not served, or not disconnected: {self.ended}"
            )
            await asyncio.sleep(0.1)
        started = time.monotonic()
        while time.monotonic() < started + seconds:
            assert self.running.process.poll() is None, "the server has ended"
            assert not complaints(self.running), complaints(self.running)
            self.samples.append(usage(self.running))
            asleep = time.monotonic()
            await asyncio.sleep(0.2)
            self.lag = max(self.lag, time.monotonic() - asleep - 0.2)
        self.stopped = True


def mean(samples: list[Usage]) -> Usage:
    count = len(samples)
    return Usage(*(sum(sample[field] for sample in samples) // count for field in range(3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("good", "hostile", "seconds", "stretch"),
    [(180, 20, 3.0, 2.0), pytest.param(900, 100, 600.0, 15.0, marks=pytest.mark.long)],
)
def test_good_clients_are_served_among_many_hostile_ones(
    tmp_path: Path, good: int, hostile: int, seconds: float, stretch: float
) -> None:
    """A tenth is hostile. The long form takes 10 minutes, or RINGOEXP_SECONDS. `stretch` multiplies the timeouts."""
    if seconds > 60:
        seconds = float(os.environ.get("RINGOEXP_SECONDS") or seconds)
    timeouts = {name: value * stretch for name, value in SHORT.items()}
    rng = random.Random(seeded())
    with server(tmp_path, *ROLES["publisher"], patch=patched(timeouts), env=RETURNING) as running:
        assert gets_in(running.port)
        base = settled(running)
        crowd = Crowd(running, good, hostile, timeouts, rng)
        asyncio.run(crowd.run(seconds))
        after = back_to(running, base)
        third = len(crowd.samples) // 3
        early, late = mean(crowd.samples[:third]), mean(crowd.samples[-third:])
        waits = sorted(crowd.waits)
        print(f"base {base}; early {early}; late {late}; after all {after}")
        print(f"{len(waits)} acks, the slowest after {waits[-1]:.2f} s, p99 {waits[len(waits) * 99 // 100]:.3f} s")
        print(f"{crowd.pings} pings answered, {crowd.alive} times alive, lag {crowd.lag:.2f} s; {dict(crowd.ended)}")
        assert crowd.pings and crowd.alive
        assert late.memory - early.memory < MAX_GROWTH
        assert late.threads - early.threads < hostile / 4 and late.descriptors - early.descriptors < hostile / 4
        assert running.stop() == 0
    stored: dict[int, list[int]] = {}
    for _, sequence, value in rows(tmp_path / "ringoexp.db"):
        if value:  # hostile clients send 0
            assert value & 0xFFFFFFFF == sequence
            stored.setdefault(value >> 32, []).append(sequence)
    for number, acked in crowd.acked.items():
        assert sorted(stored[number]) == list(range(acked)), f"the records of client {number}"
    assert not complaints(running), complaints(running)
