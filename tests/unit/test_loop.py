"""The ingest loop on real sockets: late, cut, half-closed and reset. The test is the worker of the ring."""

import errno
import socket
import struct
import threading
import time
import tracemalloc
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.harness import DEADLINE, Blocked, RawClient, ServerProcess, eventually, frame, rows

from ringbuffer import Batch, Ring
from ringolib.counters import Totals
from ringolib.net import protocol
from ringolib.net.tls_socket import TLSSocket
from ringolib.storage.interface import StoreError
from ringolib.timing import EXIT_FATAL
from ringolib.web import client as client_module
from ringolib.web import deadlines
from ringolib.web import loop as module
from ringolib.web.intake import Intake, RingIntake, StoreIntake
from ringolib.web.loop import IngestLoop
from ringolib.web.session import GOING_AWAY, PING_AFTER_SECONDS, PING_TIMEOUT_SECONDS, UNSTORED, Session
from ringolib.wire import Block, Run, encode_batch

CLOSE = frame(8, struct.pack(">H", 1000))


def plain(*values: int) -> bytes:
    return b"".join(frame(2, struct.pack(">i", value)) for value in values)


def ack(count: int) -> bytes:
    return b"\x82\x08" + struct.pack(">Q", count)


class World:
    """A loop over a ring, and what became of its clients."""

    def __init__(self, ring: Ring, ack_in_ring: bool = False, intake: Intake | None = None) -> None:
        self.ring = ring
        self.totals = Totals()
        self.ended: list[Session] = []
        self.loop = IngestLoop(intake or RingIntake(ring, ack_in_ring), self.totals)
        self._sockets: list[socket.socket] = []

    def connect(self, rest: bytes = b"", session: Session | None = None, batches: bool = False) -> socket.socket:
        """A client of the loop; `rest` came behind its handshake."""
        ours, theirs = socket.socketpair()
        theirs.settimeout(DEADLINE)
        self.loop.add(
            ours, session or Session(batches, 0.0 if session else module.monotonic()), rest, self.ended.append
        )
        self._sockets.append(theirs)
        return theirs

    def store(self, limit: int = 1 << 20) -> Batch:
        """Be the worker: take a batch and commit it."""
        batch = self.ring.reserve(limit, DEADLINE)
        self.ring.commit(batch)
        return batch

    def close(self) -> None:
        self.loop.abort()
        assert self.loop.join(DEADLINE)
        for sock in self._sockets:
            sock.close()


@contextmanager
def running(capacity: int = 300_000) -> Iterator[World]:
    world = World(Ring(capacity))
    try:
        yield world
    finally:
        world.close()


@pytest.fixture
def world() -> Iterator[World]:
    with running() as made:
        yield made


@contextmanager
def repeated(action: Callable[[], object]) -> Iterator[None]:
    """Repeat an action in a thread until the end of the block. It may time out."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                action()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(DEADLINE)


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, f"closed after {data!r}"
        data += piece
    return data


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def test_record_is_acked_once_it_is_stored(world: World) -> None:
    client = world.connect()
    client.sendall(plain(5))
    batch = world.ring.reserve(10, DEADLINE)
    call = Blocked(lambda: read(client, 10))
    assert call.still()
    world.ring.commit(batch)
    assert call.result() == ack(1) and list(batch.values) == [5]


def test_record_in_the_ring_is_acked_at_once_with_ack_in_ring() -> None:
    world = World(Ring(10), ack_in_ring=True)
    client = world.connect()
    client.sendall(plain(5))
    assert Blocked(lambda: read(client, 10)).result(PING_AFTER_SECONDS / 2) == ack(1), (
        "before any deadline wakes the loop"
    )
    world.close()


def test_data_behind_the_handshake_is_not_lost(world: World) -> None:
    client = world.connect(rest=plain(1, 2))
    world.store()
    assert read(client, 10) == ack(2)


def test_frames_that_come_byte_by_byte_are_joined(world: World) -> None:
    client = world.connect()
    for byte in plain(7) + frame(2, struct.pack(">qq", 8, 9)):
        client.sendall(bytes([byte]))
    eventually(lambda: world.ring.cursor == 3)
    assert list(world.store().values) == [7, 8, 9]
    assert read(client, 10) == ack(3)


def test_one_commit_acks_all_clients_and_wakes_the_loop_once(world: World) -> None:
    clients = [world.connect() for _ in range(50)]
    for number, client in enumerate(clients):
        client.sendall(plain(number))
    eventually(lambda: world.ring.cursor == 50)
    wakes: list[int] = []
    real = world.loop._wake_sender

    class Counting:
        def send(self, data: bytes) -> int:
            wakes.append(1)
            return real.send(data)

        def close(self) -> None:
            real.close()

    world.loop._wake_sender = Counting()  # type: ignore[assignment]
    world.store()
    assert all(read(client, 10) == ack(1) for client in clients)
    assert len(wakes) == 1
    eventually(lambda: world.totals.snapshot().acked == 50)  # counted after the acks of the turn


def test_full_ring_stops_reading_and_nothing_is_lost() -> None:
    with running(capacity=10) as world:
        clients = [world.connect() for _ in range(4)]
        for number, client in enumerate(clients):
            client.sendall(plain(*range(100 * number, 100 * number + 25)))
        seen = array("q")
        while len(seen) < 100:
            seen += world.store(3).values
        for client in clients:
            last = b""
            while last != ack(25):
                last = read(client, 10)
    for number in range(4):
        own = [value for value in seen if value // 100 == number]
        assert own == list(range(100 * number, 100 * number + 25)), "in order, each once"


def test_rest_of_a_large_block_waits_behind_the_blocks_of_others() -> None:
    with running(capacity=10) as world:
        large = world.connect()
        large.sendall(plain(*range(35)))
        eventually(lambda: bool(world.loop._backlog))
        small = world.connect(rest=plain(1000))
        eventually(lambda: len(world.loop._backlog) == 2)
        values = list(world.store(10).values)
        eventually(lambda: world.ring.cursor == 20)  # ten more of the large block, as it came first
        while len(values) < 36:
            values += world.store(10).values
        assert values == [*range(20), 1000, *range(20, 35)]
        assert read(small, 10) == ack(1)


def test_turn_reads_little_more_than_there_is_room_for() -> None:
    with running(capacity=512) as world:
        world.connect()
        noisy = world.connect()
        noisy.sendall(plain(*range(5000)))
        eventually(lambda: world.loop._paused_at is not None)
        assert world.totals.snapshot().received <= 1024


def test_no_client_starves_while_the_ring_is_full() -> None:
    with running(capacity=8) as world:
        flood = world.connect()
        flood.settimeout(0.05)

        def pour() -> None:
            flood.send(plain(*[1] * 1000))

        with repeated(pour), repeated(lambda: world.ring.commit(world.ring.reserve(4, 0.05))):
            client = world.connect()
            for number in range(1, 4):
                client.sendall(plain(2))
                assert read(client, 10) == ack(number)


@pytest.mark.parametrize("flood", [frame(9, b""), frame(2, bytes(4), fin=False) + frame(0, bytes(4)), plain(1)])
def test_flood_of_one_client_does_not_keep_others_waiting(world: World, flood: bytes) -> None:
    noisy = world.connect()
    noisy.settimeout(0.05)
    data = flood * 5000

    def pour() -> None:
        noisy.send(data)
        noisy.recv(1 << 20)

    with repeated(pour), repeated(lambda: world.ring.commit(world.ring.reserve(65_536, 0.05))):
        client = world.connect()
        for number in range(1, 20):
            client.sendall(plain(number))
            assert read(client, 10) == ack(number)


class NotEncrypted(TLSSocket):
    """A socket that the loop takes for a TLS socket: input may be here although the poller does not see it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._timeout = None
        self.reads = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        self.reads += 1
        return self._sock.recv(min(size, 100), flags)

    def send(self, data: bytes, flags: int = 0) -> int:
        return self._sock.send(data, flags)

    def shutdown(self, how: int) -> None:
        self._sock.shutdown(how)


def test_tls_client_is_read_once_or_twice_in_a_turn(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(DEADLINE)
    ours.setblocking(False)
    theirs.sendall(plain(1) * 1000)
    secured = NotEncrypted(ours)
    most = []
    real = world.loop._turn

    def turn() -> bool:
        before = secured.reads
        goes_on = real()
        most.append(secured.reads - before)
        return goes_on

    monkeypatch.setattr(world.loop, "_turn", turn)
    world.loop.add(secured, Session(False, module.monotonic()), plain(1), world.ended.append)
    eventually(lambda: world.ring.cursor == 1001)
    theirs.shutdown(socket.SHUT_WR)
    eventually(lambda: world.loop._clients and next(iter(world.loop._clients)).eof)
    world.store()
    assert read_all(theirs)[-10:] == ack(1001), "its end of the stream is not taken for a second one"
    assert max(most) <= 2
    theirs.close()


def test_tls_streams_do_not_starve_a_quiet_client(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_SIZE", 100)
    monkeypatch.setattr(module, "SHARED_READ_SIZE", 100)
    monkeypatch.setattr(module, "OFFER_RECORDS", 10)
    pairs = [socket.socketpair() for _ in range(3)]
    for ours, theirs in pairs:
        ours.setblocking(False)
        theirs.sendall(plain(1) * 5000)
    for ours, _ in pairs:
        world.loop.add(NotEncrypted(ours), Session(False, module.monotonic()), b"", world.ended.append)
    world.connect().sendall(plain(2))
    eventually(lambda: world.ring.cursor == 15_001)
    assert list(world.store().values).index(2) < 5000
    for _, theirs in pairs:
        theirs.close()


def test_unfinished_messages_share_a_budget(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One client at a time goes on, so that all are served."""
    budget = world.loop._budget
    budget.limit = 1_000_000
    count, message = 10, frame(2, bytes(1_000_000))
    may_finish = threading.Event()

    def send(client: socket.socket) -> None:
        client.sendall(message[:-1])
        assert may_finish.wait(DEADLINE)
        client.sendall(message[-1:])

    clients = [world.connect() for _ in range(count)]
    calls = [Blocked(lambda client=client: send(client)) for client in clients]  # type: ignore[misc]
    eventually(lambda: len(world.loop._suspended) >= count - 2)
    assert "waiting_for_room" in {record.msg for record in caplog.records}
    assert budget.held < 1_000_000 + (count + 1) * module.SHARED_READ_SIZE + len(message)
    quiet = world.connect()
    quiet.sendall(plain(1))
    eventually(lambda: world.ring.cursor == 1, "small messages are not concerned")
    may_finish.set()
    while world.ring.committed < 1 + count * 125_000:
        world.store()
    for call in calls:
        call.result()
    eventually(lambda: not (budget.held or world.loop._holders or world.loop._suspended))


def test_suspended_client_is_not_given_up_for_silence(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be heard while it is not read."""
    world.loop._budget.limit = 100_000
    monkeypatch.setattr(module, "GONE_CHECK_SECONDS", 0.05)
    monkeypatch.setattr("ringolib.web.session.PING_AFTER_SECONDS", 0.2)
    monkeypatch.setattr("ringolib.web.session.PING_TIMEOUT_SECONDS", 0.2)
    message = frame(2, bytes(1_000_000))
    oldest, other = world.connect(), world.connect()
    oldest.sendall(message[:150_000])
    eventually(lambda: world.loop._budget.held >= 100_000)
    call = Blocked(lambda: other.sendall(message))
    eventually(lambda: world.loop._suspended)
    for at in range(150_000, 150_020):  # 20 times 0.05 s
        oldest.sendall(message[at : at + 1])
        assert call.still(0.05)
    assert len(world.loop._clients) == 2 and world.ring.cursor == 0
    oldest.sendall(message[150_020:])
    eventually(lambda: world.ring.cursor == 125_000 * 2)
    call.result()


def test_client_that_closes_in_order_gets_its_last_ack(world: World) -> None:
    client = world.connect()
    client.sendall(plain(1) + CLOSE)
    batch = world.ring.reserve(10, DEADLINE)
    call = Blocked(lambda: read_all(client))
    assert call.still()
    world.ring.commit(batch)
    assert call.result() == ack(1) + b"\x88\x02\x03\xe8"
    eventually(lambda: world.ended)
    assert world.ended[0].by_client


def test_client_that_closes_its_side_gets_the_acks_of_a_moment(world: World) -> None:
    client = world.connect()
    client.sendall(plain(1))
    batch = world.ring.reserve(10, DEADLINE)
    client.shutdown(socket.SHUT_WR)
    eventually(lambda: world.loop._clients and next(iter(world.loop._clients)).eof)
    world.ring.commit(batch)
    assert read_all(client) == ack(1)


def test_client_that_closed_in_order_may_end_its_side_before_the_ack(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringolib.web.session.PATIENCE_SECONDS", 0.01)
    client = world.connect()
    client.sendall(plain(1) + CLOSE)
    client.shutdown(socket.SHUT_WR)
    batch = world.ring.reserve(10, DEADLINE)
    call = Blocked(lambda: read_all(client))
    assert call.still(0.2), "the loop waits for the records, not for PATIENCE_SECONDS"
    other = world.connect()
    other.sendall(plain(2))
    eventually(lambda: world.ring.cursor == 2, "the loop serves other clients meanwhile")
    world.ring.commit(batch)
    assert call.result() == ack(1) + b"\x88\x02\x03\xe8"


def test_client_that_closed_in_order_and_left_is_dropped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the consumer is unreachable, the client would keep its place in `-n` for as long as the records take."""
    monkeypatch.setattr("ringolib.web.session.STALL_TIMEOUT_SECONDS", 0.1)
    client = world.connect()
    client.sendall(plain(1) + CLOSE)
    client.close()
    eventually(lambda: world.ended)
    assert world.ring.cursor == 1 and world.ended[0].acked == 0


def test_client_that_closes_its_side_is_given_up_after_a_moment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringolib.web.session.PATIENCE_SECONDS", 0.05)
    client = world.connect()
    client.sendall(plain(1))
    client.shutdown(socket.SHUT_WR)
    assert read_all(client) == b""
    eventually(lambda: world.ended)
    assert world.ended[0].lost and world.totals.snapshot().clients == 0


def test_reset_connection_ends_and_its_records_are_stored(world: World) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    world.loop.add(ours, Session(False, module.monotonic()), b"", world.ended.append)
    client.sendall(plain(1, 2))
    eventually(lambda: world.ring.cursor == 2)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    eventually(lambda: world.ended)
    assert world.ended[0].lost and len(world.store()) == 2
    listener.close()


def test_clients_that_are_gone_leave_nothing_in_the_loop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "MAX_STALE_ENTRIES", 10)
    for _ in range(100):
        world.connect().close()
    eventually(lambda: len(world.ended) == 100)
    client = world.connect()
    client.sendall(plain(1))
    world.store()
    assert read(client, 10) == ack(1)
    assert len(world.loop._deadlines._heap) <= 2 + 10 and len(world.loop._clients) == 1


def test_client_that_leaves_while_its_record_is_in_doubt_is_forgotten(world: World) -> None:
    """Its consumer may be away for days."""
    client = world.connect()
    client.sendall(plain(1))
    batch = world.ring.reserve(1, DEADLINE)
    world.ring.set_aside(batch)
    eventually(lambda: world.loop._doubtful)
    client.close()
    eventually(lambda: world.ended)
    eventually(lambda: not world.loop._doubtful)
    world.ring.commit(batch)


def test_clients_that_leave_while_the_ring_is_full_are_dropped() -> None:
    with running(capacity=2) as world:
        client = world.connect()
        client.sendall(plain(1, 2, 3))
        eventually(lambda: world.loop._paused_at is not None)
        waiting = world.connect()
        waiting.close()
        client.close()
        eventually(lambda: len(world.ended) == 2)
        assert world.totals.snapshot().refused == 1
        assert len(world.store()) == 2
        other = world.connect()
        other.sendall(plain(4))
        assert list(world.store().values) == [4] and read(other, 10) == ack(1)


def test_pause_of_the_loop_does_not_count_as_the_silence_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PING_AFTER_SECONDS", "PING_TIMEOUT_SECONDS", "MESSAGE_TIMEOUT_SECONDS"):
        monkeypatch.setattr(f"ringolib.web.session.{name}", 0.2)
    monkeypatch.setattr(module, "GONE_CHECK_SECONDS", 0.01)
    with running(capacity=2) as world:
        client, silent = world.connect(), world.connect()
        client.sendall(plain(1, 2, 3) + plain(4)[:5])
        eventually(lambda: world.loop._paused_at is not None)
        pause = Blocked(lambda: eventually(lambda: world.ended))
        assert pause.still(1.0), "no client is given up"
        client.sendall(plain(4)[5:])
        world.store()
        world.store()
        eventually(lambda: world.ring.cursor == 4)
        pause.result()
        assert world.ended[0].ending == (1006, "connection lost: no answer to a ping within 0 s"), "after the pause"
        assert read(silent, 6) == 3 * protocol.PING, "which a proxy may need to see"


def test_next_ping_comes_in_time_after_the_answer_to_a_ping(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringolib.web.session.PING_AFTER_SECONDS", 0.05)
    client = world.connect()
    client.settimeout(PING_TIMEOUT_SECONDS / 2)
    for _ in range(8):
        assert read(client, 2) == protocol.PING
        client.sendall(frame(10, b""))
    assert world.ended == []


def test_loop_reads_on_after_the_client_it_paused_for_has_left() -> None:
    with running(capacity=2) as world:
        other = world.connect()
        other.sendall(plain(9))
        world.store()
        assert read(other, 10) == ack(1)
        client = world.connect()
        client.sendall(plain(1, 2, 3))
        eventually(lambda: world.loop._paused_at is not None)
        client.close()
        eventually(lambda: world.ended)
        world.store()
        other.sendall(plain(4))
        assert list(world.store().values) == [4] and read(other, 10) == ack(2)


def test_client_for_which_the_poller_has_no_room_is_dropped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(world.loop._readers, "register", fail)
        assert read_all(world.connect()) == b""
    client = world.connect()
    client.sendall(plain(1))
    world.store()
    assert read(client, 10) == ack(1)


@pytest.mark.parametrize("part", ["receive", "data_to_send", "expire", "read"])
def test_error_in_one_session_ends_that_session_only(world: World, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """After an error in reading or sending, nothing is known of the socket, so no Close frame follows."""

    class Faulty(Session):
        __slots__ = ()

    def fail(*_: object) -> NoReturn:
        raise MemoryError

    if part == "read":
        read_well = client_module.Client.read
        monkeypatch.setattr(
            client_module.Client,
            "read",
            lambda client, *of: (fail if isinstance(client.session, Faulty) else read_well)(client, *of),
        )
    else:
        setattr(Faulty, part, fail)
    good = world.connect()
    bad = world.connect(session=Faulty(False, module.monotonic() - 1000 * (part == "expire")))
    if part != "expire":
        bad.sendall(plain(1))
    if part == "data_to_send":
        world.store()
    try:
        closed = read_all(bad)
    except ConnectionResetError:
        closed = b""
    assert closed == b"" if part in ("data_to_send", "read") else struct.unpack(">H", closed[2:4]) == (1011,), closed
    good.sendall(plain(2))
    world.store()
    assert read(good, 10) == ack(1)


def test_client_that_reads_no_acks_gets_the_newest_one(world: World) -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    world.loop.add(ours, Session(False, module.monotonic()), b"", world.ended.append)
    for _ in range(2000):
        theirs.sendall(plain(1))
        world.store()
    theirs.settimeout(DEADLINE)
    data = b""
    while not data.endswith(ack(2000)):
        data += theirs.recv(65536)
    assert len(data) < 2000 * 10, "acks that did not fit were replaced"
    theirs.close()


def slow_reader(world: World) -> socket.socket:
    """Return a client that the system buffers little for: the loop's sends are soon stuck."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.settimeout(DEADLINE)
    world.loop.add(ours, Session(False, module.monotonic()), b"", world.ended.append)
    world._sockets.append(theirs)
    return theirs


def test_client_that_never_reads_is_given_up_when_acks_are_stuck(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringolib.web.session.STALL_TIMEOUT_SECONDS", 0.05)
    client = slow_reader(world)
    for number in range(1, 5000):
        try:
            client.sendall(plain(1))
        except OSError:
            break
        eventually(lambda: world.ring.cursor == number or world.ended)  # noqa: B023
        if world.ended:
            break
        world.store()
    eventually(lambda: world.ended)
    assert world.ended[0].ending == (1006, "connection lost: the client has read nothing for 0 s")


def test_client_that_reads_no_pongs_is_given_up(world: World) -> None:
    client = slow_reader(world)
    ending = (1006, "connection lost: the client does not read")
    with pytest.raises(OSError):
        for _ in range(100_000):
            client.sendall(frame(9, bytes(100)) * 100)
    eventually(lambda: world.ended)
    assert world.ended[0].ending == ending


def test_pongs_for_a_late_reader_are_sent_without_a_new_message(world: World) -> None:
    client = slow_reader(world)
    pings = 400
    client.sendall(frame(9, bytes(100)) * pings)
    eventually(lambda: world.loop._clients and next(iter(world.loop._clients)).unsent)
    assert read(client, 102 * pings) == (b"\x8a\x64" + bytes(100)) * pings


def test_first_record_is_acked_while_the_second_is_not_stored(world: World) -> None:
    client = world.connect()
    client.sendall(plain(1))
    first = world.ring.reserve(1, DEADLINE)
    client.sendall(plain(2))
    eventually(lambda: world.ring.cursor == 2)
    world.ring.commit(first)
    assert read(client, 10) == ack(1)
    world.store()
    assert read(client, 10) == ack(2)


def test_marks_of_a_long_wait_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MARKS", 5)
    client = world.connect()
    for number in range(1, 101):
        client.sendall(plain(number))
        eventually(lambda: world.ring.cursor == number)  # noqa: B023
    (served,) = world.loop._clients
    assert len(served.marks) <= 5 and len(world.loop._offers) <= 5
    world.store()
    last = b""
    while last != ack(100):
        last = read(client, 10)


def test_idle_connection_keeps_no_received_bytes(world: World) -> None:
    client = world.connect()
    message = frame(2, bytes(400_000))
    client.sendall(message)
    eventually(lambda: world.ring.cursor == 50_000)
    world.store()
    assert read(client, 10) == ack(50_000)
    tracemalloc.start()
    try:
        for number in range(2, 4):
            client.sendall(message)
            world.store()
            assert read(client, 10) == ack(number * 50_000)
        eventually(lambda: tracemalloc.get_traced_memory()[0] < 100_000)
    finally:
        tracemalloc.stop()


def test_stop_reads_no_more_and_closes_with_1001_after_the_ack(world: World) -> None:
    client = world.connect()
    client.sendall(plain(1))
    batch = world.ring.reserve(10, DEADLINE)
    world.loop.stop()
    client.sendall(plain(2))
    call = Blocked(lambda: read(client, 14))
    assert call.still()
    world.ring.commit(batch)
    assert call.result() == ack(1) + b"\x88" + bytes([2 + len("the server is stopping")]) + struct.pack(">H", 1001)


def test_loop_does_not_spin_while_a_stop_waits_for_records(world: World) -> None:
    client = world.connect()
    client.sendall(plain(1))
    batch = world.ring.reserve(10, DEADLINE)
    turns: list[int] = []
    real = world.loop._turn
    world.loop._turn = lambda: real() and turns.append(1) is None  # type: ignore[method-assign]
    world.loop.stop()
    client.sendall(plain(2))
    assert Blocked(lambda: read(client, 1)).still(0.3)
    assert len(turns) < 10
    world.ring.commit(batch)


def test_stop_ends_a_connection_as_soon_as_the_client_has_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringolib.web.session.CLOSE_TIMEOUT_SECONDS", 600.0)
    client = world.connect()
    client.sendall(plain(1))
    world.store()
    assert read(client, 10) == ack(1)
    world.loop.stop()
    client.sendall(plain(2))
    assert struct.unpack(">H", read_all(client)[2:4]) == (1001,)
    client.sendall(CLOSE)
    client.close()
    eventually(lambda: world.ended)
    assert world.loop.join(DEADLINE) and world.totals.snapshot().received == 1


def test_client_that_comes_after_the_end_of_the_loop_is_closed_with_1001(world: World) -> None:
    world.loop.stop()
    assert world.loop.join(DEADLINE)
    ours, client = socket.socketpair()
    with client:
        adding = Blocked(lambda: world.loop.add(ours, Session(False, module.monotonic()), b"", world.ended.append))
        assert struct.unpack(">H", read_all(client)[2:4]) == (1001,)
        client.sendall(CLOSE)
        client.shutdown(socket.SHUT_WR)
        adding.result()
    assert len(world.ended) == 1


def test_stop_with_unstored_batches_closes_with_1011() -> None:
    with running() as world:
        client = world.connect(batches=True)
        client.sendall(frame(2, encode_batch([Run(bytes(16), 0, 1)], array("q", (1,)))))
        batch = world.ring.reserve(10, DEADLINE)
        world.loop.stop()
        world.ring.abort()
        assert struct.unpack(">H", read(client, 4)[2:4]) == (1011,)
        world.ring.commit(batch)
        assert read_all(client) == UNSTORED[1].encode()
        client.close()
        eventually(lambda: world.ended)
        assert world.ended[0].acked == 0, "no ack can follow a Close frame"


def test_failed_commit_during_a_stop_closes_with_1011() -> None:
    """1001 would tell a publisher that nothing of its batch can be stored, so that another consumer may get it."""
    store = Memory()
    store.fails = True
    store.may_commit.clear()
    intake = StoreIntake(store)  # type: ignore[arg-type]
    world = World(Ring(1), intake=intake)
    client = world.connect(batches=True)
    client.sendall(frame(2, encode_batch([Run(bytes(16), 0, 1)], array("q", (1,)))))
    eventually(lambda: any(one.marks for one in world.loop._clients))
    world.loop.stop()
    eventually(lambda: any(one.session.ending == GOING_AWAY for one in world.loop._clients))
    store.may_commit.set()
    assert struct.unpack(">H", read_all(client)[2:4]) == (1011,)
    world.close()
    intake.stop(DEADLINE)


def test_paused_loop_acks_what_the_ring_takes_with_ack_in_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GONE_CHECK_SECONDS", 3600.0)
    world = World(Ring(2), ack_in_ring=True)
    client = world.connect()
    client.sendall(frame(2, struct.pack(">10q", *range(10))))
    assert read(client, 10) == ack(2)
    world.store(1)
    assert read(client, 10) == ack(3)
    world.close()


def test_loop_responds_when_idle_and_when_the_ring_is_full() -> None:
    with running(capacity=2) as world:
        assert world.loop.responds(DEADLINE)
        world.connect(plain(1, 2, 3, 4, 5))
        eventually(lambda: world.loop._paused_at is not None)
        assert all(world.loop.responds(DEADLINE) for _ in range(3))


def test_loop_that_hangs_in_a_turn_does_not_respond(world: World) -> None:
    entered, release = threading.Event(), threading.Event()

    class Hanging(Session):
        def receive(self, data: bytes, now: float) -> Block:
            entered.set()
            release.wait(DEADLINE)
            return super().receive(data, now)

    client = world.connect(session=Hanging(False, module.monotonic()))
    client.sendall(plain(1))
    assert entered.wait(DEADLINE)
    assert not world.loop.responds(0.05)
    assert not world.loop.responds(0.05)
    release.set()
    assert world.loop.responds(DEADLINE)


def test_loop_that_has_ended_counts_as_responding(world: World) -> None:
    """The drain of the ring goes on, and the watchdog with it."""
    world.loop.stop()
    assert world.loop.join(DEADLINE)
    assert Blocked(lambda: world.loop.responds(10 * DEADLINE)).result()


class Memory:
    """A store that keeps blocks, and fails on request."""

    def __init__(self) -> None:
        self.blocks: list[tuple[list[Run], list[int]]] = []
        self.fails = False
        self.fails_for: set[int] = set()  # values
        self.may_commit = threading.Event()
        self.may_commit.set()

    def append(self, runs: list[Run], values: "array[int]") -> None:
        assert self.may_commit.wait(DEADLINE)
        if self.fails or self.fails_for & set(values):
            raise StoreError("disk full")
        self.blocks.append((list(runs), list(values)))


def test_blocks_that_gather_during_a_commit_share_the_next_one() -> None:
    store = Memory()
    store.may_commit.clear()
    intake = StoreIntake(store)  # type: ignore[arg-type]
    notified = threading.Semaphore(0)
    intake.on_progress(notified.release)
    tickets = []
    for number in range(10):
        ((ticket, count),) = intake.offer([Block([Run(bytes(16), number, 1)], array("q", (number,)))])
        tickets.append(ticket)
        assert count == 1 and not intake.passed(ticket)
    store.may_commit.set()
    eventually(lambda: all(intake.outcome(ticket) is True for ticket in tickets))
    assert [value for _, values in store.blocks for value in values] == list(range(10))
    assert len(store.blocks) <= 2
    intake.stop(DEADLINE)


def test_failed_commit_is_the_outcome_of_its_blocks_only() -> None:
    store = Memory()
    intake = StoreIntake(store)  # type: ignore[arg-type]
    store.fails = True
    ((bad, _),) = intake.offer([Block([Run(bytes(16), 0, 1)], array("q", (1,)))])
    eventually(lambda: intake.passed(bad))
    store.fails = False
    ((good, _),) = intake.offer([Block([Run(bytes(16), 0, 1)], array("q", (1,)))])
    eventually(lambda: intake.passed(good))
    assert isinstance(intake.outcome(bad), StoreError) and intake.outcome(good) is True
    intake.stop(DEADLINE)


def test_no_record_behind_a_failed_one_is_acked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one in the same commit's successor, nor one that waits in the loop's backlog. An ack would cover both."""
    monkeypatch.setattr("ringolib.web.intake.MAX_QUEUED", 1)
    store = Memory()
    store.may_commit.clear()
    store.fails_for = {1}
    intake = StoreIntake(store)  # type: ignore[arg-type]
    world = World(Ring(1), intake=intake)
    client, other = world.connect(), world.connect()
    client.sendall(plain(1))
    eventually(lambda: world.totals.snapshot().received == 1 and not intake._queue, "1 is in a commit")
    client.sendall(plain(2))
    eventually(lambda: world.totals.snapshot().received == 2, "2 is in the queue")
    client.sendall(plain(3))
    eventually(lambda: world.loop._paused_at is not None, "3 is in the backlog")
    other.sendall(plain(4))
    store.may_commit.set()
    data = read_all(client)
    assert data[0] == 0x88 and struct.unpack(">H", data[2:4]) == (1011,), "no ack before the Close frame"
    assert read(other, 10) == ack(1)
    world.close()
    intake.stop(DEADLINE)
    assert [values for _, values in store.blocks] == [[2], [4]]
    assert sorted((session.received, session.acked) for session in world.ended) == [(1, 1), (3, 0)]
    assert world.totals.snapshot().refused == 3


def test_queue_of_a_stalled_store_is_bounded() -> None:
    store = Memory()
    store.may_commit.clear()
    intake = StoreIntake(store)  # type: ignore[arg-type]
    block = Block([Run(bytes(16), 0, 100_000)], array("q", bytes(800_000)))
    taken = sum(len(intake.offer([block])) for _ in range(20))
    assert taken <= 5
    store.may_commit.set()
    intake.stop(DEADLINE)


def test_large_block_goes_through_a_tiny_ring_piece_by_piece() -> None:
    """The cost of a piece depends on its own records. When it depended on the rest, this took 20 s of CPU time."""
    runs = [Run(bytes(16), 2 * number, 1) for number in range(65_536)]
    with running(capacity=64) as world:
        client = world.connect(batches=True)
        message = encode_batch(runs, array("q", range(65_536)))
        sending = Blocked(lambda: client.sendall(frame(2, message)))
        started = time.process_time()
        values: list[int] = []
        stored: list[Run] = []
        while len(values) < len(runs):
            batch = world.store()
            values += batch.values
            stored += batch.runs
        assert time.process_time() - started < 5.0
        sending.result()
        assert values == list(range(65_536)) and stored == runs
        data = read(client, 10)
        while data != ack(65_536):
            data = read(client, 10)


def test_offer_looks_at_the_blocks_that_fit_only() -> None:
    class Counting(deque[Any]):
        looked_at = 0

        def __iter__(self) -> Iterator[Any]:
            for entry in super().__iter__():
                self.looked_at += 1
                yield entry

    with running(capacity=1) as world:
        backlog = world.loop._backlog = Counting()
        clients = [world.connect(rest=plain(1)) for _ in range(100)]
        for number in range(100):
            eventually(lambda: world.ring.cursor == number + 1)  # noqa: B023
            world.store()
        for client in clients:
            assert read(client, 10) == ack(1)
        assert world.loop._backlog is backlog and backlog.looked_at <= 1000, "not 100 blocks at each commit"


@pytest.mark.parametrize("part", ["_settle", "_offer_backlog", "_take_news"])
def test_error_in_the_loops_bookkeeping_ends_the_process(tmp_path: Path, part: str) -> None:
    """Records that were acked before it are on disk."""
    patch = (
        f"real = web.loop.IngestLoop.{part}; fails = lambda self: self._totals.snapshot().acked >= 50; "
        f"web.loop.IngestLoop.{part} = lambda self, *of: 1 / 0 if fails(self) else real(self, *of)"
    )
    running = ServerProcess(tmp_path, "-p", "0", "-T", "0", patch=patch)
    acked = 0
    try:
        with RawClient(running.port) as client:
            try:
                for _ in range(10_000):
                    client.send(plain(1))
                    acked = client.acked(acked + 1)
            except (OSError, AssertionError):
                pass
        assert running.wait() == EXIT_FATAL
    finally:
        running.kill()
    assert acked >= 49
    assert len(rows(tmp_path / "ringoexp.db")) >= acked
    errors = running.errors.read_text()
    assert "event=fatal" in errors and "ZeroDivisionError" in errors and "Traceback" not in errors


def test_request_waits_for_its_own_records_only() -> None:
    class BusyRing(Ring):
        def put(self, values: Any, source: bytes, first: int, timeout: float | None = None) -> int:
            end = super().put(values, source, first, timeout)
            super().put(array("q", [9]), bytes(16), first)  # of another client, before the caller looks at the cursor
            return end

    _, ticket = RingIntake(BusyRing(8)).put(Block([Run(bytes(16), 0, 2)], array("q", [1, 2])), 5)
    assert (ticket.since, ticket.end) == (0, 2)
